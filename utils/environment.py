"""The course's own Python environment: made on first use, finished after an interruption, remade when it is broken.

Standard library only, because it runs before anything is installed.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONDA_NAME = "attention"  # the name in environment.yml; inside that environment no .venv is made
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
STAMP = "course-installed.json"
SPACE_NEEDED = {"cpu": 4, "cuda": 12}  # GB: what is installed and, for a moment, what was downloaded


class Stop(Exception):
    """A sentence for the person at the keyboard: what is wrong and what to do. Ends the command with status 1."""


def prepare(requirements="requirements.txt", root=ROOT):
    """Return the Python (a Path) that has `requirements` (a file name in `root`) installed; install them if need be.

    Raises Stop where that cannot be done.
    """
    check_writable(root)
    home = environment_home(root)
    python = python_in(home)
    if not is_working(python):
        make_environment(home)
    if not is_installed(home, root / requirements):
        install(python, home, root / requirements)
    return python


def environment_home(root=ROOT):
    """The folder of the environment: the active conda environment if it is the course's own, otherwise .venv."""
    if os.environ.get("CONDA_DEFAULT_ENV") == CONDA_NAME:
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
    """Make an empty virtual environment in place of whatever is at `home`."""
    if Path(sys.prefix) == home:
        raise Stop(f"{home} is broken and is the very Python that runs this: start course.py with another Python.")
    if home.exists():
        print(f"{home.name} is broken or was never finished: it is made again.", flush=True)
    else:
        print(f"Making {home}: the course's own Python environment.", flush=True)
    status, text = ask([sys.executable, "-m", "venv", "--clear", home], timeout=600)
    if "ensurepip" in text:
        raise Stop("This Python cannot make virtual environments. On Debian and Ubuntu: sudo apt install python3-venv")
    if status or not is_working(python_in(home)):
        raise Stop(f"Python could not make the environment {home}: {last_line(text)}")


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
    stamp = read_stamp(home)
    cpu = wants_cpu_torch()
    if not stamp:
        check_space(home, SPACE_NEEDED["cpu" if cpu or sys.platform != "linux" else "cuda"])
    print(f"Installing {requirements.name}. The first time this takes a few minutes.", flush=True)
    log = home / "pip.log"
    if cpu and not pip_install(python, log, "--no-deps", "--timeout", "10", "--retries", "1",
                               "--index-url", CPU_INDEX, torch_pin(requirements.parent)):
        print(f"The CPU build of torch at {CPU_INDEX} is out of reach: pip takes what your package index offers, "
              "which for Linux is the CUDA build, a download of about 3 GB.", flush=True)
    if not pip_install(python, log, "-r", str(requirements)):
        raise Stop(explain_pip(log.read_text(encoding="utf-8", errors="replace"), log))
    stamp.update(fingerprints(requirements))
    (home / STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")


def pip_install(python, log, *arguments):
    """Run pip with its progress on the screen and its details in `log`. Returns whether it succeeded."""
    with contextlib.suppress(FileNotFoundError):
        log.unlink()
    command = [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--log", log, *arguments]
    return run(command) == 0


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
        done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, errors="replace", timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return done.returncode, done.stdout


def last_line(text):
    """The last line of what a program wrote: where most of them say why they failed."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "no reason given"


def run(command, env=None, cwd=None):
    """Run a command to its end and return its status. On Ctrl-C, which reaches it too, let it tidy up first."""
    process = subprocess.Popen([str(part) for part in command], env=env, cwd=cwd)
    try:
        return process.wait()
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
        process.kill()
        raise
