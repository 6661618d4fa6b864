"""nbval, with what conftest.py replaces in it, fails on what matters and passes what only differs by rounding."""

import base64
import copy
import io
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import nbformat
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from utils import build, lecture_source, notebook_outputs, notebook_usage

ROOT = Path(__file__).resolve().parent.parent

TEXT_CELLS = [
    'print("loss 0.69315 with 4 heads")\nprint("agrees to 1e-6: True")',
    "x = [1.5, 2.5]\nx;",
    'from IPython.display import HTML\nHTML("<b id=\'view-3fa9c1d27b\'>weight 0.125</b>")',
    "x[0] / 4",
]
PICTURE_CELLS = [
    """\
import matplotlib.pyplot as plt
plt.figure(figsize=(6, 3))
plt.plot([0, 1, 2, 3], [3, 1, 2, 0])
plt.show()""",
]


def executed(folder, cells):
    """Return a notebook of code cells with the outputs that the build gives them."""
    cells = [lecture_source.Cell("code", source, 1) for source in cells]
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = lecture_source.notebook(cells, {"kernelspec": kernelspec, "language_info": {"name": "python"}})
    build.execute(build.Job(None, folder / "sample.ipynb", notebook, [1] * len(cells)))
    return notebook


def change_text(cell, old, new, kind="text"):
    def tamper(notebook):
        output = notebook.cells[cell].outputs[0]
        place = output if kind == "text" else output.data
        assert old in place[kind]
        place[kind] = place[kind].replace(old, new)
    return tamper


def change_picture(draw):
    def tamper(notebook):
        data = next(output.data for output in notebook.cells[0].outputs if "image/png" in output.get("data", {}))
        picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
        picture = draw(picture) or picture
        file = io.BytesIO()
        picture.save(file, "PNG")
        data["image/png"] = base64.b64encode(file.getvalue()).decode()
    return tamper


def line(picture):
    ImageDraw.Draw(picture).line([(100, 100), (300, 200)], fill=(213, 94, 0), width=2)


def pixel(picture):
    picture.putpixel((200, 100), (255, 0, 0))


def remove_output(notebook):
    notebook.cells[0].outputs = []


def add_output(notebook):
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", name="stdout", text="more\n")]


def raise_error(notebook):
    notebook.cells[3].source = "x[7] / 4"


def write_to_stderr(notebook):
    notebook.cells[0].source += '\nimport sys; print("a warning", file=sys.stderr)'


def write_noise(notebook):
    notebook.cells[0].source += '\nimport sys; print("[W NNPACK.cpp:64] Could not initialize NNPACK!", file=sys.stderr)'


# name: (cells, what is done to the kept notebook, the code cell that must fail or None)
CASES = {
    "untouched_text": (TEXT_CELLS, lambda notebook: None, None),
    "last_digit_drift": (TEXT_CELLS, change_text(0, "0.69315", "0.69316"), None),
    "last_digit_of_three": (TEXT_CELLS, change_text(3, "0.375", "0.376", "text/plain"), None),
    "another_content_id": (TEXT_CELLS, change_text(2, "3fa9c1d27b", "77ab01c3f2", "text/html"), None),
    "known_noise_on_stderr": (TEXT_CELLS, write_noise, None),
    "tampered_number": (TEXT_CELLS, change_text(0, "0.69315", "0.69815"), 0),
    "tampered_integer": (TEXT_CELLS, change_text(0, "4 heads", "5 heads"), 0),
    "tampered_result": (TEXT_CELLS, change_text(3, "0.375", "0.385", "text/plain"), 3),
    "tampered_html": (TEXT_CELLS, change_text(2, "weight", "Weight", "text/html"), 2),
    "changed_verdict": (TEXT_CELLS, change_text(0, "True", "False"), 0),
    "removed_output": (TEXT_CELLS, remove_output, 0),
    "additional_output": (TEXT_CELLS, add_output, 1),
    "exception": (TEXT_CELLS, raise_error, 3),
    "text_on_stderr": (TEXT_CELLS, write_to_stderr, 0),
    "untouched_picture": (PICTURE_CELLS, lambda notebook: None, None),
    "one_pixel": (PICTURE_CELLS, change_picture(pixel), None),
    "redrawn_line": (PICTURE_CELLS, change_picture(line), 0),
    "another_size": (PICTURE_CELLS, change_picture(lambda picture: picture.resize((300, 150))), 0),
    "removed_picture": (PICTURE_CELLS, remove_output, 0),
}


def run_nbval(project, *options):
    shutil.copy(ROOT / "conftest.py", project)
    (project / "pytest.ini").write_text(f"[pytest]\npythonpath = {ROOT.as_posix()}\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval", "-p", "no:cacheprovider", *options],
        check=False, cwd=project, capture_output=True, text=True, timeout=300,
    )


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """Run nbval once over all cases; return {case: [code cells that failed]} and what it printed."""
    project = tmp_path_factory.mktemp("project")
    (project / "lectures").mkdir()
    (project / "workbook").mkdir()
    templates = [(cells, executed(project / "lectures", cells)) for cells in (TEXT_CELLS, PICTURE_CELLS)]
    for name, (cells, tamper, _) in CASES.items():
        notebook = copy.deepcopy(next(template for of, template in templates if of is cells))
        tamper(notebook)
        nbformat.write(notebook, project / "lectures" / f"{name}.ipynb")
    (project / "workbook" / "mine.ipynb").write_text("not a notebook")
    done = run_nbval(project, "--junitxml=report.xml", "-n", "2", "--dist", "loadfile")
    failed = {name: [] for name in CASES}
    for case in xml.etree.ElementTree.parse(project / "report.xml").iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed[case.get("classname").split(".")[1]].append(int(case.get("name").split()[-1]))
    table = (project / "build" / "notebook_times.md").read_text(encoding="utf-8")
    return failed, done.stdout, table


@pytest.mark.parametrize("name", CASES)
def test_a_tampered_notebook_fails_at_its_cell_and_a_drift_passes(name, verdicts):
    expected = CASES[name][2]
    assert verdicts[0][name] == ([] if expected is None else [expected]), verdicts[1]


def test_the_workbook_is_left_alone_and_every_other_notebook_run(verdicts):
    cells = sum(len(cells) for cells, *_ in CASES.values())
    failing = sum(cell is not None for *_, cell in CASES.values())
    assert f"{failing} failed, {cells - failing} passed" in verdicts[1]


def test_the_table_lists_time_and_memory_of_each_notebook_under_xdist(verdicts):
    for name in CASES:
        row = next(line for line in verdicts[2].splitlines() if f"lectures/{name}.ipynb" in line)
        assert int(row.split("|")[3]) > 20 and row.split("|")[4].strip() == "kept"
    assert "lectures/one_pixel.ipynb" in verdicts[1]


def test_a_notebook_over_twice_its_budget_fails_and_is_marked(tmp_path):
    (tmp_path / "lectures").mkdir()
    nbformat.write(executed(tmp_path / "lectures", ["print(1)"]), tmp_path / "lectures" / "large.ipynb")
    small_budget = "from utils import notebook_usage\nnotebook_usage.MEGABYTES = 5\n"
    (tmp_path / "lectures" / "conftest.py").write_text(small_budget)
    done = run_nbval(tmp_path, "lectures")
    assert "over twice the budget" in done.stdout and "OVER BUDGET" in done.stdout and done.returncode == 1


def test_usage_counts_the_child_processes_of_a_kernel():
    hog = "import time; x = bytearray(200_000_000); print(1, flush=True); time.sleep(30)"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hog!r}])"],
        stdout=subprocess.PIPE,
    )
    try:
        parent.stdout.readline()
        usage = notebook_usage.Usage(parent.pid)
        parent_and_child = usage._resident() / 1e6
        usage.stop()
    finally:
        for process in notebook_usage.psutil.Process(parent.pid).children(recursive=True):
            process.kill()
        parent.communicate()
    assert 200 < parent_and_child < 400


@pytest.mark.parametrize(("expected", "actual", "agrees"), [
    ("0.123", "0.124", True),
    ("0.123", "0.125", False),
    ("0.93", "0.94", False),
    ("12.3", "12.4", True),
    ("1.5410", "1.5413", True),
    ("-0.0000", "0.0000", True),
    ("[ 0.0001 -0.2]", "[-0.0000 -0.2]", True),
    ("99.96 %", "100.01 %", True),
    ("largest difference 2e-16", "largest difference 3.1e-15", True),
    ("largest difference 2e-16", "largest difference 1e-4", False),
    ("1000", "1001", False),
    ("1", "1.0", False),
    ("0.5", "-0.5", False),
    ("1.0", "nan", False),
    ("shape (2, 3)", "shape (2, 4)", False),
    ("layer2", "layer3", False),
    ("a\nb", "a", False),
    ("x\0", "x1", False),
])
def test_numbers_have_a_tolerance_and_words_have_none(expected, actual, agrees):
    old, new = ([nbformat.v4.new_output("stream", name="stdout", text=text)] for text in (expected, actual))
    assert (notebook_outputs.differences(old, new) == []) is agrees


def drawn(draw):
    """Return the outputs of a cell that shows what `draw(axes)` draws."""
    figure = Figure(figsize=(8, 4), dpi=100)
    draw(figure.subplots())
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return [nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(file.getvalue()).decode()})]


def curves(drift=0.0, factor=1.0, count=3):
    """Three noisy training curves: `drift` adds relative noise to each, `factor` scales the last, `count` are drawn."""
    def draw(axes):
        noise, steps = np.random.default_rng(0), np.arange(200)
        for index in range(3):
            curve = np.exp(-steps / 60) * (1 + 0.3 * index) + 0.05 * noise.normal(size=200) * np.exp(-steps / 100)
            walk = np.random.default_rng(index).normal(size=200).cumsum() / np.sqrt(200)
            if index < count:
                axes.plot(steps, curve * (1 + drift * walk) * (factor if index == 2 else 1))
        axes.set_ylim(-0.1, 1.8)
    return drawn(draw)


def heatmap(change=0.0):
    def draw(axes):
        weights = np.random.default_rng(0).dirichlet(np.ones(8), 8)
        weights[2, 3] += change
        axes.imshow(weights, cmap="viridis", vmin=0, vmax=1)
    return drawn(draw)


@pytest.mark.parametrize(("expected", "actual", "agrees"), [
    (curves, lambda: curves(drift=0.01), True),
    (curves, lambda: curves(factor=0.95), False),
    (curves, lambda: curves(count=2), False),
    (heatmap, lambda: heatmap(0.02), True),
    (heatmap, lambda: heatmap(0.1), False),
], ids=["drift_of_1_percent", "curve_scaled_by_0.95", "curve_left_out", "weight_off_by_0.02", "weight_off_by_0.1"])
def test_a_picture_may_drift_and_may_not_change(expected, actual, agrees):
    assert (notebook_outputs.differences(expected(), actual()) == []) is agrees


def test_cleaning_twice_changes_nothing():
    picture = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(picture, "PNG")
    outputs = [nbformat.v4.new_output("stream", name="stdout", text="a\n"),
               nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(picture.getvalue()).decode()}),
               nbformat.v4.new_output("stream", name="stdout", text="b\n")]
    once = notebook_outputs.clean(outputs)
    assert [output.get("text") for output in once] == ["a\nb\n", None]
    assert len(Image.open(io.BytesIO(base64.b64decode(once[1].data["image/png"]))).getcolors()) <= 64
    assert notebook_outputs.clean(once) == once
