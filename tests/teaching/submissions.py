"""Kinds of notebooks that learners hand in, as {name: how it is made from the assignment of exercises 1A and 1B}."""

import copy
import json

from utils.authoring import source
from utils.paths import ROOT
from utils.teaching import trees

LECTURE = source.read(trees.lecture_path("01"))
SOLVED = {each.number: LECTURE.cells[each.cell].source for each in LECTURE.exercises}
SOLUTIONS = ROOT / "solutions" / "01_attention_fundamentals.py"
REFERENCE = ROOT / "attention" / "fundamentals.py"

UNSHIFTED = '''\
def softmax(x, axis=-1):
    """A softmax that overflows."""
    e = np.exp(x)
    return e / e.sum(axis=axis, keepdims=True)
'''
# A function that finds a text in some way and runs it: what cheats have in common.
STOLEN = """\
def softmax(x, axis=-1):
    import {modules}
    text = {text}
    room = {{}}
    exec(text, room)
    return room["softmax"](x, axis)
"""


def solved(notebook, *numbers, **texts):
    """A copy of an assignment's notebook in which exercises are solved, or hold the texts given (E1A="...")."""
    made = copy.deepcopy(notebook)
    for cell in made["cells"]:
        number = cell["metadata"].get("exercise")
        if number in numbers:
            cell["source"] = SOLVED[number]
        elif number and f"E{number}" in texts:
            cell["source"] = texts[f"E{number}"]
    return made


def code(text):
    return {"cell_type": "code", "id": "own", "metadata": {}, "source": text, "outputs": [], "execution_count": None}


def softmax(body):
    """A softmax with this body; exercise 1B is solved beside it."""
    return lambda notebook: solved(notebook, "1B", E1A=f"def softmax(x, axis=-1):\n    {body}\n")


def stolen(text, modules="os"):
    return lambda notebook: solved(notebook, "1B", E1A=STOLEN.format(text=text, modules=modules))


def right(notebook):
    return solved(notebook, "1A", "1B")


def with_cell(text, at=2):
    """The right notebook with one more cell."""

    def make(notebook):
        made = right(notebook)
        made["cells"].insert(at, code(text))
        return made

    return make


def renamed_cells(notebook):
    """Ids, tags and the exercises' numbers are gone, and the cells stand in another order."""
    made = right(notebook)
    for index, cell in enumerate(made["cells"]):
        cell["id"], cell["metadata"] = f"cell-{index}", {"name": "mine"}
    made["cells"].reverse()
    return made


def edited_check(notebook):
    """The checks are replaced by praise, for an answer that is wrong."""
    made = solved(notebook, "1B", E1A="def softmax(x, axis=-1):\n    return x\n")
    for cell in made["cells"]:
        if "check(" in cell["source"] and "def " not in cell["source"]:
            cell["source"] = "def check(number, answer):\n    print('7 of 7 properties hold.')\n    return answer"
    return made


def helper_elsewhere(notebook):
    made = solved(notebook, "1B", E1A="def softmax(x, axis=-1):\n    return mine(x, axis)\n")
    made["cells"].append(code(SOLVED["1A"].replace("def softmax(", "def mine(")))
    return made


KINDS = {
    "right": right,
    "half_right": lambda notebook: solved(notebook, "1A"),
    "untouched": copy.deepcopy,
    "overflows": lambda notebook: solved(notebook, "1B", E1A=UNSHIFTED),
    "loops": softmax("while True: pass"),
    "ends_its_process": softmax("import os; os._exit(0)"),
    "crashes": softmax("import ctypes; ctypes.string_at(0)"),
    "takes_memory": softmax("big = [bytearray(2**28) for _ in range(40)]"),
    "starts_processes": softmax("import subprocess; subprocess.Popen(['sleep', '1000']); return x"),
    "kills_the_judge": softmax("import os; os.kill(os.getppid(), 9)"),
    "leaves_python_broken": softmax("import builtins; builtins.len = None; np.exp = None; return x"),
    "loops_elsewhere": with_cell("while True:\n    pass"),
    "trains_elsewhere": with_cell("import time\ntime.sleep(1000)"),
    "no_python_elsewhere": with_cell("this is no Python ("),
    "magics": with_cell("%matplotlib inline\n!ls\nimport math"),
    "renamed_cells": renamed_cells,
    "renamed_function": lambda notebook: solved(notebook, "1B", E1A=SOLVED["1A"].replace("softmax", "my_softmax")),
    "answer_is_no_python": lambda notebook: solved(notebook, "1B", E1A="def softmax(x, axis=-1)\n    return x"),
    "no_function": lambda notebook: solved(notebook, "1B", E1A="softmax = 3"),
    "edited_check": edited_check,
    "helper_elsewhere": helper_elsewhere,
    "no_cells": lambda notebook: {**notebook, "cells": []},
    "corrupt": lambda notebook: json.dumps(right(notebook))[:900],
    "empty_file": lambda notebook: "",
    "another_file": lambda notebook: '{"nbformat": 4, "cells": 3}',
    "deep": lambda notebook: "[" * 100_000,
    "markup": softmax("raise ValueError('<script>alert(1)</script>')"),
    "takes_the_oracle": softmax(
        "from utils.exercises.lecture_01.softmax import softmax as s; return s.oracle(x, axis)"
    ),
    "takes_the_reference": softmax("from attention.fundamentals import softmax as s; return s(x, axis)"),
    "reads_the_module": stolen("inspect.getsource(attention.fundamentals)", "inspect, attention.fundamentals"),
    "reads_the_solutions": stolen(f"open({str(SOLUTIONS)!r}).read()"),
    "reads_the_reference": stolen(f"open({str(REFERENCE)!r}).read()"),
    "reads_it_with_cat": stolen(f"subprocess.check_output(['cat', {str(REFERENCE)!r}], text=True)", "subprocess"),
    "reads_the_judge_s_memory": stolen("open(f'/proc/{os.getppid()}/mem', 'rb').read(8).decode() or ''"),
}
FULL = (
    "right",
    "loops_elsewhere",
    "trains_elsewhere",
    "no_python_elsewhere",
    "magics",
    "renamed_cells",
    "helper_elsewhere",
)
UNREADABLE = ("corrupt", "empty_file", "another_file", "deep")
CHEATS = tuple(kind for kind in KINDS if kind.startswith(("takes_the_", "reads_")))
