"""nbval, with what it lacks: notebooks as pytest items that are compared, located and measured as the course needs it.

nbval 0.11.0 collects notebooks and runs their cells well enough to stay: it is what many people use in CI. What is
replaced here, and why:

- it compares text to the letter and pictures not at all: `Cell.compare_outputs` is utils/authoring/outputs.py;
- it ignores a trailing `;`, starts kernels with the user's settings and lets several of them lock one history file:
  `Kernel` starts them as the build does;
- it gives up after seconds on the wall, which a busy machine does not keep to: `Kernel` waits, and cells are stopped
  by their processor time;
- it calls a cell "Cell 63" and colours its reports: a `Cell` is named by its prompt and its line in the source, with
  the section in the report, and all is plain text;
- after the death of a kernel it fails once for each later cell: they are skipped;
- it knows no budget: each notebook ends with one more item, `Budget`.

nbval offers none of this for others to use; tests/authoring/test_nbval_bites.py proves that each replacement works.
"""

import queue
import subprocess

import nbformat
import pytest
from nbval import kernel, plugin

from utils.authoring import outputs as notebook_outputs
from utils.authoring import source as lecture_source
from utils.authoring import stale
from utils.authoring import usage as notebook_usage
from utils.authoring.execute import environment, lacks_language_model, line_in_cell

OVER = 2  # a notebook fails beyond this multiple of its budget: processors differ


@pytest.hookimpl(wrapper=True)
def pytest_collect_file():
    """Take over the notebooks that nbval has found."""
    found = yield
    return [
        Notebook.from_parent(node.parent, path=node.path) if isinstance(node, plugin.IPyNbFile) else node
        for node in found
    ]


class Kernel(kernel.RunningKernel):
    """A kernel started as in the build, whose answers are waited for."""

    def __init__(self, folder):
        self.km, self.kc = kernel.start_new_kernel(
            startup_timeout=notebook_usage.PATIENCE,
            kernel_name=kernel.CURRENT_ENV_KERNEL_NAME,
            stderr=subprocess.DEVNULL,
            cwd=str(folder),
            env=environment(),
            extra_arguments=["--HistoryManager.hist_file=:memory:"],
        )
        self._ensure_iopub_up()

    def await_reply(self, msg_id, timeout=None):
        """Wait for the end of a cell as long as the kernel lives; raises RuntimeError when it has died."""
        for _ in range(notebook_usage.PATIENCE):
            try:
                return super().await_reply(msg_id, timeout=1)
            except queue.Empty:
                if not self.is_alive():
                    raise RuntimeError("the kernel died") from None
        raise queue.Empty

    def execute_cell_input(self, cell_input, allow_stdin=None):
        # IPython heeds a trailing `;` only in cells that go into its history.
        return self.kc.execute(cell_input, store_history=True, allow_stdin=allow_stdin, stop_on_error=False)


class Notebook(plugin.IPyNbFile):
    """A notebook: an item for each code cell, and one for the budget."""

    usage = None
    dead = ""  # the item in which the kernel died
    passed = 0  # cells

    def collect(self):
        self.read = nbformat.read(self.path, as_version=4)
        self.lecture, self.lines = source_of(self.path)
        budget = Budget.from_parent(self, name="budget")
        if self.config.option.skip_passed and self.lecture and stale.needs_no_test(self.path, self.lecture, self.root):
            budget.add_marker(
                pytest.mark.skip("it passed here or is as committed, and nothing that decides its outputs has changed")
            )
            yield budget
            return
        for cell in super().collect():
            line = self.lines.get(cell.cell.id)
            name = f"In [{cell.cell_num + 1}]" + (f", line {line}" if line else "")
            yield Cell.from_parent(self, name=name, cell_num=cell.cell_num, cell=cell.cell, options=cell.options)
        yield budget

    def index(self, cell):
        """Return the place of a code cell among all cells."""
        return [other.id for other in self.read.cells].index(cell.id)

    def setup(self):
        self.kernel = Kernel(self.path.parent)
        self.usage = notebook_usage.Usage(self.kernel.km.provisioner.pid)

    def teardown(self):
        if self.usage:
            self.usage.stop()
        super().teardown()

    @property
    def root(self):
        return self.config.rootpath

    @property
    def relative(self):
        return self.path.relative_to(self.root).as_posix()


def source_of(path):
    """Return the lecture that a notebook is made from and {cell id: its first line in that source}; None, {} for none."""
    source = path.parent.parent / "solutions" / f"{path.stem}.py"
    try:
        lecture = lecture_source.read(source)
        notebook, lines = lecture_source.drafts(lecture)[path.parent.name]
    except (OSError, KeyError, lecture_source.SourceError):
        return None, {}
    return lecture, {cell.id: line for cell, line in zip(notebook.cells, lines)}


class CellFailed(Exception):
    """What went wrong in a cell, and what there is to say about it."""


class Cell(plugin.IPyNbCell):
    """A code cell, named `In [12], line 345` by its prompt and its first line in the lecture's source."""

    def setup(self):
        super().setup()
        self.output_timeout = 300  # between a cell's end and its last output

    def compare_outputs(self, test, ref, skip_compare=None):
        stem = f"{self.path.parent.name}_{self.path.stem}_In_{self.cell_num + 1}"
        self.comparison_traceback = notebook_outputs.differences(
            expected=ref,
            actual=test,
            approx=self.cell.metadata.get("approx"),
            keep=self.config.rootpath / "build" / "differences" / stem,
        )
        return not self.comparison_traceback

    def runtest(self):
        if self.parent.dead:
            pytest.skip(f"the kernel died in {self.parent.dead}")
        self.parent.usage.new_cell()
        lacks_model = lacks_language_model(self.cell)
        if lacks_model:
            self.options["check"] = False
        try:
            super().runtest()
        except plugin.NbCellError as error:
            said = notebook_outputs.plain(error.inner_traceback or "")
            if self.parent.usage.is_too_long:
                raise CellFailed(f"stopped after {notebook_usage.CELL_SECONDS} s of processor time", said) from None
            raise CellFailed(str(error), said) from None
        finally:
            if not self.parent.kernel.is_alive():
                self.parent.dead = self.name
        self.parent.passed += not lacks_model
        if lacks_model:
            pytest.skip("run, not compared: the language model is not installed (requirements-model.txt)")

    def repr_failure(self, excinfo):
        if isinstance(excinfo.value, CellFailed):
            what, said = excinfo.value.args
        else:
            what, said = str(excinfo.value), ""
        line = line_in_cell([said])
        index = self.parent.index(self.cell)
        first = self.parent.lines.get(self.cell.id)
        source = self.path.with_suffix(".py")
        where, shown = lecture_source.place(source, self.parent.read, index, first, line)
        root = f"{self.config.rootpath}/"
        return f"{self.parent.relative}, {where}: {what}\n    {shown}\n{said}".replace(root, "")

    def reportinfo(self):
        return self.path, 0, f"{self.parent.relative}::{self.name}"


class Budget(pytest.Item):
    """What a notebook used, judged once. A whole run judges the whole notebook, a part of it that part.

    It comes last, so it also notes that all cells have passed, for `--skip-passed`.
    """

    def runtest(self):
        usage = self.parent.usage
        used = usage.seconds, usage.wall, usage.megabytes
        self.user_properties.append(("notebook", (self.parent.relative, *used)))
        if notebook_usage.excess(used[0], used[2]) > OVER:
            limits = f"{notebook_usage.SECONDS} s and {notebook_usage.MEGABYTES} MB"
            message = f"over {OVER} times the budget of {limits}: {used[0]:.0f} s of processor time, {used[2]:.0f} MB"
            pytest.fail(message, pytrace=False)
        cells = sum(cell.cell_type == "code" for cell in self.parent.read.cells)
        if self.parent.lecture and self.parent.passed == cells:
            stale.note(self.path, self.parent.lecture, self.parent.root, stale.PASSED)

    def reportinfo(self):
        return self.path, 0, f"{self.parent.relative}::budget"
