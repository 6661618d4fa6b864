"""`pytest --nbval`: execute the notebooks of lectures/ and solutions/, compare every output, measure what they use.

How notebooks are run and compared is in utils/authoring/nbval_items.py. Here is what pytest finds by itself: which
notebooks, in which order, and the table at the end.
"""

NOTEBOOK_FOLDERS = ("lectures", "solutions")
used = {}  # notebook -> (processor seconds, seconds, megabytes), collected from the reports of the budgets


def pytest_addoption(parser):
    said = (
        "leave out notebooks that passed here, or are as committed, if nothing that decides their outputs has changed"
    )
    parser.addoption("--skip-passed", action="store_true", help=said)


def pytest_configure(config):
    if config.option.nbval:
        from utils.authoring import nbval_items

        config.pluginmanager.register(nbval_items)


def pytest_ignore_collect(collection_path, config):
    """Leave a learner's notebooks in workbook/, and any other, alone."""
    if collection_path.suffix == ".ipynb":
        return collection_path.parent not in [config.rootpath / folder for folder in NOTEBOOK_FOLDERS] or None
    return None


def pytest_collection_modifyitems(items):
    """What takes longest comes first, notebooks and then slow files, so that no worker ends long after the others."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.suffix != ".ipynb", item.path not in slow))


def pytest_runtest_logreport(report):
    used.update({name: tuple(numbers) for key, (name, *numbers) in report.user_properties if key == "notebook"})


def pytest_terminal_summary(terminalreporter, config):
    if not used:
        return
    from utils.authoring import usage as notebook_usage

    lines = notebook_usage.table(used)
    terminalreporter.section("time and memory of each notebook")
    for line in lines:
        terminalreporter.write_line(line, red="OVER BUDGET" in line)
    folder = config.rootpath / "build"
    folder.mkdir(exist_ok=True)
    (folder / "notebook_times.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
