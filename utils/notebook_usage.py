"""Time and memory of running notebooks, against the budget of a lecture."""

import threading
import time

import psutil

SECONDS, MEGABYTES = 180, 2000  # a lecture's budget on two cores


class Usage:
    """Wall time and peak memory of a kernel and the processes that it starts, from now until `stop()`.

    Memory is resident memory summed over the processes and sampled four times a second. Pages that they share count
    once for each, so the sum errs on the high side.
    """

    def __init__(self, pid):
        self._started = time.monotonic()
        self._kernel = psutil.Process(pid)
        self._stopped = threading.Event()
        self._peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def seconds(self):
        return time.monotonic() - self._started

    @property
    def megabytes(self):
        return self._peak / 1e6

    def stop(self):
        self._stopped.set()

    def _watch(self):
        while not self._stopped.is_set():
            self._peak = max(self._peak, self._resident())
            self._stopped.wait(0.25)

    def _resident(self):
        total = 0
        try:
            for process in [self._kernel, *self._kernel.children(recursive=True)]:
                total += process.memory_info().rss
        except psutil.Error:  # a process ended while it was being asked
            pass
        return total


def excess(seconds, megabytes):
    """Return by what factor a notebook is over the budget; at most 1 when it keeps to it."""
    return max(seconds / SECONDS, megabytes / MEGABYTES)


def table(used):
    """Return the lines of a Markdown table. `used` maps a notebook's name to (seconds, megabytes)."""
    width = max(map(len, used))
    lines = [f"| {'notebook':{width}} | seconds | megabytes | budget {SECONDS} s, {MEGABYTES} MB |",
             f"| {'-' * width} | ------: | --------: | {'-' * 20} |"]
    for name, (seconds, megabytes) in sorted(used.items()):
        verdict = "OVER BUDGET" if excess(seconds, megabytes) > 1 else "kept"
        lines.append(f"| {name:{width}} | {seconds:7.0f} | {megabytes:9.0f} | {verdict:20} |")
    return lines
