"""Make both notebooks and the module of each lecture from its source: python -m utils.build [NN ...] [--force].

From solutions/NN_topic.py come solutions/NN_topic.ipynb (executed), lectures/NN_topic.ipynb (solutions cut out,
executed) and attention/<module>.py. The modules come first and need no execution: notebooks and checks import them.
A notebook is executed again only if its source, or code or data of the course that it depends on, has changed.
"""

import argparse
import ast
import concurrent.futures
import dataclasses
import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError, DeadKernelError

from utils import lecture_source, notebook_outputs, notebook_usage

ROOT = Path(__file__).resolve().parent.parent
CELL_LIMIT = 180  # seconds; the budget is 60 on a free machine
VERSION = 1  # raise it when a change in this file changes what a notebook's outputs look like

def environment():
    """Return the environment in which every notebook runs, here and under nbval."""
    (ROOT / "build").mkdir(exist_ok=True)
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONHASHSEED": "0",  # sets in the same order every time
        "IPYTHONDIR": str(ROOT / "build" / "ipython"),  # and not the user's, with their settings and start-up files
    }


class BuildError(Exception):
    """A notebook that did not run as it must; `args` are sentences with their places in the source."""


@dataclasses.dataclass
class Job:
    """One notebook to bring up to date."""

    lecture: lecture_source.Lecture
    target: Path
    notebook: nbformat.NotebookNode
    lines: list[int]  # of each cell, in the source


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

    failed, jobs = False, []
    for number in arguments.numbers or sources:
        try:
            jobs += prepare(sources[number], root)
        except lecture_source.SourceError as error:
            failed = True
            print(f"FAILED  {error}", flush=True)
    room = psutil.virtual_memory().available // (notebook_usage.MEGABYTES * 10**6)
    with concurrent.futures.ThreadPoolExecutor(max(1, min(os.cpu_count() or 1, room))) as pool:
        running = {pool.submit(bring_up_to_date, job, root, arguments.force): job for job in jobs}
        try:
            for done in concurrent.futures.as_completed(running):
                failed |= not _report(done, running[done].target.relative_to(root).as_posix())
        except KeyboardInterrupt:
            print("build: stopped; the notebooks that were running are left as they were", flush=True)
            os._exit(130)  # without waiting for their kernels, which end with this process
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


def prepare(source, root):
    """Read one source, write its module, and return a Job for each of its two notebooks."""
    lecture = lecture_source.read(source)
    drafts = lecture_source.drafts(lecture)
    module = root / "attention" / f"{lecture.module}.py"
    text = lecture_source.module_text(lecture)
    if not module.exists() or module.read_text(encoding="utf-8") != text:
        _write(module, text)
        print(f"attention/{module.name}: written", flush=True)
    return [Job(lecture, root / folder / f"{lecture.name}.ipynb", notebook, lines)
            for folder, (notebook, lines) in drafts.items()]


def bring_up_to_date(job, root, force):
    """Execute and write one notebook unless it is up to date. Return what was done, in words."""
    job.notebook.metadata["build"] = {"inputs": inputs_hash(job.lecture, root)}  # jupytext keeps it out of the source
    if not force and is_current(job.target, job.notebook):
        return "unchanged"
    started = time.monotonic()
    execute(job)
    for line in lecture_source.leaks(job.lecture, job.notebook) if job.target.parent.name == "lectures" else ():
        raise lecture_source.SourceError(job.lecture.path, 1, f"the lecture prints a solution, {line}")
    _write(job.target, nbformat.writes(job.notebook) + "\n")
    return f"executed in {time.monotonic() - started:.0f} s, {job.target.stat().st_size / 1e3:.0f} kB"


def _write(path, text):
    """Write a file whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- Execution ----------------------------------------------------------------------------------------------------

def execute(job):
    """Run the job's notebook in its folder and fill in its outputs.

    A cell that raises does not stop the run, so that one run finds them all. Raises BuildError with a sentence for
    each of the first five cells that raised or that show what cannot be kept.
    """
    reached = []
    client = NotebookClient(
        job.notebook,
        timeout=CELL_LIMIT,
        kernel_name="python3",
        resources={"metadata": {"path": str(job.target.parent)}},
        record_timing=False,
        allow_errors=True,
        on_cell_start=lambda cell, cell_index: reached.append(cell_index),
    )
    job.target.parent.mkdir(exist_ok=True)
    language = job.notebook.metadata.language_info
    problems, fatal = [], []
    try:
        client.execute(env=environment(), stderr=subprocess.DEVNULL)  # IPython's remarks on its start
    except CellTimeoutError:
        fatal.append(_located(job, reached[-1], f"still running after {CELL_LIMIT} s"))
    except DeadKernelError:
        fatal.append(_located(job, reached[-1], "the kernel died"))
    job.notebook.metadata["language_info"] = language  # the kernel's own names the Python version
    for index, cell in enumerate(job.notebook.cells):
        if cell.cell_type != "code":
            continue
        cell.outputs = [nbformat.from_dict(output) for output in notebook_outputs.clean(cell.outputs)]
        for output in cell.outputs:
            if output.output_type == "error":
                message = f"{output.ename}: {output.evalue}".rstrip(": ")
                problems.append(_located(job, index, message, _line_in_cell(output.traceback)))
            elif reason := notebook_outputs.unfit(output):
                problems.append(_located(job, index, reason))
    if problems or fatal:
        raise BuildError(*(problems + fatal)[:5])


def _located(job, index, what, line=1):
    """Return `what` preceded by its place in the source and followed by the line that stands there."""
    cell = job.notebook.cells[index]
    code = [other.id for other in job.notebook.cells if other.cell_type == "code"].index(cell.id) + 1
    shown = cell.source.splitlines()[min(line, len(cell.source.splitlines())) - 1]
    place = job.lines[index] + line - 1
    return f"code cell {code}, solutions/{job.lecture.path.name} line {place}: {what}\n    {shown.strip()}"


def _line_in_cell(traceback):
    """Return the line of the cell at which its error was raised."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(traceback))
    lines = re.findall(r"Cell In\[\d+\], line (\d+)", plain)
    # Frames of earlier cells may follow the failing one's: the first frame is the cell that ran.
    return int(lines[0]) if lines else 1


# ---- What decides the outcome -------------------------------------------------------------------------------------

def is_current(path, draft):
    """Whether the notebook at `path` has been made from these very cells and inputs."""
    try:
        built = nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.reader.NotJSONError):
        return False
    return built.metadata == draft.metadata and sources(built) == sources(draft)


def sources(notebook):
    """Return what of a notebook comes from its source: all but outputs and execution counts."""
    return [(cell.id, cell.cell_type, cell.source, cell.metadata) for cell in notebook.cells]


def inputs_hash(lecture, root):
    """Return a hash of all that decides a lecture's outputs: its source, the course's code and data it uses, pins."""
    files = {lecture.path, root / "requirements.txt", root / "constraints.txt",
             root / "attention" / f"{lecture.module}.py",
             root / "utils" / "checks" / f"lecture_{lecture.name[:2]}.py"}
    files |= {path for folder in ("attention", "utils") for path in (root / folder).rglob("*.*")
              if path.suffix in {".h", ".cpp", ".cu", ".js"}}
    files |= {path for path in (root / "data").rglob("*.*") if path.suffix != ".pyc" and not path.name.startswith(".")}
    pending = [path for path in files if path.suffix == ".py" and path.exists()]
    while pending:
        path = pending.pop()
        new = _imported(path, root) - files
        files |= new
        pending += new
    total = hashlib.sha256(str(VERSION).encode())
    for path in sorted(path for path in files if path.is_file()):
        total.update(path.relative_to(root).as_posix().encode() + b"\0")
        total.update(path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return total.hexdigest()[:16]


def _imported(path, root):
    """Return the course's own modules that a Python file imports."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError:  # reported when the cell or the module is run
        return set()
    names, package = set(), path.relative_to(root).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[:len(package) + 1 - node.level]) if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    found = set()
    for parts in (name.split(".") for name in names):
        for end in range(1, len(parts) + 1):
            place = root.joinpath(*parts[:end])
            found |= {file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()}
    return found


if __name__ == "__main__":
    sys.exit(main())
