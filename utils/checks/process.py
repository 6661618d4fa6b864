"""The notebook's end of the worker: starts it, asks it, and ends it when it takes too long or too much memory."""

import atexit
import contextlib
import importlib
import io
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import cloudpickle
import psutil

from utils.checks import Failed
from utils.checks.worker import Request

TIME_LIMIT = 10  # seconds for all calls of one check
MEMORY_LIMIT = 2 * 2**30  # bytes above what the worker had when the call began
START_LIMIT = 60  # seconds: a slow disk and a virus scanner included
ROOT = Path(__file__).resolve().parents[2]


class Stopped(Failed):
    """The answer was ended, or ended its process; the text says why."""


class NotSendable(Exception):
    """The answer holds something that cannot be copied to another process; the text names it."""


class Worker:
    """One process for all checks of a notebook. After it had to be ended, a fresh one takes its place."""

    def start(self):
        """Start the process and return at once: it gets ready in the background."""
        self._replies, self._ready, self._has_torch = queue.SimpleQueue(), False, False
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from utils.checks.worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        threading.Thread(target=_receive, args=(self._process.stdout, self._replies), daemon=True).start()

    def call(self, request, deadline):
        """The worker's Reply. Raises Stopped when there is none before `deadline` (of time.monotonic)."""
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            return self._wait(deadline)
        except OSError:
            self.restart()
            raise Stopped("its process could not be reached: check it once more") from None
        except BaseException:  # an interrupt too: the answer may still be running
            self.restart()
            raise

    def get_ready(self, request):
        """Wait until the process can answer a request at once. Raises Stopped.

        The time it takes to load torch is not the answer's.
        """
        deadline = time.monotonic() + START_LIMIT
        try:
            if self._process.poll() is not None:  # something else ended it
                self.restart()
            if not self._ready:
                self._memory_info = psutil.Process(self._process.pid).memory_info
                self._wait(deadline)
                self._ready = True
            if not self._has_torch and (b"torch" in request.answer or b"torch" in request.arguments):
                load = pickle.dumps(importlib.import_module), pickle.dumps((("torch",), {}))
                self.call(request._replace(answer=load[0], arguments=load[1]), deadline)
                self._has_torch = True
        except (Stopped, psutil.Error):
            self.stop()  # the next check starts it anew
            raise Stopped("the process that tries answers did not get ready: check once more") from None

    def _wait(self, deadline):
        allowed = self._memory() + MEMORY_LIMIT
        while True:
            try:
                reply = self._replies.get(timeout=0.05)
            except queue.Empty:
                reply = None
                if time.monotonic() > deadline:
                    raise Stopped(f"it did not finish within {TIME_LIMIT} seconds: does a loop never end?") from None
                if self._memory() > allowed:
                    raise Stopped(f"it took more than {MEMORY_LIMIT // 2**30} GB of memory") from None
            if isinstance(reply, EOFError):
                raise Stopped("it ended its Python process (a crash, or os._exit)")
            if reply is not None:
                return reply

    def _memory(self):
        try:
            return self._memory_info().rss
        except psutil.Error:  # it has just ended: the pipe will say so
            return 0

    def restart(self):
        self.stop()
        self.start()

    def stop(self):
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):  # half a request may still be in the pipe
            self._process.stdin.close()


def _receive(stream, replies):
    try:
        while True:
            replies.put(pickle.load(stream))
    except Exception:  # noqa: BLE001 (the end of the pipe, or an answer wrote into it)
        replies.put(EOFError())
    finally:
        stream.close()


class _Pickler(cloudpickle.Pickler):
    """Copies an answer with all it uses, except for the course's own answer."""

    def __init__(self, stream, own, name):
        super().__init__(stream)
        self._own, self._name = own, name

    def persistent_id(self, thing):
        return self._name if self._own is not None and thing is self._own else None

    def reducer_override(self, thing):
        if isinstance(thing, types.ModuleType) and thing.__name__.partition(".")[0] == "attention":
            raise pickle.PicklingError(f"the module {thing.__name__}: write `from {thing.__name__} import ...`")
        return super().reducer_override(thing)


def pack(answer, own, name):
    """The bytes from which the worker makes its own copy of an answer; `own` arrives there as a closed door.

    Raises NotSendable.
    """
    stream = io.BytesIO()
    attention = sys.modules.get("attention")
    if attention:  # by value: to import a whole lecture for one small function would take the worker seconds
        cloudpickle.register_pickle_by_value(attention)
    try:
        _Pickler(stream, own, name).dump(answer)
    except Exception as error:  # noqa: BLE001 (anything may refuse to be pickled)
        raise NotSendable(str(error).splitlines()[0] if str(error) else type(error).__name__) from None
    finally:
        if attention:
            cloudpickle.unregister_pickle_by_value(attention)
    return stream.getvalue()


def request(packed, args, kwargs, module, name, measure=False):
    """One call, ready to be sent: the arguments are copied here."""
    return Request(packed, pickle.dumps((args, kwargs)), module, name, list(sys.path), measure)


worker = Worker()
worker.start()
atexit.register(worker.stop)
