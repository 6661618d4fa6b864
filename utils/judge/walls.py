"""Walls around a process on Linux: which folders it and all that it starts may read, and which it may write to.

It is the kernel's own Landlock (Linux 5.13 and later; https://docs.kernel.org/userspace-api/landlock.html), which needs
no rights and cannot be undone. Nobody inside can look into the memory of a process outside, or, from Linux 6.12 on,
send it a signal.
"""

import ctypes
import os
import sys
from pathlib import Path

CREATE, ADD_RULE, RESTRICT = 444, 445, 446  # system calls, the same on every processor
VERSION, BENEATH, NO_NEW_PRIVS = 1, 1, 38
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE, IOCTL = (1 << bit for bit in (0, 1, 2, 3, 14, 15))
READ = EXECUTE | READ_FILE | READ_DIR
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many of them each version knows; later ones know no more
SIGNALS = 2  # of `scoped`
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc", "/proc", "/sys", "/dev")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/shm")


class _Attributes(ctypes.Structure):
    _fields_ = [("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def version():
    """Landlock's version on this machine, 0 where there is none."""
    if sys.platform != "linux":
        return 0
    return max(0, _libc().syscall(CREATE, None, ctypes.c_size_t(0), VERSION))


def python_folders():
    """What a Python process must be able to read: the system, and Python with its packages."""
    return [*SYSTEM, *{str(Path(p).resolve()) for p in (sys.prefix, sys.base_prefix, sys.exec_prefix)}]


def keep_out(folder):
    """Whether walls can hide `folder` on this machine: there are some, and it is no part of what must be readable."""
    return version() > 0 and not any(Path(folder).resolve().is_relative_to(p) for p in python_folders())


def close(read, write):
    """Shut this thread, and all that it starts from now on, out of all but some folders. Raises OSError.

    read, write: paths, besides `python_folders()`. What does not exist is passed over.
    """
    level = version()
    known = (1 << RIGHTS.get(level, 16)) - 1
    attributes = _Attributes(known, 0, SIGNALS if level >= 6 else 0)
    size = ctypes.c_size_t(24 if level >= 6 else 8)
    rules = _checked(_libc().syscall(CREATE, ctypes.byref(attributes), size, 0))
    try:
        for path in (*python_folders(), *read):
            _allow(rules, path, READ & known)
        for path in DEVICES:
            _allow(rules, path, (READ | WRITE_FILE | IOCTL) & known)
        for path in write:
            _allow(rules, path, known)
        _checked(_libc().prctl(NO_NEW_PRIVS, 1, 0, 0, 0))
        _checked(_libc().syscall(RESTRICT, rules, 0))
    finally:
        os.close(rules)


def _allow(rules, path, rights):
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        of_files = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL
        rule = _Beneath(rights if os.path.isdir(path) else rights & of_files, place)
        _checked(_libc().syscall(ADD_RULE, rules, BENEATH, ctypes.byref(rule), 0))
    finally:
        os.close(place)


def _libc():
    return ctypes.CDLL(None, use_errno=True)


def _checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
