"""A JupyterHub with simulated learners: each has a server, opens the copy of a lecture, and runs its cells.

python -m tests.teaching.learners 20      starts a hub, lets so many run lecture 01 at once up to the language model (which
                                          takes each of them 1 GB more), prints what it takes
"""

import asyncio
import itertools
import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.websocket import websocket_connect

from tests.teaching import classroom
from utils.paths import ROOT

CONFIG = ROOT / "utils" / "teaching" / "hub" / "jupyterhub_config.py"
OURS = """
load_subconfig({config!r})
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.JupyterHub.bind_url = "http://127.0.0.1:{port}"
c.JupyterHub.hub_port = {hub}
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{api}"
c.Spawner.environment.update({jupyter!r})
c.JupyterHub.services = [{{"name": "class", "api_token": {token!r}}}]
c.JupyterHub.load_roles = [
    {{"name": "class", "services": ["class"], "scopes": ["admin:users", "admin:servers", "tokens", "admin:server_state"]}}
]
"""
LECTURE = "01_attention_fundamentals.ipynb"
PATIENCE = 300  # seconds on the clock for whatever is waited for
LONG = 3600  # for a cell in which a learner waits for many others


class Hub:
    """A hub in `folder`, for simulated learners."""

    def __init__(self, folder, python):
        ports = [_free_port() for _ in range(3)]
        self.folder, self._token, self.url = folder, secrets.token_hex(16), f"http://127.0.0.1:{ports[0]}"
        names = {**dict(zip(("port", "hub", "api"), ports)), "jupyter": _jupyter_of(python)}
        (folder / "config.py").write_text(OURS.format(config=str(CONFIG), token=self._token, **names))
        environment = {**os.environ, "PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"}
        with open(folder / "hub.log", "w") as log:
            command = [python, "-m", "jupyterhub", "-f", "config.py"]
            self._process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment)

    def stop(self):
        """End the hub, which ends its proxy and servers."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)

    async def ask(self, method, path, body=None, token=None):
        """The JSON that the hub, or a learner's server, answers."""
        text = None if method in ("GET", "DELETE") else json.dumps(body or {})
        headers = {"Authorization": f"token {token or self._token}"}
        request = HTTPRequest(f"{self.url}{path}", method, headers, body=text, request_timeout=PATIENCE)
        return json.loads((await AsyncHTTPClient().fetch(request)).body or "null")

    async def ready(self):
        for _ in range(PATIENCE):
            try:
                return await self.ask("GET", "/hub/api/")
            except (OSError, HTTPClientError):  # nobody listens yet, or the proxy alone
                assert self._process.poll() is None, (self.folder / "hub.log").read_text()
                await asyncio.sleep(1)
        raise TimeoutError("the hub is not ready")

    async def enter(self, name):
        """The Learner of that name, whose server runs."""
        await self.ask("POST", f"/hub/api/users/{name}")
        await self.ask("POST", f"/hub/api/users/{name}/server")
        for _ in range(PATIENCE):
            found = (await self.ask("GET", f"/hub/api/users/{name}"))["servers"].get("", {})
            if found.get("ready"):
                break
            await asyncio.sleep(1)
        else:
            raise TimeoutError(f"{name}'s server is not ready")
        token = (await self.ask("POST", f"/hub/api/users/{name}/tokens"))["token"]
        return Learner(self, name, token, found["state"]["pid"])


class Learner:
    """Somebody whose server runs, and who has a kernel after `open`."""

    def __init__(self, hub, name, token, pid):
        self.hub, self.name, self._token, self.pid = hub, name, token, pid
        self.home = hub.folder / "homes" / name

    async def ask(self, method, path, body=None, of=None):
        """What a server says to this learner: the own one, or another learner's."""
        return await self.hub.ask(method, f"/user/{of or self.name}/api/{path}", body, self._token)

    async def open(self, notebook=LECTURE):
        """Start a kernel for the own copy of a notebook, and return its code cells."""
        session = {"path": notebook, "name": "", "type": "notebook", "kernel": {"name": "python3"}}
        kernel = (await self.ask("POST", "sessions", session))["kernel"]["id"]
        address = f"{self.hub.url}/user/{self.name}/api/kernels/{kernel}/channels".replace("http", "ws", 1)
        request = HTTPRequest(address, headers={"Authorization": f"token {self._token}"})
        self._kernel = await websocket_connect(request, max_message_size=2**30)
        cells = (await self.ask("GET", f"contents/{notebook}"))["content"]["cells"]
        return [cell for cell in cells if cell["cell_type"] == "code"]

    async def run(self, code, patience=PATIENCE):
        """What a cell prints; the name of its exception, where it raises one."""
        number, said = secrets.token_hex(8), []
        header = {"msg_id": number, "msg_type": "execute_request", "username": "", "session": "s", "version": "5.3"}
        content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
        message = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
        await self._kernel.write_message(json.dumps({**message, "buffers": []}))
        while True:
            got = json.loads(await asyncio.wait_for(self._kernel.read_message(), patience))
            if got["parent_header"].get("msg_id") == number:
                kind, content = got["msg_type"], got["content"]
                said += [content["text"]] if kind == "stream" else [content["ename"]] if kind == "error" else []
                if kind == "status" and content["execution_state"] == "idle":
                    return "".join(said)

    def memory(self):
        """Bytes of all processes of this learner; what several share is divided among them."""
        first = psutil.Process(self.pid)
        return sum(process.memory_full_info().pss for process in (first, *first.children(recursive=True)))


def _jupyter_of(python):
    """Where JupyterLab lies for a Python that lies over the one that runs this: see classroom.py."""
    if python == sys.executable:
        return {}
    etc, share = (os.path.join(sys.prefix, name, "jupyter") for name in ("etc", "share"))
    return {"JUPYTER_CONFIG_PATH": etc, "JUPYTER_PATH": share, "JUPYTERLAB_DIR": os.path.join(share, "lab")}


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def work(hub, name):
    """One learner from the login to the last cell: (minutes to the first cell's end, to the last one's, bytes, errors, cells)."""
    begun = time.monotonic()
    learner = await hub.enter(name)
    cells, minutes, errors = await learner.open(), [], []
    for cell in itertools.takewhile(lambda cell: "language-model" not in cell["metadata"].get("tags", ()), cells):
        said = await learner.run(cell["source"], LONG)
        minutes.append((time.monotonic() - begun) / 60)
        errors += [said] if said.endswith(("Error", "Interrupt")) else []
    return minutes[0], minutes[-1], learner.memory(), errors, len(minutes)


async def all_at_once(hub, count):
    await hub.ready()
    return await asyncio.gather(*(work(hub, f"learner{i}") for i in range(count)))


def main(arguments):
    """Print what it takes when so many learners run the lecture at once; the status says whether a cell raised."""
    count = int(arguments[0]) if arguments else 20
    with tempfile.TemporaryDirectory() as folder:
        hub = Hub(Path(folder).resolve(), classroom.python())
        try:
            first, last, memory, errors, cells = zip(*asyncio.run(all_at_once(hub, count)))
        finally:
            hub.stop()
    print(f"{count} learners ran {cells[0]} cells of {LECTURE} at once on {os.cpu_count()} cores")
    for what, of in (("first cell", first), ("last cell", last)):
        print(f"{what}: median {statistics.median(of):.1f} minutes, last learner {max(of):.1f}")
    print(
        f"memory of each at the end: median {statistics.median(memory) / 1e6:.0f} MB, most {max(memory) / 1e6:.0f} MB"
    )
    print(f"cells that raised: {sum(map(len, errors))}", *(one for each in errors for one in each), sep="\n")
    return int(any(errors))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
