"""What JupyterHub starts for a learner: copies of the lectures in the learner's own folder, and a server behind walls.

Behind them the course can be read, the learner's folder can be written to, and nobody else's is within reach: not its
files, not the memory of its processes. `workbook/` in that folder is what JupyterLab shows.
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

from utils.judge import walls
from utils.paths import ROOT
from utils.setup import workbook

DROP = 24  # PR_CAPBSET_DROP


def main(arguments):
    """Become the learner's server."""
    home = Path.home()
    os.chmod(home, 0o700)
    book, scratch = home / "workbook", home / ".scratch"
    scratch.mkdir(exist_ok=True)
    os.environ.update(COURSE_WORKBOOK=str(book), TMPDIR=str(scratch))
    give_up_rights()
    walls.close([str(ROOT), *packages()], [str(home)])
    written, messages = workbook.update(ROOT / "lectures", book)
    print("\n".join(messages), flush=True)
    if written:  # so that JupyterLab runs their viewers at once
        subprocess.run([sys.executable, "-m", "nbformat.sign", *map(str, written)], check=False, capture_output=True)
    settings = f"--LabApp.app_settings_dir={ROOT / 'utils' / 'setup' / 'jupyter'}"
    root = ["--allow-root"] if os.geteuid() == 0 else []
    os.execv(sys.executable, [sys.executable, "-m", "jupyterhub.singleuser", settings, *root, *arguments])


def give_up_rights():
    """Where root started the hub, the server begins with none of root's rights, which can look past the walls."""
    libc = ctypes.CDLL(None)
    for right in range(64):
        libc.prctl(DROP, right, 0, 0, 0)  # refused where there is no such right, or none to give up


def packages():
    """The folders in which this Python finds its packages."""
    return [os.path.realpath(entry) for entry in sys.path if "site-packages" in entry]


if __name__ == "__main__":
    main(sys.argv[1:])
