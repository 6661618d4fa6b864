"""The process in which a learner's answer runs: started by process.py, which reads what this one writes.

Here an answer may loop, crash, print or exit without harm to the notebook. What it returns leaves as plain arrays only,
and neither the oracles nor the course's own answer to the exercise can be imported here.
"""

import builtins
import contextlib
import ctypes
import importlib
import io
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
import warnings
from typing import NamedTuple

import cloudpickle  # noqa: F401  (an answer is unpickled with it: better now than in the first check)
import numpy as np
import psutil

from utils.judge import drivers, odd, wire
from utils.judge.guard import Guard, closed

PRINTED_LIMIT = 500  # characters: more is not shown
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: orphans of this process become its children, so that they are found


class Load(NamedTuple):
    """An answer, which is kept until the next one: one object for a whole check."""

    number: int
    answer: bytes
    module: str  # the exercise's own place in the course, which is closed to it
    name: str
    path: list[str]  # the notebook's sys.path


class Ask(NamedTuple):
    """One call of the answer that was loaded."""

    number: int
    arguments: bytes  # pickle of (args, kwargs)
    driver: str = ""  # the function of drivers.py that calls the answer; "" where it is called directly
    measure: bool = False  # whether to look at what goes through exp


def main():
    """Answer requests until the notebook closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the notebook's business; it will end this process
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # nothing that an answer reads or writes may reach the pipes
        os.dup2(nowhere, stream)
    waiting = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(requests, waiting), daemon=True).start()
    Room(replies).serve(waiting)


def _receive(requests, waiting):
    """Read in a thread, so that the end of the notebook is noticed while an answer loops."""
    try:
        while True:
            waiting.put(pickle.load(requests))
    except Exception:  # noqa: BLE001 (the notebook is gone: nobody is left to tell)
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
        os._exit(0)


class Room:
    """Holds one answer, and calls it."""

    def __init__(self, replies):
        self._replies, self._home = replies, os.getpid()
        self._guard, self._answer, self._number = Guard(), None, 0
        self._is_importing = False  # a module brings others: the clock starts when the first is there
        builtins.__import__ = self._off_the_clock(builtins.__import__)
        importlib.import_module = self._off_the_clock(importlib.import_module)
        sys.meta_path.insert(0, self._guard)

    def serve(self, waiting):
        self._say(wire.Reply(0, "ready"))
        while True:
            request = waiting.get()
            self._number = request.number
            reply = self._load(request) if isinstance(request, Load) else self._call(request)
            self._say(reply)

    def _say(self, reply):
        if os.getpid() != self._home:  # an answer forked: only one of the two speaks
            os._exit(0)
        wire.write(self._replies, reply)

    def _off_the_clock(self, load):
        """`load`, Python's way to a module, so that the time it takes is not the answer's."""

        def importing(name, *args, **kwargs):
            is_here = name in sys.modules or name.partition(".")[0] in sys.modules
            if is_here or self._is_importing or os.getpid() != self._home:
                return load(name, *args, **kwargs)
            self._is_importing = True
            self._say(wire.Reply(self._number, "importing"))
            try:
                return load(name, *args, **kwargs)
            finally:
                self._is_importing = False
                self._say(wire.Reply(self._number, "running"))

        return importing

    def _load(self, request):
        with self._calmly() as printed:
            try:
                sys.path[:] = request.path
                self._guard.close(request.module, request.name)
                self._answer = Unpickler(io.BytesIO(request.answer)).load()
                error = None
            except BaseException as raised:  # noqa: BLE001 (SystemExit and KeyboardInterrupt too)
                error = _error(raised)
        return wire.Reply(request.number, "done", error=error, printed=printed.getvalue())

    def _call(self, request):
        """Call the answer once. Returns a Reply, whatever the answer does."""
        values, is_tuple, changed, error, largest = [], False, [], None, [0]
        before = odd.fingerprint()
        with self._calmly() as printed:
            try:
                args, kwargs = pickle.loads(request.arguments)
                self._say(wire.Reply(request.number, "running"))
                with odd.watching_exp() if request.measure else contextlib.nullcontext([0]) as largest:
                    if request.driver:
                        result = getattr(drivers, request.driver)(self._answer, *args, **kwargs)
                    else:
                        result = self._answer(*args, **kwargs)
                is_tuple = type(result) is tuple
                values = _values(result)
                if not request.driver:
                    changed = _changed(args, kwargs, *pickle.loads(request.arguments))
            except BaseException as raised:  # noqa: BLE001 (SystemExit and KeyboardInterrupt too)
                error = _error(raised)
        return wire.Reply(
            request.number, "done", values, is_tuple, changed, error, printed.getvalue(), largest[0], odd.since(before)
        )

    @contextlib.contextmanager
    def _calmly(self):
        printed = Printed()
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            warnings.catch_warnings(action="ignore"),
            np.errstate(all="ignore"),
        ):
            yield printed


class Printed(io.StringIO):
    """Keeps the beginning of what is printed: an endless loop may print without end."""

    def write(self, text):
        super().write(text[: max(0, PRINTED_LIMIT - self.tell())])
        return len(text)


class Unpickler(pickle.Unpickler):
    """Puts the closed door where the notebook's pickler found the course's own answer."""

    def persistent_load(self, name):
        return closed(name)


def _values(result):
    if type(result) is drivers.Named:
        return [_value(part)._replace(name=name) for name, part in result.items()]
    return [_value(part) for part in (result if type(result) is tuple else (result,))]


def _value(result):
    name = type(result).__name__
    if type(result) is set:
        result = np.array(sorted(result))
    torch = sys.modules.get("torch")
    if torch and isinstance(result, torch.Tensor):
        result = result.detach().cpu()
        result = (result.float() if result.dtype == torch.bfloat16 else result).numpy()
    # A subclass may redefine what equality means; an array of objects may hold anything.
    plain = type(result) is np.ndarray or isinstance(result, (np.generic, bool, int, float))
    return wire.Value(name, np.array(result) if plain and np.asarray(result).dtype.kind in wire.PLAIN else None)


def _changed(args, kwargs, fresh_args, fresh_kwargs):
    after = {**dict(enumerate(args)), **kwargs}
    before = {**dict(enumerate(fresh_args)), **fresh_kwargs}
    return [key for key in before if not _same(before[key], after[key])]


def _same(before, after):
    if hasattr(before, "detach"):
        before, after = before.detach().numpy(), after.detach().numpy()
    if isinstance(before, np.ndarray):
        return (before.dtype, before.shape, before.tobytes()) == (after.dtype, after.shape, after.tobytes())
    if isinstance(before, (list, tuple)):
        return len(before) == len(after) and all(map(_same, before, after))
    return before == after or not isinstance(before, (bool, int, float, str, type(None)))


def _error(raised):
    try:
        message = str(raised)
    except Exception:  # noqa: BLE001 (the exception may be the learner's own class)
        message = ""
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(raised.__traceback__, limit=-30)]
    return wire.Error(type(raised).__name__, message, frames)
