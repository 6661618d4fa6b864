"""Make both notebooks and the module of each lecture from its source: python -m utils.authoring.build [NN ...] [--force].

From solutions/NN_topic.py come solutions/NN_topic.ipynb (executed), lectures/NN_topic.ipynb (solutions cut out,
executed) and attention/<module>.py. The modules come first and need no execution: notebooks and checks import them.
A notebook is executed again only if its code cells, or code or data of the course that they depend on, have changed;
changed text and tags are written into it as they are. At the end stands a table of every lecture's size, against the
limits of utils/authoring/gates.py.
"""

import argparse
import concurrent.futures
import dataclasses
import os
import sys
import time
from pathlib import Path

import nbformat
import psutil

from utils.authoring import gates, module, stale
from utils.authoring import source as lecture_source
from utils.authoring import usage as notebook_usage
from utils.authoring.execute import BuildError, execute
from utils.paths import ROOT


@dataclasses.dataclass
class Job:
    """One notebook to bring up to date."""

    lecture: lecture_source.Lecture
    target: Path
    notebook: nbformat.NotebookNode
    lines: list[int]  # of each cell, in the source

    def place(self, index, line=1):
        """Return a line of a cell in words and as it stands."""
        return lecture_source.place(self.lecture.path, self.notebook, index, self.lines[index], line)


def main(argv=None, root=ROOT):
    """Build the lectures whose numbers are given, or all; print a line for each notebook. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python course.py build", description=__doc__.split("\n")[0])
    parser.add_argument("numbers", nargs="*", metavar="NN", help="lectures to build, as 01 06; all if none is given")
    parser.add_argument("--force", action="store_true", help="execute unchanged notebooks too")
    arguments = parser.parse_args(argv)
    sources = {path.name[:2]: path for path in sorted((root / "solutions").glob("[0-9][0-9]_*.py"))}
    unknown = [number for number in arguments.numbers if number not in sources]
    if unknown:
        print(f"build: no lecture {', '.join(unknown)} in solutions/; there are: {', '.join(sources) or 'none'}")
        return 2

    failed, lectures = False, {}
    for number, path in sources.items():
        try:
            lectures[number] = write_modules(path, root)
        except lecture_source.SourceError as error:
            failed = True
            print(f"FAILED  {error}", flush=True)
    if not failed:
        write_if_changed(root / "attention" / "__init__.py", module.face(lectures.values()), root)
    jobs = [job for number in arguments.numbers or sources for job in jobs_of(lectures.get(number), root)]
    room = psutil.virtual_memory().available // (notebook_usage.MEGABYTES * 10**6)
    with concurrent.futures.ThreadPoolExecutor(max(1, min(os.cpu_count() or 1, room))) as pool:
        running = {pool.submit(bring_up_to_date, job, root, arguments.force): job for job in jobs}
        try:
            for done in concurrent.futures.as_completed(running):
                failed |= not _report(done, running[done].target.relative_to(root).as_posix())
        except KeyboardInterrupt:
            print("build: stopped; the notebooks that were running are left as they were", flush=True)
            os._exit(130)  # without waiting for their kernels, which end with this process
    if not failed:
        lines, sound = gates.report(root=root)
        print("\n".join(lines), flush=True)
        failed = not sound
    return int(failed)


def _report(done, name):
    """Print what became of one notebook. Return whether it was built."""
    try:
        print(f"{name}: {done.result()}", flush=True)
    except (BuildError, lecture_source.SourceError) as error:
        for problem in error.args:
            print(f"FAILED  {name}: {problem}", flush=True)
        return False
    return True


def write_modules(source, root):
    """Read one source, check that its notebooks can be made, and write its modules. Return the lecture."""
    lecture = lecture_source.read(source)
    lecture_source.drafts(lecture)
    for name, text in module.texts(lecture).items():
        write_if_changed(root / "attention" / name, text, root)
    return lecture


def write_if_changed(path, text, root):
    """Write a generated file, and say so, unless it holds this text already."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        _write(path, text)
        print(f"{path.relative_to(root).as_posix()}: written", flush=True)


def jobs_of(lecture, root):
    """Return a Job for each of the two notebooks of a lecture; none for None."""
    return [
        Job(lecture, root / folder / f"{lecture.name}.ipynb", notebook, lines)
        for folder, (notebook, lines) in (lecture_source.drafts(lecture) if lecture else {}).items()
    ]


def bring_up_to_date(job, root, force):
    """Execute and write one notebook unless it is up to date. Return what was done, in words."""
    kept, started = _read(job.target), time.monotonic()
    same = code(kept) == code(job.notebook) and stale.is_current(job.target, job.lecture, root)
    if same and not force:
        for cell, old in zip(code_cells(job.notebook), code_cells(kept)):
            cell.outputs, cell.execution_count = old.outputs, old.execution_count
    else:
        execute(job.notebook, job.target.parent, job.place)
    for line in lecture_source.leaks(job.lecture, job.notebook) if job.target.parent.name == "lectures" else ():
        raise lecture_source.SourceError(job.lecture.path, 1, f"the lecture prints a solution, {line}")
    said = "unchanged"
    if not same or force or kept != job.notebook:
        _write(job.target, nbformat.writes(job.notebook) + "\n")
        done = "text and tags written" if same and not force else f"executed in {time.monotonic() - started:.0f} s"
        said = f"{done}, {job.target.stat().st_size / 1e3:.0f} kB"
    stale.note(job.target, job.lecture, root)
    return said


def code_cells(notebook):
    """Return the code cells of a notebook."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code(notebook):
    """Return what of a notebook decides its outputs: the code in it, in order."""
    return [cell.source for cell in code_cells(notebook)]


def sources(notebook):
    """Return what of a notebook comes from its source: all but outputs and execution counts."""
    return [(cell.id, cell.cell_type, cell.source, cell.metadata) for cell in notebook.cells]


def _write(path, text):
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path):
    try:
        return nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.reader.NotJSONError):
        return nbformat.v4.new_notebook()


if __name__ == "__main__":
    sys.exit(main())
