"""The notebook's end of the worker: starts it, asks it, and ends it when it takes too long or too much memory."""

import atexit
import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import psutil

from utils.judge import wire
from utils.judge.packing import pack
from utils.judge.result import Stopped
from utils.judge.worker import Ask, Load
from utils.paths import ROOT

TIME_LIMIT = 10  # seconds of processor time for all calls of one check: on a busy machine they take longer
WALL_LIMIT = 60  # seconds on the clock, for an answer that waits for something
MEMORY_LIMIT = 2 * 2**30  # bytes above what the worker had when the call began
START_LIMIT = 120  # seconds: a slow disk and a virus scanner included
NO_LIMIT = float("inf")
NOT_READY = "the process that tries answers did not get ready: check once more"

ENDED = "it ended its Python process (a crash, or os._exit)"
WROTE = "it wrote into a pipe of its Python process: close and write only files that you opened"


class Place(NamedTuple):
    """Where answers are tried that were handed in: which modules they find, where they may write, and behind what walls."""

    path: list[str]  # sys.path, the course's modules first
    folder: str  # the working directory, and the home, of the process
    has_walls: bool

    def first(self):
        """The statement with which the process begins."""
        if not self.has_walls:
            return ""
        readable = [entry for entry in self.path if os.path.isdir(entry)]
        return f"from utils.judge import walls; walls.close({readable!r}, [{self.folder!r}]); "

    def environment(self):
        names = ("HOME", "TMPDIR", "XDG_CACHE_HOME", "MPLCONFIGDIR")
        return {name: self.folder for name in names} | {"PYTHONPATH": os.pathsep.join(self.path)}


class Worker:
    """One process for all checks of a notebook. After it had to be ended, a fresh one takes its place."""

    _process = None
    place = None  # a Place; where there is none, answers are tried where the notebook is

    def start(self, imports=()):
        """Start the process and return at once: it gets ready, and imports modules, in the background."""
        self._replies, self._ready, self._number, self._spoilt = queue.SimpleQueue(), False, 0, False
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        first = self.place.first() if self.place else ""
        code = first + "; ".join(
            ["from utils.judge.worker import main", *(f"import {name}" for name in imports), "main()"]
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
            | (self.place.environment() if self.place else {}),
            cwd=self.place and self.place.folder,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            start_new_session=os.name == "posix",
        )
        atexit.register(self.stop)
        threading.Thread(target=_receive, args=(self._process.stdout, self._replies), daemon=True).start()

    def load(self, packed, module, name):
        """Hand over an answer, which is asked until the next one comes; returns the Reply. Raises Stopped.

        What the answer needs to be imported is imported here: none of it is the answer's time.
        """
        try:
            if self._process is None or self._process.poll() is not None:  # never started, or ended from outside
                self.restart()
            if not self._ready:
                self._seen = psutil.Process(self._process.pid)
                self._await(Clock(NO_LIMIT, START_LIMIT, running=True))
                self._ready = True
        except (Stopped, psutil.Error):
            self.stop()  # the next check starts it anew
            raise Stopped(NOT_READY) from None
        self._clock = Clock(TIME_LIMIT, WALL_LIMIT)
        path = list(self.place.path if self.place else sys.path)
        return self._send(Load(self._next(), packed, module, name, path), Clock(NO_LIMIT, START_LIMIT, True))

    def ask(self, args, kwargs, driver="", measure=False):
        """The Reply of the answer that was loaded. Raises Stopped when there is none in time."""
        return self._send(Ask(self._next(), pack((args, kwargs)), driver, measure), self._clock)

    def finish(self):
        """End a check: a process in which something odd happened is replaced."""
        if self._process and (self._spoilt or self._children()):
            self.restart()

    def _next(self):
        self._number += 1
        return self._number

    def _send(self, request, clock):
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            return self._await(clock)
        except OSError:
            self.restart()
            raise Stopped("its process could not be reached: check it once more") from None
        except BaseException:  # an interrupt too: the answer may still be running
            self.restart()
            raise

    def _await(self, clock):
        """The reply to the last request. Other states only stop and start the clock."""
        allowed = self._memory() + MEMORY_LIMIT
        while True:
            try:
                reply = self._replies.get(timeout=0.05)
            except queue.Empty:
                clock.check(self._seconds())
                if self._memory() > allowed:
                    raise Stopped(f"it took more than {MEMORY_LIMIT // 2**30} GB of memory") from None
                continue
            if isinstance(reply, wire.Broken):
                raise Stopped(ENDED if reply.ended else WROTE)
            if (
                reply.number != self._number
            ):  # from an answer that went on after its time, or from a copy of the process
                self._spoilt = True
            elif reply.state in ("running", "importing"):
                clock.turn(reply.state == "running", self._seconds())
            else:
                clock.turn(False, self._seconds())
                clock.check(self._seconds())
                self._spoilt = self._spoilt or bool(reply.odd)
                return reply

    def _memory(self):
        try:
            return self._seen.memory_info().rss
        except psutil.Error:  # it has just ended: the pipe will say so
            return 0

    def _seconds(self):
        """Seconds of processor time that the process and its children have used."""
        try:
            return sum(sum(p.cpu_times()[:2]) for p in (self._seen, *self._children()))
        except psutil.Error:
            return 0.0

    def _children(self):
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.Error:
            return []

    def restart(self):
        self.stop()
        self.start()

    def stop(self):
        """End the process and whatever an answer started in it."""
        if self._process is None:
            return
        atexit.unregister(self.stop)
        left = self._children()
        self._process.kill()
        for process in [*left, *_of_session(self._process.pid)]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):  # half a request may still be in the pipe
            self._process.stdin.close()
        self._process = None


class Clock:
    """Counts processor time and time on the wall, while it runs."""

    def __init__(self, seconds, on_the_wall, running=False):
        self._left, self._wall = seconds, on_the_wall
        self._limit = seconds
        self._since = (0.0, time.monotonic()) if running else None

    def turn(self, running, used):
        """Start or stop; used: seconds of processor time until now."""
        if self._since:
            self._left -= max(0.0, used - self._since[0])
            self._wall -= time.monotonic() - self._since[1]
        self._since = (used, time.monotonic()) if running else None

    def check(self, used):
        """Raise Stopped where the time is up."""
        if self._since:
            self.turn(True, used)
        if self._left < 0:
            raise Stopped(f"it did not finish within {self._limit} seconds: does a loop never end?")
        if self._wall < 0:
            raise Stopped("it did not finish, and did nothing: does it wait for something?")


def _of_session(leader):
    """Processes that began in the session of a process."""
    if os.name != "posix":
        return
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if process.pid != leader and os.getsid(process.pid) == leader:
                yield process


def _receive(stream, replies):
    try:
        while True:
            replies.put(wire.read(stream))
    except wire.Broken as broken:  # the end of the pipe, or an answer wrote into it
        replies.put(broken)
    finally:
        stream.close()


worker = Worker()  # it starts with the first check, or in the background
