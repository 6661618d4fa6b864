"""`pytest --nbval`: execute the notebooks of lectures/ and solutions/, compare every output, measure time and memory.

nbval 0.11.0 compares text exactly and pictures not at all, and it ignores a trailing `;`. What is replaced in it here
are private names; tests/test_nbval_bites.py proves that each replacement works.
"""

import functools

import pytest

NOTEBOOK_FOLDERS = ("lectures", "solutions")
used = {}  # notebook -> (seconds, megabytes), collected from the reports of its cells


def pytest_configure(config):
    if config.option.nbval:
        _replace_parts_of_nbval(config)


def pytest_ignore_collect(collection_path, config):
    """Leave a learner's notebooks in workbook/, and any other, alone."""
    if collection_path.suffix == ".ipynb":
        return collection_path.parent not in [config.rootpath / folder for folder in NOTEBOOK_FOLDERS] or None
    return None


def pytest_runtest_logreport(report):
    used.update({name: tuple(numbers) for key, (name, *numbers) in report.user_properties if key == "notebook"})


def pytest_terminal_summary(terminalreporter, config):
    if not used:
        return
    from utils import notebook_usage

    lines = notebook_usage.table(used)
    terminalreporter.section("time and memory of each notebook")
    for line in lines:
        terminalreporter.write_line(line, red="OVER BUDGET" in line)
    folder = config.rootpath / "build"
    folder.mkdir(exist_ok=True)
    (folder / "notebook_times.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _replace_parts_of_nbval(config):
    from nbval import kernel, plugin

    from utils import build, notebook_outputs, notebook_usage

    # The kernel starts as in the build, and keeps its history in memory: with several notebooks at once, a shared
    # history file gets locked.
    kernel.start_new_kernel = functools.partial(
        kernel.start_new_kernel,
        env=build.environment(),
        extra_arguments=["--HistoryManager.hist_file=:memory:"],
    )
    config.option.nbval_cell_timeout = build.CELL_LIMIT

    def execute_cell_input(self, cell_input, allow_stdin=None):
        # IPython heeds a trailing `;` only in cells that go into its history.
        return self.kc.execute(cell_input, store_history=True, allow_stdin=allow_stdin, stop_on_error=False)

    def compare_outputs(self, test, ref, skip_compare=None):
        self.comparison_traceback = notebook_outputs.differences(expected=ref, actual=test)
        return not self.comparison_traceback

    def setup(self, nbval_setup=plugin.IPyNbFile.setup):
        nbval_setup(self)
        self.usage = notebook_usage.Usage(self.kernel.km.provisioner.pid)

    def teardown(self, nbval_teardown=plugin.IPyNbFile.teardown):
        if self.usage:
            self.usage.stop()
        nbval_teardown(self)

    def runtest(self, nbval_runtest=plugin.IPyNbCell.runtest):
        self.output_timeout = 60  # between a cell's end and its last output; nbval's five is too few on a busy machine
        usage = self.parent.usage
        try:
            nbval_runtest(self)
        finally:
            name = self.path.relative_to(self.config.rootpath).as_posix()
            self.user_properties.append(("notebook", (name, usage.seconds, usage.megabytes)))
        if notebook_usage.excess(usage.seconds, usage.megabytes) > 2:
            pytest.fail(f"over twice the budget: {usage.seconds:.0f} s, {usage.megabytes:.0f} MB", pytrace=False)

    plugin.IPyNbFile.usage = None
    kernel.RunningKernel.execute_cell_input = execute_cell_input
    plugin.IPyNbFile.setup, plugin.IPyNbFile.teardown = setup, teardown
    plugin.IPyNbCell.compare_outputs, plugin.IPyNbCell.runtest = compare_outputs, runtest
