"""Notebooks run the same whatever the user's environment says, in the build and under nbval."""

import nbformat
import pytest

from utils.authoring import execute

PROBE = "import sys; print(sys.flags.optimize, sys.flags.dev_mode, sys.warnoptions, 'leaked' in globals())"


def printed(folder):
    cell = nbformat.v4.new_code_cell(PROBE)
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata=metadata)
    execute.execute(notebook, folder, lambda index, line=1: (f"cell {index}", ""))
    return notebook.cells[0].outputs[0].text


def test_the_users_settings_of_python_and_ipython_reach_no_notebook(tmp_path, monkeypatch):
    begin = tmp_path / "begin.py"
    begin.write_text("leaked = True")
    profile = tmp_path / "ipython" / "profile_default" / "startup"
    profile.mkdir(parents=True)
    (profile / "00.py").write_text("leaked = True")
    settings = {"STARTUP": begin, "OPTIMIZE": 2, "WARNINGS": "error", "HASHSEED": 7, "IOENCODING": "ascii"}
    for name, value in settings.items():
        monkeypatch.setenv(f"PYTHON{name}", str(value))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("NO_COLOR", "1")
    assert printed(tmp_path).startswith("0 False [] False")


@pytest.mark.parametrize("name", execute.KEPT)
def test_where_python_finds_and_keeps_its_files_is_the_users(monkeypatch, name):
    monkeypatch.setenv(name, "somewhere")
    assert execute.environment()[name] == "somewhere"
