"""Processor time and memory of running notebooks, against the budget of a lecture.

Nothing here goes by the clock on the wall: a machine with other work to do makes nothing fail. The wall time of a
notebook stands in the table and decides nothing.
"""

import os
import signal
import threading
import time

import psutil

SECONDS, MEGABYTES = 120, 2000  # of processor time, of memory: a lecture's budget
CELL_SECONDS = 180  # of processor time, after which a cell is stopped; the budget of a cell is 30
PATIENCE = 3600  # seconds on the wall after which a cell that does nothing is given up


class Usage:
    """What a kernel and the processes that it starts use, from now until `stop()`. Samples four times a second.

    A cell (see `new_cell`) that takes more than CELL_SECONDS is interrupted, and the kernel ended if that does not help.
    Processor time counts children that have ended: on Linux the system does so, elsewhere as far as they were seen.
    Memory is resident memory summed over the processes; pages that they share count once for each, so the sum errs on
    the high side.
    """

    def __init__(self, pid):
        self._kernel = psutil.Process(pid)
        self._started = time.monotonic()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._seconds = self._peak = 0.0
        self._cell_start = None
        self._seen = {}  # processor time of every process that was ever seen
        self.is_too_long = False
        self._sample()
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def seconds(self):
        """Processor time so far."""
        self._sample()
        return self._seconds

    @property
    def megabytes(self):
        """The most memory so far."""
        self._sample()
        return self._peak / 1e6

    @property
    def wall(self):
        return time.monotonic() - self._started

    def new_cell(self):
        """From here on another cell's processor time is counted."""
        self._cell_start, self.is_too_long = self.seconds, False

    def stop(self):
        self._stopped.set()

    def _watch(self):
        while not self._stopped.wait(0.25):
            self._sample()
            if self._cell_start is not None and self._seconds - self._cell_start > CELL_SECONDS:
                self._stop_cell()

    def _stop_cell(self):
        first, self.is_too_long = not self.is_too_long, True
        gentle = os.name != "nt" and self._seconds - self._cell_start < 2 * CELL_SECONDS
        try:
            if not gentle:
                self._kernel.kill()
            elif first:
                self._kernel.send_signal(signal.SIGINT)
        except psutil.Error:  # it has just ended
            pass

    def _sample(self):
        with self._lock:
            resident = counted = 0
            for process in self._processes():
                try:
                    resident += process.memory_info().rss
                    times = process.cpu_times()
                except psutil.Error:  # it ended while it was being asked
                    continue
                self._seen[process] = times.user + times.system
                counted += sum(times[:4])  # with the children that have ended, where the system counts them
            self._seconds = max(self._seconds, counted, sum(self._seen.values()))
            self._peak = max(self._peak, resident)

    def _processes(self):
        try:
            return [self._kernel, *self._kernel.children(recursive=True)]
        except psutil.Error:  # the kernel has ended
            return []


def excess(seconds, megabytes):
    """Return by what factor a notebook is over the budget; at most 1 when it keeps to it."""
    return max(seconds / SECONDS, megabytes / MEGABYTES)


def table(used):
    """Return the lines of a Markdown table. `used` maps a notebook's name to (processor seconds, wall, megabytes)."""
    width = max(map(len, used))
    lines = [
        f"| {'notebook':{width}} | processor s | wall s | megabytes | budget {SECONDS} s, {MEGABYTES} MB |",
        f"| {'-' * width} | ----------: | -----: | --------: | {'-' * 21} |",
    ]
    for name, (seconds, wall, megabytes) in sorted(used.items()):
        verdict = "OVER BUDGET" if excess(seconds, megabytes) > 1 else "kept"
        lines.append(f"| {name:{width}} | {seconds:11.0f} | {wall:6.0f} | {megabytes:9.0f} | {verdict:21} |")
    return lines
