"""Right answers in other styles, through the whole notebook: python -m tests.lectures.through [NN ...] [--style K] [--avx2].

Each exercise of solutions/NN_topic.ipynb gets the K-th right answer of tests/lectures/lecture_NN/answers.py in place of
the course's own (the first where it has fewer), and the notebook is run from start to end. Printed is what then differs
from the kept outputs: a cell that raises, a check that fails, another number. Times, and the bytes that a kernel asks
for, may differ; the status says only whether a cell raised. --avx2: as on a processor that has AVX2 and no more, with two
threads, where sums are rounded otherwise. It takes as long as the notebook, so it is no part of the test suite.
"""

import argparse
import copy
import importlib
import os
import re
import sys

import nbformat

from utils.authoring import outputs
from utils.authoring.execute import BuildError, execute
from utils.judge.exercise import exercises
from utils.paths import ROOT

AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
}
ANSWERS = """import importlib

{name} = importlib.import_module("{module}").RIGHT["{number}"][{style}]"""
"""What stands in an exercise's cell instead of an answer."""


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.lectures.through", description=__doc__.split("\n")[0])
    parser.add_argument("numbers", nargs="*", metavar="NN", help="lectures, as 01 06; all if none is given")
    parser.add_argument("--style", type=int, default=0, metavar="K", help="which right answer, from 0 (default 0)")
    parser.add_argument("--avx2", action="store_true", help="as on a processor without AVX-512, with two threads")
    arguments = parser.parse_args(argv)
    if arguments.avx2:
        os.environ.update(AVX2)
    paths = sorted((ROOT / "solutions").glob("[0-9][0-9]_*.ipynb"))
    threads = 2 if arguments.avx2 else 1
    raised = [
        go(path, arguments.style, threads) for path in paths if path.name[:2] in (arguments.numbers or path.name[:2])
    ]
    return int(any(raised))


def go(path, style, threads):
    """Run one notebook with other answers, print what differs, and return whether a cell raised."""
    kept = nbformat.read(path, as_version=4)
    notebook, replaced = with_other_answers(path.name[:2], kept, style)
    print(f"{path.name}, style {style}: {', '.join(replaced)}", flush=True)
    try:
        execute(notebook, path.parent, lambda index, line=1: (f"cell {index + 1}, line {line}", ""), threads)
    except BuildError as error:  # a warning too, which is no failure here
        print(*(f"  {what}" for what in error.args), sep="\n", flush=True)
    for index, (old, new) in enumerate(zip(kept.cells, notebook.cells)):
        if old.cell_type == "code" and "nbval-ignore-output" not in old.metadata.get("tags", ()):
            printed = [output for output in new.outputs if output.get("name") != "stderr"]
            for said in outputs.differences(old.outputs, printed, old.metadata.get("approx")):
                print(f"  cell {index + 1}: {said}", flush=True)
    return any(output.output_type == "error" for cell in notebook.cells for output in cell.get("outputs", ()))


def with_other_answers(lecture, kept, style):
    """A copy of a solution notebook whose exercises hold other right answers, and the numbers of those exercises."""
    module, notebook, replaced = f"tests.lectures.lecture_{lecture}.answers", copy.deepcopy(kept), []
    for exercise in exercises(lecture):
        right = importlib.import_module(module).RIGHT.get(exercise.number, [])
        cells = [c for c in notebook.cells if "exercise" in c.metadata.get("tags", ()) and defines(c, exercise.name)]
        if right and len(cells) == 1:
            which = style if style < len(right) else 0
            cells[0].source = ANSWERS.format(name=exercise.name, module=module, number=exercise.number, style=which)
            replaced.append(exercise.number)
    return notebook, replaced


def defines(cell, name):
    """Whether a cell binds a name at its outermost level."""
    return re.search(rf"^(?:def|class)\s+{name}\b|^{name}\s*=", cell.source, re.MULTILINE) is not None


if __name__ == "__main__":
    sys.exit(main())
