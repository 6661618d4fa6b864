"""A Python with nbgrader and JupyterHub, for the tests of a class: `python -m tests.teaching.classroom` makes it in build/.

It lies over the one that runs the tests: only what that one lacks is installed. Without it these tests are skipped.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import venv

import pytest

from utils.judge import walls
from utils.paths import ROOT

HOME = ROOT / "build" / "class"
REQUIREMENTS = ROOT / "requirements-class.txt"
WHY_NOT = f"{REQUIREMENTS.name} is not installed: python -m tests.teaching.classroom"


def python():
    """The path of that Python; skips a test where there is none."""
    if all(importlib.util.find_spec(name) for name in ("nbgrader", "jupyterhub", "configurable_http_proxy")):
        return sys.executable
    if not _stamp().exists() or _stamp().read_text() != _wanted():
        pytest.skip(WHY_NOT)
    return str(HOME / "bin" / "python")


def make():
    """Make the environment, anew where there is one."""
    venv.create(HOME, clear=True, with_pip=False)
    own = sysconfig.get_path("purelib", vars={"base": str(HOME)})
    with open(os.path.join(own, "course.pth"), "w", encoding="utf-8") as file:
        file.write(os.path.realpath(sysconfig.get_path("purelib")) + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(HOME / "bin" / "python"), "install", "--no-input"]
    subprocess.run([*command, "--quiet", "-r", str(REQUIREMENTS)], check=True)
    _stamp().write_text(_wanted())


def behind_walls(command, folder):
    """A command that finds the course read-only and can write in `folder` alone, where the system has Landlock."""
    if not walls.keep_out(ROOT):
        return command
    read = [str(ROOT), os.path.realpath(sys.prefix), os.path.realpath(HOME)]
    code = f"import os; from utils.judge import walls; walls.close({read!r}, [{str(folder)!r}]); os.execv({command[0]!r}, {command!r})"
    return [sys.executable, "-c", code]


def _stamp():
    return HOME / "installed.txt"


def _wanted():
    return hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()


if __name__ == "__main__":
    make()
