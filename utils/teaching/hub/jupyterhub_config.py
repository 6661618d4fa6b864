"""JupyterHub for a class on one machine: `jupyterhub -f utils/teaching/hub/jupyterhub_config.py`, in a folder of its own.

Each learner has a folder in homes/ and a server behind walls (room.py). Who may log in, the address and the certificate
are yours to set: in a file of your own that begins with `load_subconfig("THIS FILE")`.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from utils.judge import walls  # noqa: E402
from utils.paths import ROOT  # noqa: E402

c = get_config()  # noqa: F821
here = Path.cwd().resolve()
if here.is_relative_to(ROOT):
    sys.exit("jupyterhub: start it in a folder outside the course: all that is in the course can be read by learners.")
if not walls.keep_out(here):
    sys.exit(
        "jupyterhub: this system has no Landlock (Linux 5.13 or later): nothing would part one learner from another."
    )

c.JupyterHub.spawner_class = "simple"  # all servers are one system user's; what parts them is the walls
c.SimpleLocalProcessSpawner.home_dir_template = str(here / "homes" / "{username}")
c.Authenticator.username_pattern = "[a-z][a-z0-9_-]*"  # it becomes a folder's name
c.Spawner.cmd = [sys.executable, "-m", "utils.teaching.hub.room"]
c.Spawner.notebook_dir = "~/workbook"
c.Spawner.environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
c.Spawner.start_timeout = 300  # a class begins all at once
c.Spawner.http_timeout = 300

c.ConfigurableHTTPProxy.command = [str(Path(sys.executable).with_name("configurable-http-proxy"))]  # needs no node
