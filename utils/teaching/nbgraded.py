"""An assignment as a source notebook for nbgrader, in a course folder of nbgrader's with a configuration.

A cell of an exercise is nbgrader's solution cell and holds the course's stub. The cell after it earns the points: what
it runs is hidden from learners, draws other random inputs than their check, and raises. All other code is locked.
"""

import nbformat

from utils.paths import ROOT

CONFIG = "nbgrader_config.py"
CONFIG_TEXT = '''\
"""nbgrader for the course in {root}, which is only read."""

import os
import sys

os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [{root!r}, os.environ.get("PYTHONPATH")]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

c = get_config()  # noqa: F821
c.ClearSolutions.enabled = False  # the source has the course's own stubs, in Python and in CUDA C++, and no solution
c.OverwriteCells.add_missing_cells = True  # a deleted cell earns what its answer earns
c.Execute.timeout = 90  # seconds for a cell; a check ends an answer after 10 s of processor time, 60 on the clock
'''
POINTS = """\
# The points of {number}: when this is marked, your {name} is tried with other random inputs than in the check below.
### BEGIN HIDDEN TESTS
from utils.judge.strict import require

require("{number}", {name}, seed={seed})
### END HIDDEN TESTS
"""


def notebook(plain, manifest):
    """The source notebook, from an assignment's plain one and its manifest."""
    tasks, cells = {each["number"]: each for each in manifest["exercises"]}, []
    for index, cell in enumerate(plain.cells):
        number = cell.metadata.get("exercise")
        if cell.cell_type == "code":
            cell.metadata.nbgrader = about(f"exercise-{number}" if number else f"given-{index}", solution=bool(number))
        cells.append(cell)
        if number:
            text = POINTS.format(**tasks[number], seed=manifest["seed"]).rstrip()
            earns = about(f"points-{number}", grade=True) | {"points": tasks[number]["points"]}
            cells.append(nbformat.v4.new_code_cell(text, id=f"points-{number}", metadata={"nbgrader": earns}))
    return nbformat.v4.new_notebook(cells=cells, metadata=plain.metadata)


def about(name, solution=False, grade=False):
    """nbgrader's metadata of a cell, in its third schema. What is no solution is locked."""
    kinds = {"solution": solution, "grade": grade, "locked": not solution, "task": False}
    return {"schema_version": 3, "grade_id": name, **kinds}


def write(plain, manifest, folder):
    """Write the source notebook, and the configuration where there is none, to nbgrader's course in `folder`."""
    place = folder / "source" / manifest["lecture"]
    place.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook(plain, manifest), place / manifest["notebook"])
    if not (folder / CONFIG).exists():
        (folder / CONFIG).write_text(CONFIG_TEXT.format(root=str(ROOT)), encoding="utf-8")
