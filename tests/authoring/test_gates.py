"""Every limit of a lecture passes a small sound lecture and notices what breaks it; the lectures keep them all."""

from types import SimpleNamespace

import nbformat
import pytest

from utils.authoring import build, gates, names, seen
from utils.authoring import source as lecture_source
from utils.paths import ROOT
from utils.setup import notebooks

SAMPLE = ROOT / "tests" / "authoring" / "samples" / "01_sample.py"


def prints(*lines):
    return nbformat.v4.new_output("stream", text="\n".join(lines) + "\n")


def picture():
    return nbformat.v4.new_output("display_data", {"image/png": "AAAA", "text/plain": "A curve."})


def text(source):
    return ("markdown", source, (), {}, [])


def code(source, *outputs, tags=(), **metadata):
    return ("code", source, tags, metadata, list(outputs))


def exercise(letter, kind, source, minutes=10, more=""):
    header = f"#### Exercise 1{letter}: write it  (difficulty 2 of 5, useful, {minutes} minutes{more})"
    return [text(header), code(source, tags=("exercise",), exercise=f"1{letter}", kind=kind)]


TABLE = """# Lecture 01 · A sample

| section | core minutes | more minutes |
|---|---|---|
| 1.1, exercises 1A to 1D | 60 | 0 |
| 1.2, exercise 1E | 15 | |
| Going further, exercise 1F | | 30 |
| **together** | **75** | **30** |"""

TWO = "; if you do only two"
SOUND = [
    text(TABLE),
    code("import numpy as np\n\nq = np.ones(3)"),
    text("## 1.1 The problem\n\nAs lecture 02 shows in section 1.2.\n\n*Predict.* How large?"),
    code("plt.plot(q)\nplt.title('It grows')", picture(), prints("loss 1.71 (below 2: True)")),
    text("### A question without a number is a heading of level four"[4:]),
    code("plotting.flow({}, [], title='Queries meet keys')", picture(), tags=("first-attention",)),
    code("def attention_numpy(q):\n    return np.exp(q)", tags=("export",)),
    *exercise("A", "numpy", "def f(x):\n    raise NotImplementedError", more=TWO),
    code('f = check("1A", f)', prints("1A f: not attempted yet")),
    *exercise("B", "module", "class Head(nn.Module):\n    pass", more=TWO),
    *exercise("C", "training", "def step(model):\n    pass"),
    *exercise("D", "bug", "def test_it(attention):\n    pass"),
    text("### 1.2 A kernel\n\nExercises 1A and 1B came before, and section 1.1."),
    *exercise("E", "kernel", 'K = """__global__ void f() {\n}"""'),
    text("## Going further"),
    text("### 1.3 More"),
    *exercise("F", "module", "class Other(nn.Module):\n    pass"),
    text("## Behind the scenes"),
    text("### Plumbing has no number"),
    code("x = 1\n" * 40, tags=("plumbing",)),
]


def view(cells, **header):
    lecture = SimpleNamespace(name="01_sample", header={"edition": 2, "module": "sample"} | header)
    made = [
        seen.Seen(i, kind, source, 10 * i, tags, data, out)
        for i, (kind, source, tags, data, out) in enumerate(cells, 1)
    ]
    return seen.View(lecture, made)


def broken(cells, **header):
    """The names of the limits that these cells break, and the sentences."""
    made = view(cells, **header)
    found = gates.problems(made, [made])
    return {name for name, _ in found}, [sentence for _, sentence in found]


def with_cells(*more, at=4):
    return SOUND[:at] + list(more) + SOUND[at:]


def replaced(old, new):
    """The sound lecture with `old` replaced in every source."""
    assert any(old in source for _, source, *_ in SOUND), old
    return [(kind, source.replace(old, new), *rest) for kind, source, *rest in SOUND]


def without(source):
    kept = [cell for cell in SOUND if source not in cell[1]]
    assert len(kept) < len(SOUND)
    return kept


READS = "def g():\n    return scale * 2"
BREAKS = {
    "cells": with_cells(*[code("x = 1", picture(), prints("1"), tags=()) for _ in range(110)][:0], *[text("A.")] * 100),
    "words": with_cells(text("word " * 4500), at=7),
    "code_lines": with_cells(*[code("x = 1\n" * 20)] * 31, at=7),
    "cell_lines": with_cells(code("x = 1\n" * 26), at=7),
    "cell_lines of a kernel": with_cells(code('K = """__global__\n' + "x;\n" * 50 + '"""'), at=7),
    "columns": with_cells(code("x = " + "1" * 85), at=7),
    "columns of a kernel": with_cells(code('K = """__global__ ' + "x" * 90 + '"""'), at=7),
    "figures": with_cells(*[text("A.")] * 10, at=7),
    "first_output": with_cells(text("word " * 251), at=1),
    "first_output for its code": with_cells(code("x = 1\n" * 25), at=1),
    "first_output of a lecture that was not built": [(*cell[:4], []) for cell in SOUND],
    "first_experiment": with_cells(*[text("A.")] * 7, at=1),
    "first_attention": with_cells(*[text("A.")] * 35, at=5),
    "first_attention after much code": with_cells(*[code("x = 1\n" * 25)] * 3, at=4),
    "first_attention without its tag": without("plotting.flow"),
    "flow": replaced("plotting.flow", "plotting.curves"),
    "flow of a second mechanism": with_cells(code("def paged_numpy(q):\n    pass", tags=("export",)), at=7),
    "verdicts": with_cells(code("1", prints("agrees to 1e-6: True")), at=7),
    "line_width": with_cells(code("1", prints("a" * 96)), at=7),
    "titles": replaced("plt.title('It grows')", "plt.grid()"),
    "titles of a view": with_cells(code("plotting.head_viewer(w, tokens, 'All heads.')", picture(), prints("1")), at=7),
    "titles of one of two views": with_cells(
        code("plotting.head_viewer(w, t, 'All.', title='It looks back')\nplotting.bertviz_head_view(w, t, 'All.')"),
        at=7,
    ),
    "predictions with text under them": replaced("*Predict.* How large?", "*Predict.* How large?\n\nTwice as large."),
    "predictions without an experiment": with_cells(text("Twice as large."), at=3),
    "headers without importance": replaced(", useful, 10 minutes)", ", 10 minutes)"),
    "headers by number": replaced("Exercise 1C", "Exercise 1.3"),
    "headers that mark one": replaced(
        "Exercise 1B: write it  (difficulty 2 of 5, useful, 10 minutes; if you do only two)",
        "Exercise 1B: write it  (difficulty 2 of 5, useful, 10 minutes)",
    ),
    "headers of too few exercises": without("Exercise 1F"),
    "kinds without a bug": [(*c[:3], {k: v for k, v in c[3].items() if v != "bug"}, c[4]) for c in SOUND],
    "kinds with one in PyTorch": [
        (*c[:3], c[3] | ({"kind": "numpy"} if c[3].get("kind") == "module" else {}), c[4]) for c in SOUND
    ],
    "kinds that are not what they say": replaced("class Head(nn.Module)", "class Head"),
    "numbered": replaced("### 1.2 A kernel", "### A kernel"),
    "numbered backwards": replaced("### 1.3 More", "### 1.1 More"),
    "numbered as another lecture": replaced("### 1.3 More", "### 2.3 More"),
    "dangling section": replaced("in section 1.2", "in sections 1.1 and 1.9"),
    "dangling section of another lecture": replaced("in section 1.2", "in section 2.1"),
    "dangling exercise": replaced("Exercises 1A and 1B", "Exercises 1A and 1K"),
    "dangling lecture": replaced("lecture 02", "lecture 14"),
    "dangling in a comment": with_cells(code("x = 1  # as in exercise 1Z"), at=7),
    "minutes of a column": replaced("| 1.2, exercise 1E | 15", "| 1.2, exercise 1E | 14"),
    "minutes of exercises": [c if "1D:" not in c[1] else text(c[1].replace("10 minutes", "40 minutes")) for c in SOUND],
    "minutes of a section that is not there": replaced("| 1.2, exercise 1E", "| 1.7, exercise 1E"),
    "minutes of an exercise that no row names": replaced("Going further, exercise 1F", "Going further"),
    "minutes of a part without a heading": replaced("| 1.2, exercise 1E", "| Part 1 · a kernel: 1.2, exercise 1E"),
    "minutes of a part that no row names": replaced("### 1.2 A kernel", "## Part 1 · A kernel\n\n### 1.2 A kernel"),
    "minutes without a table": replaced("minutes |", "time |"),
    "core_minutes": [
        text(TABLE.replace("| 15 | |", "| 121 | |").replace("**75**", "**181**")) if c[1] == TABLE else c for c in SOUND
    ],
    "core_minutes of an essential exercise": replaced(
        "Exercise 1F: write it  (difficulty 2 of 5, useful", "Exercise 1F: write it  (difficulty 2 of 5, essential"
    ),
    "traps": with_cells(*[text(f"**Trap.** Number {n}.") for n in range(6)], at=7),
    "names": with_cells(code("scale = 1"), code(READS), code("scale = 2"), at=7),
}


def test_a_sound_lecture_keeps_every_limit():
    assert broken(SOUND) == (set(), [])


@pytest.mark.parametrize("name", BREAKS)
def test_a_limit_notices(name):
    limit = name.split()[0]
    found, sentences = broken(BREAKS[name])
    assert limit in found
    assert all("\n" not in sentence for sentence in sentences)


def test_every_limit_is_shown_to_bite():
    assert {name.split()[0] for name in BREAKS} == set(gates.GATES)


def test_what_is_folded_or_further_is_not_counted():
    more = [code("x = 1\n" * 20, tags=("plumbing",))] * 200
    assert broken(SOUND + more)[0] == set()
    assert len(view(SOUND).core) == next(i for i, cell in enumerate(SOUND) if cell[1] == "## Going further")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("agrees to 1e-6: True", True),
        ("at most 4 words: more than 3 in 4 right:  True", True),
        ("below 0.83 on average: True", True),
        ("same tokens: True   same text: False", True),
        ("loss 1.71 (below 2: True)", False),
        ("right: 93 % (above 90 %: True)", False),
        ("wrong: 0 (none: True)", False),
        ("True and false friends", True),
        ("loss 1.71", False),
    ],
)
def test_a_verdict_alone_is_told_from_a_number_with_its_threshold(line, expected):
    assert seen.is_nothing_but_a_verdict(line) == expected


# ---- Names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "later",
    [
        "scale = 2",
        "for scale in range(3):\n    pass",
        "scale, other = 1, 2",
        "def scale():\n    pass",
        "with open('x') as scale:\n    pass",
        "from math import tau as scale",
        "scale += 1",
    ],
)
@pytest.mark.parametrize(
    "reader",
    [
        READS,
        "g = lambda x: x * scale",
        "class A:\n    def f(self):\n        return [scale for _ in range(3)]",
        "def g():\n    def h():\n        return scale\n    return h",
    ],
)
def test_a_name_that_a_function_reads_may_not_change_its_meaning(reader, later):
    assert names.rebound(["scale = 1", reader, later]) == [(1, "scale", 2)]


@pytest.mark.parametrize(
    "cells",
    [
        ["scale = 1", READS],
        ["scale = 1", READS, "scale = 1"],
        ["scale = 1", "def g(scale):\n    return scale", "scale = 2"],
        ["scale = 1", "y = [scale * i for i in range(3)]", "scale = 2"],
        ["scale = 1", READS, "y = [scale for scale in range(3)]"],
        ["scale = [1]", READS, "scale[0] = 2"],
        ["import numpy as np", "def g():\n    return np.ones(3)", "import numpy as np"],
        ["def f():\n    pass", "def g():\n    return f()", 'f = check("1A", f)'],
        ["scale = 1", "scale = 2", READS],
        ["%matplotlib inline", READS],
        ["def g():\n    return len([])", "x = len"],
    ],
)
def test_what_is_no_new_meaning_is_left_alone(cells):
    assert names.rebound(cells) == []


# ---- Exceptions, drafts, the table --------------------------------------------------------------------------------


def test_an_exception_needs_a_reason_a_limit_that_exists_and_a_limit_that_is_broken():
    wide = BREAKS["columns"]
    assert broken(wide, exceptions={"columns": "a table of constants"})[0] == set()
    assert "needs a reason" in broken(wide, exceptions={"columns": ""})[1][0]
    assert "is no limit" in broken(SOUND, exceptions={"column": "a table of constants"})[1][0]
    assert "no exception is needed" in broken(SOUND, exceptions={"columns": "a table of constants"})[1][0]


def course(folder, edition):
    (folder / "solutions").mkdir()
    text = SAMPLE.read_text(encoding="utf-8")
    text = text.replace("    module: sample", f"    edition: {edition}\n#     module: sample")
    (folder / "solutions" / "01_sample.py").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(("edition", "status"), [(1, 0), (2, 1)])
def test_limits_bind_all_but_drafts_and_every_lecture_is_in_the_table(tmp_path, capsys, edition, status):
    course(tmp_path, edition)
    assert gates.main([], root=tmp_path) == status
    head, _, row, *rest = capsys.readouterr().out.splitlines()
    assert "words" in head and row.split("|")[1:3] == ["      01 ", f"       {edition} "]
    assert bool(rest) == (edition == 2) and all(line.startswith("FAILED lecture 01, ") for line in rest)
    gates.main(["01"], root=tmp_path)
    assert len(capsys.readouterr().out.splitlines()) > 10


@pytest.mark.parametrize(("edition", "status"), [(1, 0), (2, 1)])
def test_the_build_prints_the_table_and_fails_for_a_lecture_over_its_limits(
    tmp_path, monkeypatch, capsys, edition, status
):
    monkeypatch.setattr(build, "execute", lambda *_: None)
    (course(tmp_path, edition) / "attention").mkdir()
    assert build.main([], root=tmp_path) == status
    printed = capsys.readouterr().out
    assert "| limits broken |" in printed
    assert ("FAILED lecture 01, headers: " in printed) == (edition == 2)


def test_outputs_are_taken_from_the_kept_notebook_where_the_cell_is_the_same(tmp_path):
    lecture = lecture_source.read(SAMPLE)
    kept = lecture_source.drafts(lecture)["lectures"][0]
    for cell in kept.cells:
        if cell.cell_type == "code":
            cell.outputs = [prints("1")]
    kept.cells[-1].id = "changed"
    nbformat.write(kept, tmp_path / "kept.ipynb")
    cells = seen.view(lecture, tmp_path / "kept.ipynb").code
    assert [bool(cell.outputs) for cell in cells] == [True] * (len(cells) - 1) + [False]


# ---- The lectures -------------------------------------------------------------------------------------------------


def test_every_lecture_keeps_the_limits():
    lines, sound = gates.report()
    assert sound, "\n".join(lines)


@pytest.mark.parametrize("path", sorted((ROOT / "lectures").glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_answer_stands_under_a_prediction_in_a_learner_s_copy(path):
    made = notebooks.without_outputs(notebooks.read(path.read_bytes()))
    code = [cell for cell in made["cells"] if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
