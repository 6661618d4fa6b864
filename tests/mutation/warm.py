"""A pytest that has collected everything once, and then runs some tests of it again and again, each time in a fork.

`session(files, work)` calls work(Warm) where pytest would run its tests.
"""

import gc
import json
import os
import resource
import select
import signal
import sys
import time

import pytest
from _pytest.runner import runtestprotocol

from tests.mutation import transplant
from tests.mutation.mechanisms import MODULES, path_of

KILLED, SURVIVED, BROKEN, SAME, UNSEEN = "killed", "survived", "cannot be defined", "equivalent", "no test"
FACTOR, SPARE = 4, 10  # a mutant may take so many times the tests' own processor time, and so many seconds more
LONGEST = 8  # seconds of tests for one mutant; of a mutant that outlives them all, the longest tests are not run
WAIT = 300  # seconds on the wall, for a mutant that waits for ever
ROOM = 10 << 30  # bytes of memory


def session(arguments, work):
    """Run pytest's collection over files, then work(Warm). Returns pytest's status."""
    options = ["-q", "--no-header", "--no-summary", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"]
    return pytest.main([*options, *map(str, arguments)], plugins=[Plugin(work)])


class Plugin:
    def __init__(self, work):
        self.work = work

    def pytest_runtestloop(self, session):
        if session.testsfailed:
            raise session.Interrupted("a test file cannot be read")
        import torch

        torch.set_num_threads(1)
        transplant.forget_results()
        gc.collect()
        gc.freeze()
        capture = session.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            self.work(Warm(session.items))
        return True


class Warm:
    """The collected tests. items: {node id: pytest's item}."""

    def __init__(self, items):
        self.items = {item.nodeid: item for item in items}

    def trace(self, names):
        """{name: (seconds, {module: lines that ran}, [sources of kernels that ran])} of the tests that pass, from one fork."""
        found = {}

        def say(reply):
            found.update(reply)

        _fork(lambda tell: self._traced(names, tell), say, None)
        return found

    def _traced(self, names, tell):
        files = {str(path_of(module)): module for module in MODULES}
        watch = Watch(files)
        for name, following in zip(names, [*names[1:], None]):
            before = time.perf_counter()
            with watch:
                passed = self._passes(name, following)
            if passed:
                lines = {module: sorted(lines) for module, lines in watch.lines.items() if lines}
                tell({name: (round(time.perf_counter() - before, 3), lines, sorted(watch.sources))})
        return 0

    def _passes(self, name, following=None):
        """Whether a test passes: neither failed nor skipped."""
        item = self.items[name]
        reports = runtestprotocol(item, log=False, nextitem=self.items.get(following))
        return all(report.passed for report in reports)

    def verdict(self, change, names, seconds):
        """(word, the test that killed or "") of a Change under the named tests, which take so many seconds."""
        said = []
        status = _fork(lambda tell: self._judged(change, names, tell), said.append, int(FACTOR * seconds) + SPARE)
        if said and said[-1] == BROKEN:
            return BROKEN, ""
        if status == 0:
            return SURVIVED, ""
        return KILLED, (said[-1] if said else "")

    def _judged(self, change, names, tell):
        try:
            if change is not None:
                transplant.put(change)
        except Exception:  # noqa: BLE001 (a mutant may fail where it is defined)
            tell(BROKEN)
            return 1
        for name, following in zip(names, [*names[1:], None]):
            tell(name)
            item = self.items[name]
            reports = runtestprotocol(item, log=False, nextitem=self.items.get(following))
            if any(report.failed for report in reports):
                return 1
        return 0


class Watch:
    """Which lines of some files run, and which kernels."""

    def __init__(self, files):
        self.files = files

    def __enter__(self):
        from utils.cuda import Kernel

        self.lines, self.sources = {module: set() for module in self.files.values()}, set()
        self.kernel, launch = Kernel, Kernel._launch
        self.launch = launch

        def noted(kernel, *args, **kwargs):
            self.sources.add(kernel.source)
            return launch(kernel, *args, **kwargs)

        Kernel._launch = noted
        sys.settrace(self._called)

    def __exit__(self, *_):
        sys.settrace(None)
        self.kernel._launch = self.launch

    def _called(self, frame, event, argument):
        module = self.files.get(frame.f_code.co_filename)
        if module is None:
            return None
        seen = self.lines[module]
        seen.add(frame.f_lineno)

        def line(frame, event, argument):
            seen.add(frame.f_lineno)
            return line

        return line


def _fork(work, hear, seconds):
    """Run work(tell) in a fork, hear what it tells; its status, 0 only if it ended well. seconds: of processor time."""
    inlet, outlet = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(inlet)
            os.setsid()
            silence = os.open(os.devnull, os.O_RDWR)
            for number in range(3):
                os.dup2(silence, number)
            if seconds is not None:
                resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
                resource.setrlimit(resource.RLIMIT_AS, (ROOM, ROOM))
            status = work(lambda thing: os.write(outlet, json.dumps(thing).encode() + b"\n"))
        except BaseException:  # noqa: BLE001 (whatever ends it has killed the mutant)
            status = 1
        finally:
            os._exit(status)
    os.close(outlet)
    end, rest, late = time.monotonic() + WAIT, b"", False
    while not late:
        ready, _, _ = select.select([inlet], [], [], 1.0)
        chunk = os.read(inlet, 1 << 20) if ready else None
        if chunk == b"":  # closed: it has ended
            break
        *whole, rest = (rest + (chunk or b"")).split(b"\n")
        for one in whole:
            hear(json.loads(one))
        late = seconds is not None and time.monotonic() > end
    os.close(inlet)
    if late:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    try:
        os.killpg(child, signal.SIGKILL)  # what it has started, and left
    except (ProcessLookupError, PermissionError):
        pass
    return status
