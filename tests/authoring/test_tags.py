"""Tags, their metadata, folded headings, and solutions cut out wherever they may stand."""

import shutil
import subprocess
import sys

import jupytext
import pytest

from utils.authoring import source as lecture_source
from utils.paths import ROOT

HEADER = (ROOT / "tests/authoring/samples/01_sample.py").read_text(encoding="utf-8").split("# %%")[0]
TITLE = "# %% [markdown]\n# # A lecture\n#\n# About something.\n"


def lecture(folder, *cells):
    """Write and read a lecture made of these cells, each with its own `# %%` line."""
    path = folder / "01_sample.py"
    path.write_text("\n".join([HEADER + TITLE, *(f"{cell}\n" for cell in cells)]), encoding="utf-8")
    return lecture_source.read(path)


def learners(folder, *cells):
    return lecture_source.drafts(lecture(folder, *cells))["lectures"][0]


def refused(folder, *cells):
    with pytest.raises(lecture_source.SourceError) as error:
        lecture(folder, *cells)
    return str(error.value)


BEHIND = "# %% [markdown]\n# ## Behind the scenes"
PLUMBING = '# %% tags=["plumbing"]\nx = 1'
APPROX = '# %% tags=["approx"] approx={"numbers": 0.05, "picture": 0.02}\nprint(1.7)'


def test_plumbing_is_folded_in_both_notebooks(tmp_path):
    for notebook, _ in lecture_source.drafts(lecture(tmp_path, BEHIND, PLUMBING)).values():
        assert notebook.cells[-1].metadata == {"tags": ["plumbing"], "jupyter": {"source_hidden": True}}


def test_plumbing_anywhere_else_is_refused(tmp_path):
    after = "# %% [markdown]\n# ## Glossary"
    for cells in ((PLUMBING,), (BEHIND, after, PLUMBING), ("# %% [markdown]\n# ### Behind the scenes", PLUMBING)):
        assert "stands under the heading '## Behind the scenes'" in refused(tmp_path, *cells)


@pytest.mark.parametrize("name", ["Going further", "Behind the scenes"])
def test_what_is_not_read_first_is_closed_when_the_notebook_opens(tmp_path, name):
    cells = f"# %% [markdown]\n# ## {name}\n#\n# More.", "# %% [markdown]\n# ## Glossary"
    *_, heading, other = learners(tmp_path, *cells).cells
    assert heading.metadata == {"jp-MarkdownHeadingCollapsed": True} and other.metadata == {}
    assert "begins a cell of its own" in refused(tmp_path, f"# %% [markdown]\n# Text.\n#\n# ## {name}")


def test_a_tolerance_reaches_the_notebook(tmp_path):
    cell = learners(tmp_path, APPROX).cells[-1]
    assert cell.metadata == {"tags": ["approx"], "approx": {"numbers": 0.05, "picture": 0.02}}


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ('# %% tags=["approx"]\n1', "come together"),
        ('# %% approx={"numbers": 0.1}\n1', "come together"),
        ('# %% tags=["approx"] approx={}\n1', "approx holds"),
        ('# %% tags=["approx"] approx=0.1\n1', "approx holds"),
        ('# %% tags=["approx"] approx={"number": 0.1}\n1', "approx holds"),
        ('# %% tags=["approx"] approx={"numbers": 0}\n1', "numbers is 0"),
        ('# %% tags=["approx"] approx={"numbers": 0.1, "picture": 0.6}\n1', "picture is 0.6"),
        ('# %% tags=["approx"] approx={"numbers": true}\n1', "numbers is True"),
        ('# %% [markdown] tags=["approx"] approx={"numbers": 0.1}\n# text', "are for code cells"),
        ('# %% tags=["exercize"]\n1', "unknown tag 'exercize'"),
        ('# %% aprox={"numbers": 0.1}\n1', "unknown cell metadata 'aprox'"),
        ('# %% kind="module"\n1', "an exercise cell is one of"),
        ("# %%\nif smollm:\n    1", "has the tag language-model"),
        ('# %% tags=["language-model"]\n1', "has the tag language-model"),
    ],
)
def test_tags_and_metadata_that_mean_nothing_are_refused(tmp_path, cell, message):
    assert message in refused(tmp_path, cell)


def test_tags_and_metadata_survive_a_sync_in_jupyter(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    exercise = (
        '# %% tags=["exercise"] kind="numpy"\ndef f():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION'
    )
    title, *cells = (
        '# %% [markdown] tags=["slide"]\n# A slide.',
        APPROX,
        "# %% [markdown]\n# #### Exercise 1A: one  (difficulty 1 of 5, essential, 2 minutes)",
        exercise,
        '# %%\nf = check("1A", f)',
        BEHIND,
        PLUMBING,
    )
    made = lecture(tmp_path, title, *cells)
    text = made.path.read_text(encoding="utf-8")
    notebook = lecture_source.drafts(made)["solutions"][0]
    notebook.cells[0].source += " Edited."
    jupytext.write(notebook, made.path.with_suffix(".ipynb"))
    subprocess.run(
        [sys.executable, "-m", "jupytext", "--sync", made.path.with_suffix(".ipynb")], check=True, capture_output=True
    )
    kept = [cell.metadata for cell in lecture_source.read(made.path).cells]
    assert made.path.read_text(encoding="utf-8") != text
    strip = [{key: value for key, value in metadata.items() if key != "lines_to_next_cell"} for metadata in kept]
    assert strip[2] == {"approx": {"numbers": 0.05, "picture": 0.02}} and strip[4] == {"kind": "numpy"}
    assert [cell.tags for cell in lecture_source.read(made.path).cells] == [cell.tags for cell in made.cells]


def test_nothing_stands_above_the_title_and_one_sentence_below_it_says_how_to_run(tmp_path):
    title, place, *_ = learners(tmp_path, "# %%\n1").cells
    lines = title.source.split("\n\n")
    assert lines[0] == "# A lecture" and "from the start" in lines[1] and lines[2:] == ["About something."]
    assert place.metadata.tags == [lecture_source.ONLY_IN_LECTURES] and "workbook/" in place.source


def test_a_lecture_says_in_its_metadata_what_it_is_made_from(tmp_path):
    assert learners(tmp_path).metadata.course.generated_from == "solutions/01_sample.py"


# ---- Exercises ----------------------------------------------------------------------------------------------------

MODULE = '''
class Head(nn.Module):
    """One head."""

    def __init__(self, d):
        super().__init__()
        ### BEGIN SOLUTION
        self.query = nn.Linear(d, d)
        ### END SOLUTION

    @torch.no_grad()
    def forward(self, x):
        n = len(x)
        ### BEGIN SOLUTION
        return self.query(x)
        ### END SOLUTION
'''
KERNEL = '''
HELPER = r"""
__device__ float half_of(float x) {
    // BEGIN SOLUTION
    return x / 2;
    // END SOLUTION
}
"""
Head = HELPER + r"""
__global__ void halve(float *x) {
    x += blockIdx.x;
    // BEGIN SOLUTION
    *x = half_of(*x);
    // END SOLUTION
}
"""
'''
FINDS_THE_BUG = '''
def Head(attention):
    """Raise AssertionError if `attention` is wrong."""
    ### BEGIN SOLUTION
    assert attention(1) == 2
    ### END SOLUTION
'''
OUTSIDE = {
    "at the top": ("Head = 1\n### BEGIN SOLUTION\nx = 1\n### END SOLUTION", "inside a function or method"),
    "in a class": ("class Head:\n    ### BEGIN SOLUTION\n    x = 1\n    ### END SOLUTION", "inside a function"),
    "in a string": (
        'Head = """\n### BEGIN SOLUTION\nx = 1\n### END SOLUTION\n"""\ndef f():\n    pass',
        "inside a function or method",
    ),
    "CUDA outside a string": ("Head = [1]\n// BEGIN SOLUTION\nx = 1\n// END SOLUTION", "is no Python"),
    "a head without a body": (
        "def Head():\n    ### BEGIN SOLUTION\n    if x:\n    ### END SOLUTION\n        return 1",
        "is no Python",
    ),
}


def exercise(source, number="1A", header="difficulty 3 of 5, essential, 10 minutes"):
    return (
        f"# %% [markdown]\n# #### Exercise {number}: a head  ({header})",
        f'# %% tags=["exercise"]\n{source.strip()}',
        f'# %%\nHead = check("{number}", Head)',
    )


@pytest.mark.parametrize("source", [MODULE, KERNEL, FINDS_THE_BUG], ids=["module", "kernel", "test"])
def test_solutions_are_cut_out_of_methods_kernels_and_tests(tmp_path, source):
    cell = learners(tmp_path, *exercise(source)).cells[-2]
    assert "SOLUTION" not in cell.source and cell.metadata.exercise == "1A"
    stub = "// your code here" if source is KERNEL else "raise NotImplementedError"
    assert cell.source.count(stub) == source.count("BEGIN")
    compile(cell.source, "exercise", "exec")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_solution_whose_stub_would_break_the_lecture_is_refused(tmp_path, name):
    source, message = OUTSIDE[name]
    assert message in refused(tmp_path, *exercise(source))


def test_two_exercises_are_marked_and_letters_are_the_lecture_s_own(tmp_path):
    header = "difficulty 3 of 5, essential, 10 minutes; if you do only two"
    assert lecture(tmp_path, *exercise(MODULE, header=header)).exercises[0].number == "1A"
    assert lecture(tmp_path, *exercise(MODULE, "1.1", "difficulty 3 of 5, 10 minutes")).exercises[0].number == "1.1"
    assert "exercise 2A in lecture 01" in refused(tmp_path, *exercise(MODULE, "2A"))
    for wrong in ("difficulty 3 of 5, vital, 10 minutes", "difficulty 6 of 5, useful, 10 minutes", "difficulty 3 of 5"):
        assert "header reads" in refused(tmp_path, *exercise(MODULE, header=wrong))


def test_a_heading_about_exercises_is_no_exercise(tmp_path):
    assert lecture(tmp_path, "# %% [markdown]\n# ## Exercises left\n#\n# 1. Prove it.").exercises == []
