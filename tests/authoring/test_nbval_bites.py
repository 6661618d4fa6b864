"""nbval, with what is replaced in it, fails on what matters, once, and says where; rounding and busy machines pass."""

import base64
import copy
import io
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree

import nbformat
import pytest
from PIL import Image, ImageDraw

from utils.authoring import source as lecture_source
from utils.authoring.execute import BuildError, execute
from utils.paths import ROOT

pytestmark = pytest.mark.slow

TEXT_CELLS = [
    'print("loss 0.69315 with 4 heads")\nprint("agrees to 1e-6: True")',
    "x = [1.5, 2.5]\nx;",
    "from IPython.display import HTML\nHTML(\"<b id='view-3fa9c1d27b'>weight 0.125</b>\")",
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
    execute(notebook, folder, lambda index, line=1: (f"cell {index}", ""))
    return notebook


# A picture that carries its words, as plotting.show gives them.
WORD_CELLS = [
    """\
import base64, io
from IPython.display import display
from PIL import Image
file = io.BytesIO()
Image.new("RGB", (80, 40), "white").save(file, "PNG")
bundle = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": "A picture."}
display(bundle, raw=True, metadata={"image/png": {"alt": "A picture.", "words": ["RoPE", "ALiBi", "0.50"]}})""",
]
DEADLY_CELLS = ["print(1)", "x = 1", "print(2)", "print(3)"]


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


def change_words(*words):
    def tamper(notebook):
        notebook.cells[0].outputs[0].metadata["image/png"]["words"] = list(words)

    return tamper


def tolerate(**approx):
    """A number that is 1 % off, in a cell that tolerates something."""

    def tamper(notebook):
        notebook.cells[0].metadata.update(tags=["approx"], approx=approx)
        change_text(0, "0.69315", "0.70008")(notebook)

    return tamper


def die(notebook):
    notebook.cells[1].source = "import os; os._exit(3)"


def loop(notebook):
    notebook.cells[1].source = "while True: pass"


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
    "no_picture_drawn": (PICTURE_CELLS, lambda notebook: notebook.cells[0].update(source="x = 1"), 0),
    "untouched_words": (WORD_CELLS, lambda notebook: None, None),
    "drift_in_words": (WORD_CELLS, change_words("RoPE", "ALiBi", "0.501"), None),
    "swapped_words": (WORD_CELLS, change_words("ALiBi", "RoPE", "0.50"), 0),
    "tolerated_number": (TEXT_CELLS, tolerate(numbers=0.02), None),
    "number_off_by_more": (TEXT_CELLS, tolerate(numbers=0.005), 0),
    "number_where_a_picture_is_tolerated": (TEXT_CELLS, tolerate(picture=0.5), 0),
    "dead_kernel": (DEADLY_CELLS, die, 1),
    "endless_cell": (DEADLY_CELLS, loop, 1),
}


KINDS = (TEXT_CELLS, PICTURE_CELLS, WORD_CELLS, DEADLY_CELLS)


def run_nbval(project, *options):
    shutil.copy(ROOT / "conftest.py", project)
    (project / "pytest.ini").write_text(f"[pytest]\npythonpath = {ROOT.as_posix()}\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval", "-p", "no:cacheprovider", "-rsf", *options],
        check=False,
        cwd=project,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """Run nbval once over all cases; return {case: [code cells that failed]} and what it printed."""
    project = tmp_path_factory.mktemp("project")
    (project / "lectures").mkdir()
    (project / "workbook").mkdir()
    templates = [(cells, executed(project / "lectures", cells)) for cells in KINDS]
    for name, (cells, tamper, _) in CASES.items():
        notebook = copy.deepcopy(next(template for of, template in templates if of is cells))
        tamper(notebook)
        nbformat.write(notebook, project / "lectures" / f"{name}.ipynb")
    (project / "workbook" / "mine.ipynb").write_text("not a notebook")
    limit = "from utils.authoring import usage\nusage.CELL_SECONDS = 5\n"
    (project / "lectures" / "conftest.py").write_text(limit)
    done = run_nbval(project, "--junitxml=report.xml", "-n", "2", "--dist", "loadscope")
    failed = {name: [] for name in CASES}
    for case in xml.etree.ElementTree.parse(project / "report.xml").iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed[case.get("classname").split(".")[1]].append(case.get("name"))
    table = (project / "build" / "notebook_times.md").read_text(encoding="utf-8")
    return failed, done.stdout, table, project / "build" / "differences"


@pytest.mark.parametrize("name", CASES)
def test_a_tampered_notebook_fails_at_its_cell_and_a_drift_passes(name, verdicts):
    expected = CASES[name][2]
    assert verdicts[0][name] == ([] if expected is None else [f"In [{expected + 1}]"]), verdicts[1]


def test_the_workbook_is_left_alone_and_every_other_notebook_run(verdicts):
    items = sum(len(cells) + 1 for cells, *_ in CASES.values())  # the cells and the budget
    failing = sum(cell is not None for *_, cell in CASES.values())
    skipped = len(DEADLY_CELLS[2:])  # after the kernel's death
    assert f"{failing} failed, {items - failing - skipped} passed, {skipped} skipped" in verdicts[1]


def test_what_comes_after_the_death_of_a_kernel_is_skipped(verdicts):
    assert "the kernel died in In [2]" in verdicts[1]
    assert "lectures/dead_kernel.ipynb, In [2]: the kernel died" in verdicts[1]


def test_a_cell_is_stopped_by_its_processor_time(verdicts):
    assert "lectures/endless_cell.ipynb, In [2]: stopped after 5 s of processor time" in verdicts[1]


def test_a_missing_picture_is_a_sentence(verdicts):
    assert "output 1: the picture is missing" in verdicts[1]
    assert not re.search(r"[A-Za-z0-9+/]{200}", verdicts[1])


def test_pictures_that_differ_are_kept_as_files_and_named(verdicts):
    for name in ("redrawn_line", "swapped_words"):
        for kind in ("kept", "new", "difference"):
            file = f"lectures_{name}_In_1_output_1_{kind}.png"
            assert Image.open(verdicts[3] / file).size and f"build/differences/{file}" in verdicts[1]
    assert "its words differ: 'ALiBi' is now 'RoPE', 'RoPE' is now 'ALiBi'" in verdicts[1]
    assert len(list(verdicts[3].glob("*another_size*"))) == 2


def test_the_report_has_no_colours(verdicts):
    assert "\x1b" not in verdicts[1] and "division" not in verdicts[1]


def test_the_table_lists_time_and_memory_of_each_notebook_under_xdist(verdicts):
    for name in CASES:
        row = next(line for line in verdicts[2].splitlines() if f"lectures/{name}.ipynb" in line)
        processor, wall, megabytes, verdict = (part.strip() for part in row.split("|")[2:6])
        assert int(processor) >= 0 and int(wall) >= 0 and verdict == "kept"
        assert int(megabytes) > 20 or name == "dead_kernel"
    assert "lectures/one_pixel.ipynb" in verdicts[1]


@pytest.mark.parametrize(
    ("budget", "said"),
    [("MEGABYTES = 5", "budget of 120 s and 5 MB"), ("SECONDS = 0.01", "budget of 0.01 s and 2000 MB")],
)
def test_a_notebook_over_twice_its_budget_fails_once_and_is_marked(budget, said, tmp_path):
    (tmp_path / "lectures").mkdir()
    nbformat.write(executed(tmp_path / "lectures", ["1"] * 3), tmp_path / "lectures" / "large.ipynb")
    (tmp_path / "lectures" / "conftest.py").write_text(f"from utils.authoring import usage\nusage.{budget}\n")
    done = run_nbval(tmp_path, "lectures")
    assert f"over 2 times the {said}" in done.stdout and "OVER BUDGET" in done.stdout
    assert "1 failed, 3 passed" in done.stdout and done.returncode == 1


def test_where_the_language_model_is_missing_its_cells_are_run_and_not_compared(tmp_path):
    (tmp_path / "lectures").mkdir()
    notebook = executed(tmp_path / "lectures", ["print(1)", "print(2)", "print(3)"])
    for cell in notebook.cells[1:]:
        cell.metadata["tags"] = ["language-model"]
        cell.outputs[0].text = "what the model says\n"
    notebook.cells[2].source = "1 / 0"
    nbformat.write(notebook, tmp_path / "lectures" / "model.ipynb")
    missing = "from utils.authoring import execute\nexecute.MODEL_PACKAGE = 'no_such_package'\n"
    (tmp_path / "lectures" / "conftest.py").write_text(missing)
    done = run_nbval(tmp_path, "lectures")
    assert "1 failed, 2 passed, 1 skipped" in done.stdout and "ZeroDivisionError" in done.stdout
    assert "run, not compared: the language model is not installed (requirements-model.txt)" in done.stdout


def test_nothing_is_built_without_the_language_model_that_it_shows(tmp_path, monkeypatch):
    notebook = executed(tmp_path, ["smollm = 1"])
    notebook.cells[0].metadata["tags"] = ["language-model"]
    monkeypatch.setattr("utils.authoring.execute.MODEL_PACKAGE", "no_such_package")
    with pytest.raises(BuildError, match="the language model is missing"):
        execute(notebook, tmp_path, lambda index, line=1: ("", ""))


def test_a_failure_names_lecture_section_source_line_and_prompt(course, tmp_path):
    copied = shutil.copytree(course, tmp_path / "course")
    path = copied / "lectures" / "01_sample.ipynb"
    lecture = nbformat.read(path, as_version=4)
    cell = next(cell for cell in lecture.cells if "agrees to" in cell.source)
    cell.outputs[0].text = cell.outputs[0].text.replace("2.3333", "2.4333")
    nbformat.write(lecture, path)
    source = (copied / "solutions" / "01_sample.py").read_text(encoding="utf-8").splitlines()
    line = next(number for number, text in enumerate(source, 1) if text.startswith('print(f"mean'))
    done = run_nbval(copied, "lectures")
    assert f'lectures/01_sample.ipynb, In [{cell.execution_count}] in "Exercise 1.1: a mean' in done.stdout
    assert f"solutions/01_sample.py line {line}: Cell outputs differ\n    print(f" in done.stdout
    assert "expected: mean 2.4333, of 3 numbers\n  got:      mean 2.3333, of 3 numbers" in done.stdout
    assert f"FAILED lectures/01_sample.ipynb::In [{cell.execution_count}], line {line}" in done.stdout


def test_a_notebook_that_passed_is_left_out_on_request_until_something_that_decides_has_changed(course, tmp_path):
    copied = shutil.copytree(course, tmp_path / "course")
    count = sum(cell.cell_type == "code" for cell in nbformat.read(copied / "lectures" / "01_sample.ipynb", 4).cells)
    assert f"{count + 1} passed" in run_nbval(copied, "lectures", "--skip-passed").stdout
    done = run_nbval(copied, "lectures", "--skip-passed")
    assert (
        "1 skipped" in done.stdout
        and "it passed here or is as committed" in done.stdout
        and "passed in" not in done.stdout
    )
    assert f"{count + 1} passed" in run_nbval(copied, "lectures").stdout
    module = copied / "attention" / "sample.py"
    module.write_text(module.read_text(encoding="utf-8") + "\nx = 1\n", encoding="utf-8")
    assert f"{count + 1} passed" in run_nbval(copied, "lectures", "--skip-passed").stdout


def test_a_notebook_as_committed_is_left_out_on_request_until_it_or_an_input_changes(course, tmp_path):
    copied = shutil.copytree(course, tmp_path / "course")
    count = sum(cell.cell_type == "code" for cell in nbformat.read(copied / "lectures" / "01_sample.ipynb", 4).cells)
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], cwd=copied, check=True)
    assert "1 skipped" in run_nbval(copied, "lectures", "--skip-passed").stdout
    path = copied / "lectures" / "01_sample.ipynb"
    kept = path.read_text(encoding="utf-8")
    path.write_text(kept.replace("2.3333", "2.4333"), encoding="utf-8")
    assert "1 failed" in run_nbval(copied, "lectures", "--skip-passed").stdout
    path.write_text(kept, encoding="utf-8")
    module = copied / "attention" / "sample.py"
    module.write_text(module.read_text(encoding="utf-8") + "\nx = 1\n", encoding="utf-8")
    os.utime(module, (time.time() + 3600,) * 2)
    assert f"{count + 1} passed" in run_nbval(copied, "lectures", "--skip-passed").stdout


def test_a_notebook_that_failed_or_ran_in_part_has_not_passed(course, tmp_path):
    copied = shutil.copytree(course, tmp_path / "course")
    assert "passed" in run_nbval(copied, "lectures", "-k", "budget").stdout
    path = copied / "lectures" / "01_sample.ipynb"
    path.write_text(path.read_text(encoding="utf-8").replace("2.3333", "2.4333"), encoding="utf-8")
    assert "1 failed" in run_nbval(copied, "lectures").stdout
    assert "1 failed" in run_nbval(copied, "lectures", "--skip-passed").stdout
