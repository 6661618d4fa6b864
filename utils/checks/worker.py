"""The process in which a learner's answer runs: started by process.py, which reads what this one writes.

Here an answer may loop, crash, print or exit without harm to the notebook. What it returns leaves as plain arrays only,
and the oracle never comes here.
"""

import contextlib
import importlib.abc
import importlib.machinery
import io
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
import tracemalloc
import warnings
from typing import NamedTuple

import cloudpickle  # noqa: F401  (an answer is unpickled with it: better now than in the first check)
import numpy as np

PRINTED_LIMIT = 500  # characters: more is not shown


class Request(NamedTuple):
    answer: bytes
    arguments: bytes  # pickle of (args, kwargs)
    module: str  # the exercise's own place in the course, which is closed to it
    name: str
    path: list[str]  # the notebook's sys.path
    measure: bool = False  # whether to trace what the answer allocates


class Value(NamedTuple):
    """One returned object. `array` is None for what is neither an array, a tensor nor a set of numbers."""

    type_name: str
    array: np.ndarray | None


class Error(NamedTuple):
    type_name: str
    message: str
    frames: list[tuple[str, int]]  # file and line, outermost first


class Reply(NamedTuple):
    values: list[Value]
    is_tuple: bool
    changed: list[int | str]  # positions or names of the arguments changed in place
    error: Error | None
    printed: str
    peak: int = 0  # bytes allocated at most, where the request asks for it


class CoursesOwn(Exception):
    """An answer called the course's own solution of the exercise."""


def main():
    """Answer requests until the notebook closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the notebook's business; it will end this process
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # nothing that an answer reads or writes may reach the pipes
        os.dup2(nowhere, stream)

    waiting = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(requests, waiting), daemon=True).start()
    guard = Guard()
    sys.meta_path.insert(0, guard)
    reply = "ready"
    while True:
        pickle.dump(reply, replies)
        replies.flush()
        reply = run(waiting.get(), guard)


def _receive(requests, waiting):
    """Read in a thread, so that the end of the notebook is noticed while an answer loops."""
    try:
        while True:
            waiting.put(pickle.load(requests))
    except Exception:  # noqa: BLE001 (the notebook is gone: nobody is left to tell)
        os._exit(0)


def run(request, guard):
    """Call the answer once. Returns a Reply, whatever the answer does."""
    printed = Printed()
    values, is_tuple, changed, error, peak = [], False, [], None, 0
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        warnings.catch_warnings(action="ignore"),
        np.errstate(all="ignore"),
    ):
        try:
            sys.path[:] = request.path
            guard.close(request.module, request.name)
            answer = Unpickler(io.BytesIO(request.answer)).load()
            args, kwargs = pickle.loads(request.arguments)
            if request.measure:
                tracemalloc.start()
            result = answer(*args, **kwargs)
            peak = tracemalloc.get_traced_memory()[1] if request.measure else 0
            is_tuple = type(result) is tuple
            values = [_value(part) for part in (result if is_tuple else (result,))]
            changed = _changed(args, kwargs, *pickle.loads(request.arguments))
        except BaseException as raised:  # noqa: BLE001 (SystemExit and KeyboardInterrupt too)
            error = _error(raised)
        finally:
            tracemalloc.stop()
    return Reply(values, is_tuple, changed, error, printed.getvalue(), peak)


class Printed(io.StringIO):
    """Keeps the beginning of what is printed: an endless loop may print without end."""

    def write(self, text):
        super().write(text[: max(0, PRINTED_LIMIT - self.tell())])
        return len(text)


class Unpickler(pickle.Unpickler):
    """Puts the closed door where the notebook's pickler found the course's own answer."""

    def persistent_load(self, name):
        return _closed(name)


def _closed(name):
    def closed(*args, **kwargs):
        raise CoursesOwn(f"it calls the course's own {name}: write yours")

    return closed


class Guard(importlib.abc.MetaPathFinder):
    """Closes `attention.<module>.<name>` while its exercise is checked, also when the answer imports it itself."""

    module = name = original = None

    def close(self, module, name):
        if self.original is not None:
            setattr(sys.modules[self.module], self.name, self.original)
        self.module, self.name, self.original = f"attention.{module}", name, None
        if self.module in sys.modules:
            self._replace(sys.modules[self.module])

    def _replace(self, module):
        self.original = getattr(module, self.name, None)
        setattr(module, self.name, _closed(self.name))

    def find_spec(self, fullname, path, target=None):
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if fullname == self.module else None
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_close(module):
                execute(module)
                self._replace(module)

            spec.loader.exec_module = execute_and_close
        return spec


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
    return Value(name, np.array(result) if plain and np.asarray(result).dtype.kind in "biufc" else None)


def _changed(args, kwargs, fresh_args, fresh_kwargs):
    after = {**dict(enumerate(args)), **kwargs}
    before = {**dict(enumerate(fresh_args)), **fresh_kwargs}
    return [key for key in before if not _same(before[key], after[key])]


def _same(before, after):
    if hasattr(before, "detach"):
        before, after = before.detach().numpy(), after.detach().numpy()
    if isinstance(before, np.ndarray):
        return (before.dtype, before.shape, before.tobytes()) == (after.dtype, after.shape, after.tobytes())
    return before == after


def _error(raised):
    try:
        message = str(raised)
    except Exception:  # noqa: BLE001 (the exception may be the learner's own class)
        message = ""
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(raised.__traceback__, limit=-30)]
    return Error(type(raised).__name__, message, frames)
