"""The parent's side of the worker: start it, talk to it, and notice when a kernel has killed it."""

import atexit
import ctypes
import mmap
import os
import queue
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from .worker import TIME_LIMIT, message_bytes, read_message

WORKER = Path(__file__).with_name("worker.py")
FIRST_CAPACITY = 1 << 24  # bytes of shared memory; sparse where the system can
LOOK_UP = 0.5  # seconds; on Windows an interrupt is noticed only between two waits


class WorkerDied(Exception):
    """The worker ended in the middle of a launch. `.timed_out` says whether it ended itself at the time limit, `.where` is
    then (place or None, thread, block) of what ran in a checked build."""

    def __init__(self, returncode, where=None):
        super().__init__(returncode)
        self.timed_out, self.where = returncode == TIME_LIMIT, where


class NotLoaded(Exception):
    """The system refuses to load a compiled kernel."""


class SharedMemory:
    """Memory that this process and its worker both map: a file, which has no name on Linux and macOS."""

    def __init__(self):
        self.path = None
        if hasattr(os, "memfd_create"):
            self.file = os.memfd_create("cuda-course")
        else:
            self.file, self.path = tempfile.mkstemp(prefix="cuda-course-")
            if sys.platform != "win32":
                os.unlink(self.path)
                self.path = None
        self.capacity = 0
        self.grow(FIRST_CAPACITY)

    def grow(self, needed):
        if needed <= self.capacity:
            return
        self.capacity = 1 << (needed - 1).bit_length()
        os.ftruncate(self.file, self.capacity)
        self.map = mmap.mmap(self.file, self.capacity)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def close(self):
        os.close(self.file)
        if self.path:
            try:
                os.unlink(self.path)
            except OSError:
                pass  # still mapped: Windows then keeps the file until its next clean-up


class Worker:
    """A worker process. All methods raise WorkerDied if it ends before it answers."""

    def __init__(self):
        self.owner = os.getpid()
        self.memory = SharedMemory()
        how = {"pass_fds": (self.memory.file,)}
        if sys.platform == "win32":
            how = {"creationflags": subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP}
        self.process = subprocess.Popen(
            # bufsize=0: a buffer has a lock, which a forked child would find locked for ever
            [sys.executable, "-I", "-S", str(WORKER), self.memory.path or str(self.memory.file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            **how,
        )
        self.replies = queue.SimpleQueue()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self):
        while (reply := read_message(self.process.stdout)) is not None:
            self.replies.put(reply)
        self.replies.put(None)

    def usable(self):
        return self.owner == os.getpid() and self.process.poll() is None

    def ask(self, message):
        try:
            self.process.stdin.write(message_bytes(message))
            reply = self._wait()
        except OSError:
            reply = None  # the pipe broke
        except BaseException:  # an interrupt stops the kernel too
            self.close()
            raise
        where = None
        if isinstance(reply, tuple) and reply[0] == TIME_LIMIT:
            reply, where = None, reply[1]
        if reply is None:
            status = self.process.wait()
            self.close()
            raise WorkerDied(status, where)
        if isinstance(reply, bytes):
            raise NotLoaded(f"a compiled kernel does not load: {reply.decode()}")
        if isinstance(reply, str):
            raise RuntimeError(f"the process that runs kernels failed: {reply}")  # noqa: TRY004
        return reply

    def _wait(self):
        while True:
            try:
                return self.replies.get(timeout=LOOK_UP)
            except queue.Empty:
                continue

    def describe(self, library, checked):
        return self.ask((library, checked, None))

    def run(self, library, checked, limit, *launch):
        return self.ask((library, checked, (self.memory.capacity, limit, *launch)))

    def close(self):
        if self.owner != os.getpid():
            return
        self.process.kill()
        self.process.wait()
        self.listener.join()
        self.process.stdin.close()
        self.process.stdout.close()
        self.memory.close()


_worker = None
lock = threading.RLock()  # one launch at a time


def worker():
    """The worker of this process, started when first needed and again when it has died. Hold `lock` while using it."""
    global _worker
    with lock:
        if _worker is None or not _worker.usable():
            _worker = Worker()
        return _worker


@atexit.register
def _stop():
    if _worker is not None and _worker.usable():
        _worker.close()
