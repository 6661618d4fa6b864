"""Where compiled kernels are kept: a folder that nobody else can write to, in which a damaged file is noticed."""

import atexit
import functools
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path

from ..errors import CompileError

NAME = "attention-course"
DECIDES = ("CUDA_COURSE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA", "HOME", "TMPDIR")  # environment variables


def folder():
    """`CUDA_COURSE_CACHE`, else the user's cache folder, else one in the temporary folder.

    What lies in it is loaded and run, so a folder that belongs to somebody else, or that others may write to, is not used:
    then it is a new one, which goes when this process ends. Raises CompileError where no folder can be written.
    """
    decides = tuple(os.environ.get(name) for name in DECIDES)
    if not _folder(decides).is_dir():
        _folder.cache_clear()
    return _folder(decides)


@functools.lru_cache
def _folder(decides):
    for wanted in (_wanted(*decides), Path(tempfile.gettempdir()).resolve() / f"{NAME}-{_user()}"):
        if wanted and _is_ours(wanted):
            return wanted
    try:
        new = tempfile.mkdtemp(prefix=f"{NAME}-")  # mode 0700
    except OSError as error:
        raise CompileError(
            f"no folder for compiled kernels can be written ({error}): name one in CUDA_COURSE_CACHE"
        ) from None
    atexit.register(shutil.rmtree, new, ignore_errors=True)
    return Path(new)


def _wanted(chosen, xdg, local, *_):
    try:
        if chosen:
            return Path(chosen).resolve()
        if sys.platform == "win32":
            return Path(local or Path.home() / "AppData/Local") / NAME
        if sys.platform == "darwin":
            return (Path.home() / "Library/Caches" / NAME).resolve()
        return (Path(xdg or Path.home() / ".cache") / NAME).resolve()
    except (OSError, RuntimeError):  # no home, or a link that leads in a circle
        return None


def _user():
    return os.getuid() if hasattr(os, "getuid") else "user"


def _is_ours(path):
    """Whether the folder, made if need be, is writable for this user and for nobody else. A link is not a folder."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.lstat(path)
        if not stat.S_ISDIR(status.st_mode):
            return False
        if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
            return False
        with tempfile.TemporaryFile(dir=path):
            return True
    except OSError:
        return False


def put(made, target):
    """Move a finished file into place: flushed first, so that its name never stands for half of it.

    Several processes may do so at once. Windows keeps a file that is in use, which is as good.
    """
    with open(made, "rb+") as file:
        os.fsync(file.fileno())
    try:
        os.replace(made, target)
    except PermissionError:
        if not target.exists():
            raise


def seal(target, **notes):
    """Note beside a file what is known about it. From now on `find` finds it."""
    text = json.dumps({**notes, "sha256": _digest(target)})
    scratch = target.with_name(f"{target.name}.{os.getpid()}")
    scratch.write_text(text)
    put(scratch, _notes_of(target))


def find(target):
    """The notes of a sealed file, or None if it is not there or no longer what it was then."""
    try:
        notes = json.loads(_notes_of(target).read_bytes())
        return notes if notes["sha256"] == _digest(target) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget(target):
    for path in (_notes_of(target), target):
        try:
            path.unlink(missing_ok=True)
        except OSError:
            pass  # in use on Windows


def _notes_of(target):
    return target.with_name(target.name + ".json")


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
