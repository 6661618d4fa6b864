"""The first code cell of a lecture finds the course's own modules, wherever it is run and whatever lies around it."""

import os
import subprocess
import sys

import pytest

from utils.authoring import source as lecture_source
from utils.paths import ROOT

SOURCES = sorted((ROOT / "solutions").glob("[0-9][0-9]_*.py"))
PATH_LINE = 'sys.path.insert(0, "." if os.path.exists("course.py") else "..")'


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_lecture_begins_with_the_line_that_finds_the_course(source):
    first = next(cell for cell in lecture_source.read(source).cells if cell.kind == "code")
    before, found, _ = first.source.partition(PATH_LINE)
    assert found and "import os" in before and "import sys" in before and "utils" not in before


@pytest.mark.parametrize("folder", ["", "lectures", "solutions", "workbook"])
def test_a_package_utils_beside_or_above_the_course_is_not_taken_for_the_course_s(tmp_path, folder):
    for place, name in (("", "the neighbour's"), ("elsewhere", "the neighbour's"), ("course", "the course's own")):
        (tmp_path / place / "utils").mkdir(parents=True)
        (tmp_path / place / "utils" / "__init__.py").write_text(f'whose = "{name}"\n')
    (tmp_path / "course" / "course.py").touch()
    (tmp_path / "course" / folder).mkdir(exist_ok=True)
    # As a kernel does: the notebook's folder first, then PYTHONPATH.
    program = f"import os, sys\nsys.path.insert(0, '')\n{PATH_LINE}\nimport utils\nprint(utils.whose)"
    env = dict(os.environ, PYTHONPATH=str(tmp_path / "elsewhere"))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "course" / folder, env=env, capture_output=True, text=True
    )
    assert done.stdout == "the course's own\n", done.stderr
