"""The build makes three things from one source, the same bytes every time, and refuses a source that breaks a rule."""

import inspect
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from tests.authoring import test_notebooks
from tests.authoring.courses import SAMPLE, files, new_course, notebook, small
from utils.authoring import build
from utils.authoring import source as lecture_source
from utils.authoring import usage as notebook_usage
from utils.paths import ROOT


def outputs(notebook, text):
    """Return what the first code cell containing `text` prints."""
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code" and text in cell.source)
    return "".join(output.text for output in cell.outputs)


# ---- The three products -------------------------------------------------------------------------------------------


def test_the_lecture_has_stubs_where_the_solutions_were(course):
    text = (course / "lectures" / "01_sample.ipynb").read_text(encoding="utf-8")
    cells = [cell.source for cell in notebook(course, "lectures").cells]
    mean = next(source for source in cells if source.startswith("def mean"))
    kernel = next(source for source in cells if source.startswith("KERNEL"))
    assert mean.endswith("    row = np.asarray(row)\n    raise NotImplementedError")
    assert kernel.endswith('blockDim.x + threadIdx.x;\n    // your code here\n}\n"""')
    for secret in ("SOLUTION", "total_of_the_row", "x[i] + 1.0f", "sums exactly", "A class usually asks"):
        assert secret not in text


def test_below_the_title_a_lecture_says_how_to_run_it_and_how_to_do_an_exercise(course):
    title, sentence = notebook(course, "lectures").cells[0].source.split("\n\n")[:2]
    assert title == "# 1. A sample lecture" and "from the start" in sentence and "the check below it" in sentence


def test_both_notebooks_are_executed_and_the_lecture_goes_on_with_the_reference(course):
    for folder, verdict in (("lectures", "not attempted yet"), ("solutions", "1 of 1 properties holds")):
        built = notebook(course, folder)
        assert outputs(built, 'check("1.1"') == f"1.1 mean: {verdict}\n"
        assert outputs(built, "agrees to") == "mean 2.3333, of 3 numbers\nagrees to 1e-6: True\n"
        counts = [cell.execution_count for cell in built.cells if cell.cell_type == "code"]
        assert counts == list(range(1, len(counts) + 1))
        assert built.metadata.language_info == {"name": "python"}


def test_jupytext_syncs_a_solution_notebook_back_to_the_very_same_source(course, tmp_path):
    for path in (ROOT / "pyproject.toml", *(course / "solutions").iterdir()):
        shutil.copy(path, tmp_path)
    source, paired = tmp_path / "01_sample.py", tmp_path / "01_sample.ipynb"
    edited = nbformat.read(paired, as_version=4)
    cell = next(cell for cell in edited.cells if cell.source == "What the exercises use.")
    cell.source = "Edited in Jupyter."
    nbformat.write(edited, paired)
    subprocess.run([sys.executable, "-m", "jupytext", "--sync", paired], check=True, capture_output=True)
    assert source.read_text(encoding="utf-8") == SAMPLE.read_text(encoding="utf-8").replace(
        "What the exercises use.", "Edited in Jupyter."
    )


# ---- Always the same, and only when needed ------------------------------------------------------------------------


@pytest.mark.slow
def test_two_builds_are_equal_to_the_byte(course, tmp_path):
    new_course(tmp_path, SAMPLE.read_text(encoding="utf-8"))
    assert build.main(["01", "--force"], root=tmp_path) == 0
    assert files(tmp_path) == files(course)


def test_cell_ids_come_from_content_so_that_a_new_cell_leaves_the_others_alone():
    cells = [lecture_source.Cell("code", source, 1) for source in ("x = 1", "x", "x = 1", "x")]
    ids = [cell.id for cell in lecture_source.notebook(cells, {}).cells]
    cells.insert(1, lecture_source.Cell("markdown", "new", 1))
    longer = [cell.id for cell in lecture_source.notebook(cells, {}).cells]
    assert len(set(ids)) == 4 and longer[:1] + longer[2:] == ids


# ---- Failures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("def f():\n    return 1 / 0\n\nf()", "line 21: ZeroDivisionError: division by zero\n    f()"),
        ("print('a'\n  b)", "SyntaxError: "),
        ("import os\nos._exit(3)", "line 18: the kernel died"),
        ("import sys\nprint('deprecated', file=sys.stderr)", "line 18: writes to stderr: deprecated"),
        ("object()", "line 18: shows an address in memory, another one each time: <object at 0x"),
        (
            "from IPython.display import clear_output\nprint(1)\nclear_output()",
            "line 18: uses clear_output, which changes",
        ),
        (
            "from IPython.display import clear_output\nclear_output(wait=True)",
            "line 18: uses clear_output, which changes",
        ),
        ("h = display(1, display_id=True)\nh.update(2)", "line 18: uses update_display, which changes"),
        (
            "from IPython.display import update_display\ndisplay(1, display_id='a')\nupdate_display(2, display_id='a')",
            "line 18: uses update_display, which changes",
        ),
        ("while True: pass", "line 18: stopped after 2 s of processor time"),
    ],
    ids=[
        "exception",
        "syntax",
        "dead_kernel",
        "stderr",
        "address",
        "clear",
        "clear_later",
        "update",
        "update_by_name",
        "time_limit",
    ],
)
def test_a_failing_cell_is_reported_with_its_source_line_and_nothing_is_written(
    cell, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(notebook_usage, "CELL_SECONDS", 2)
    new_course(tmp_path, small("x = 1", cell))
    before = files(tmp_path)
    assert build.main([], root=tmp_path) == 1
    printed = capsys.readouterr().out
    for folder in ("lectures", "solutions"):
        assert f'FAILED  {folder}/01_sample.ipynb: In [2] in "A small lecture", solutions/01_sample.py line' in printed
    assert printed.count(message) == 2, printed
    assert {name for name in files(tmp_path).keys() - before.keys()} == {"attention/sample.py", "attention/__init__.py"}


def test_one_run_reports_every_failing_cell_in_order(tmp_path, capsys):
    new_course(tmp_path, small("1 / 0", "print(1)", "[][0]"))
    assert build.main([], root=tmp_path) == 1
    lecture = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED  lectures")]
    assert [line.split(": ")[2] for line in lecture] == ["ZeroDivisionError", "IndexError"]


def test_an_unknown_lecture_is_a_sentence(tmp_path, capsys):
    new_course(tmp_path, small("x = 1"))
    assert build.main(["07"], root=tmp_path) == 2
    assert capsys.readouterr().out == "build: no lecture 07 in solutions/; there are: 01\n"


# What is replaced in the sample's text and by what; how the line begins that the error names, and what it says.
BROKEN = {
    "unclosed": ("    ### END SOLUTION\n", "", "    ### BEGIN", "BEGIN SOLUTION without its END"),
    "nested": ("    total_of", "    ### BEGIN SOLUTION\n    total_of", "    ### BEGIN", "is still open"),
    "stray_end": ("    row = np", "    ### END SOLUTION\n    row = np", "    ### END", "without its BEGIN"),
    "untagged": ('["exercise", "export"]\ndef', '["export"]\ndef', "    ### BEGIN", "outside a cell tagged exercise"),
    "mixed_kinds": ("    // END", "    ### END", "    ### END", "began with // and ends with ###"),
    "empty": ("    if (i < n) x[i] = x[i] + 1.0f;   // the last block is ragged\n", "", "    // END", "empty solution"),
    "misspelt": ("    ### BEGIN SOLUTION", "    # BEGIN SOLUTION", "    # BEGIN", "a solution marker stands alone"),
    "no_begin": ("    // BEGIN SOLUTION\n", "", "    // END", "END SOLUTION without its BEGIN"),
    "no_check": ('mean = check("1.1", mean)', "", "def mean", 'followed by no check("1.1"'),
    "wrong_check": ('check("1.1", mean)', 'check("1.1", median)', "def mean", "the exercise defines no median"),
    "no_header": ("# ### Exercise 1.1: a mean  (difficulty 1 of 5, 2 minutes)", "#", "def mean", "without a header"),
    "no_minutes": (", 2 minutes)", ")", "# ### Exercise 1.1", "an exercise's header reads"),
    "another_lecture": ("Exercise 1.1", "Exercise 2.1", "# ### Exercise 2.1", "exercise 2.1 in lecture 01"),
    "used_twice": ("Exercise 1.2", "Exercise 1.1", "KERNEL = ", "without a header of its own"),
    "unknown_tag": ('tags=["teacher"]', 'tags=["taecher"]', "# A class usually", "unknown tag 'taecher'"),
    "no_module": ("    module: sample\n", "    other: 1\n", "# ---", "names no module"),
    "no_title": ("# # 1. A sample lecture\n", "# A sample lecture\n", "# %% [markdown]", "not the title"),
    "leaked": (
        'mean = check("1.1", mean)',
        'mean = check("1.1", mean)\nreturn total_of_the_row / len(row)',
        "# ---",
        "shows a solution, exercise 1.1: return total_of_the_row",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_source_that_breaks_a_rule_is_refused_with_file_and_line(name, tmp_path):
    old, new, beginning, message = BROKEN[name]
    text = SAMPLE.read_text(encoding="utf-8")
    assert old in text
    text = text.replace(old, new, 1)
    path = tmp_path / "01_sample.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(lecture_source.SourceError, match="01_sample.py, line ") as error:
        lecture_source.drafts(lecture_source.read(path))
    assert message in str(error.value)
    assert text.splitlines()[int(re.search(r"line (\d+)", str(error.value))[1]) - 1].startswith(beginning)


def test_a_solution_that_a_cell_prints_is_found():
    lecture = lecture_source.read(SAMPLE)
    learner = lecture_source.drafts(lecture)["lectures"][0]
    learner.cells[-1].outputs = [nbformat.v4.new_output("stream", text="    return total_of_the_row / len(row)\n")]
    assert lecture_source.leaks(lecture, learner) == ["exercise 1.1: return total_of_the_row / len(row)"]


# ---- The gates over committed notebooks notice --------------------------------------------------------------------


def last_cell(change):
    return lambda notebook: change(notebook.cells[-1])


def picture(cell):
    return next(output for output in cell.outputs if "image/png" in output.get("data", {}))


def prints(text, name="stdout"):
    return last_cell(lambda cell: cell.outputs.append(nbformat.v4.new_output("stream", name=name, text=text)))


TAMPERED = {
    "a source edited by hand": (
        test_notebooks.test_notebooks_hold_the_cells_that_the_source_makes,
        last_cell(lambda cell: cell.update(source="print(2)")),
    ),
    "a cell left out": (
        test_notebooks.test_notebooks_hold_the_cells_that_the_source_makes,
        lambda notebook: notebook.cells.pop(),
    ),
    "an exercise that is solved": (
        test_notebooks.test_every_exercise_is_open_in_the_lecture_and_solved_in_the_solution,
        lambda notebook: [cell.update(outputs=[]) for cell in notebook.cells],
    ),
    "a solution in an output": (
        test_notebooks.test_no_solution_survives_in_the_lecture,
        prints("    return total_of_the_row / len(row)"),
    ),
    "a text above the title": (
        test_notebooks.test_the_lecture_says_below_its_title_how_to_run_it_and_in_its_metadata_what_it_is_made_from,
        lambda notebook: notebook.cells.insert(0, nbformat.v4.new_markdown_cell("For authors.")),
    ),
    "a cell not executed": (
        test_notebooks.test_every_code_cell_has_been_executed_in_order,
        last_cell(lambda cell: cell.update(execution_count=None)),
    ),
    "text on stderr": (test_notebooks.test_no_error_nothing_on_stderr_and_no_address, prints("deprecated", "stderr")),
    "a home path": (test_notebooks.test_no_private_path, prints("read /home/somebody/data.txt")),
    "no alternative text": (
        test_notebooks.test_every_picture_has_a_description_and_a_caption,
        last_cell(lambda cell: picture(cell).metadata.clear()),
    ),
    "no caption": (
        test_notebooks.test_every_picture_has_a_description_and_a_caption,
        last_cell(lambda cell: cell.outputs[-1].data.update({"text/markdown": ""})),
    ),
    "streams in pieces": (
        test_notebooks.test_outputs_are_stored_as_the_build_cleans_them,
        lambda notebook: [prints("a\n")(notebook), prints("b\n")(notebook)],
    ),
    "a long cell": (
        test_notebooks.test_cells_are_short,
        last_cell(lambda cell: cell.update(source="x = 1\n" * (test_notebooks.MOST_LINES + 1))),
    ),
    "many uncompared cells": (
        test_notebooks.test_few_outputs_go_uncompared,
        lambda notebook: [cell.metadata.update(tags=["nbval-ignore-output"]) for cell in notebook.cells],
    ),
    "a large file": (
        test_notebooks.test_the_file_is_small_and_asks_for_the_kernel_that_everybody_has,
        prints("x" * test_notebooks.MOST_BYTES),
    ),
    "another kernel": (
        test_notebooks.test_the_file_is_small_and_asks_for_the_kernel_that_everybody_has,
        lambda notebook: notebook.metadata.kernelspec.update(name="mine"),
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_the_gates_pass_what_was_built_and_notice(name, course, tmp_path, monkeypatch):
    gate, tamper = TAMPERED[name]
    copy = shutil.copytree(course, tmp_path / "copy")
    monkeypatch.setattr(test_notebooks, "ROOT", copy)
    path = copy / "lectures" / "01_sample.ipynb"
    subject = copy / "solutions" / "01_sample.py" if "source" in inspect.signature(gate).parameters else path
    gate(subject)
    tampered = nbformat.read(path, as_version=4)
    tamper(tampered)
    nbformat.write(tampered, path)
    with pytest.raises(AssertionError):
        gate(subject)
