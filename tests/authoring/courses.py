"""Small courses to build: laid out in a folder, from the sample lecture or from a few cells."""

import re

import nbformat

from utils.paths import ROOT

SAMPLE = ROOT / "tests" / "authoring" / "samples" / "01_sample.py"
HEADER = re.sub(r"#     public:\n(#     - .*\n)*", "", SAMPLE.read_text(encoding="utf-8").split("# %%")[0])


def new_course(folder, source):
    """Lay out a course with one lecture in `folder`; return the path of its source."""
    (folder / "attention").mkdir()
    (folder / "solutions").mkdir()
    path = folder / "solutions" / "01_sample.py"
    path.write_text(source, encoding="utf-8")
    return path


def small(*cells):
    """Return the source of a lecture with a title and code cells."""
    return HEADER + "# %% [markdown]\n# # A small lecture\n" + "".join(f"\n# %%\n{cell}\n" for cell in cells)


def files(folder):
    """Return {path: bytes} of all files of a course but those in build/."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {name: content for name, content in found.items() if not name.startswith("build/")}


def notebook(course, folder):
    return nbformat.read(course / folder / "01_sample.ipynb", as_version=4)
