"""What a kernel uses is processor time and memory, of itself and of the processes it starts."""

import subprocess
import sys

import psutil
import pytest

from utils.authoring import usage as notebook_usage

BURN = "import time\nstart = time.process_time()\nwhile time.process_time() - start < {seconds}: pass\n"


@pytest.fixture
def process():
    """Start a Python program that prints when it is ready; it is ended with the processes it started."""
    started = []

    def start(program):
        command = [sys.executable, "-c", program]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert started[-1].stdout.readline() == b"ready\n"
        return started[-1]

    yield start
    for parent in started:
        for child in psutil.Process(parent.pid).children(recursive=True) if parent.poll() is None else ():
            child.kill()
        parent.kill()
        parent.communicate()


def go(started):
    """Let a program go on, and wait until it says so again."""
    started.stdin.write(b"\n")
    started.stdin.flush()
    started.stdout.readline()


READY = "print('ready', flush=True); input()\n"


def test_memory_counts_the_child_processes(process):
    hog = "x = bytearray(200_000_000); print('ready', flush=True); input()"
    started = process(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hog!r}])")
    usage = notebook_usage.Usage(started.pid)
    assert 200 < usage.megabytes < 400
    usage.stop()


def test_memory_is_known_at_once(process):
    usage = notebook_usage.Usage(process(READY).pid)
    assert usage.megabytes > 1
    usage.stop()


def test_processor_time_counts_work_and_not_waiting(process):
    started = process(READY + "import time; time.sleep(1)\n" + BURN.format(seconds=0.5) + READY)
    usage = notebook_usage.Usage(started.pid)
    before = usage.seconds
    go(started)
    assert 0.5 <= usage.seconds - before + 0.02 < 1
    usage.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not count children that have ended")
def test_processor_time_counts_children_that_have_ended(process):
    child = BURN.format(seconds=0.5)
    started = process(READY + f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])\n" + READY)
    usage = notebook_usage.Usage(started.pid)
    before = usage.seconds
    go(started)
    assert usage.seconds - before > 0.48
    usage.stop()


def test_what_was_used_stays_known_when_the_process_has_ended(process):
    started = process(BURN.format(seconds=0.3) + READY)
    usage = notebook_usage.Usage(started.pid)
    started.kill()
    started.wait()
    assert usage.seconds > 0.28 and usage.megabytes > 1
    usage.stop()


def test_the_table_marks_what_is_over_the_budget_and_not_what_only_took_long():
    rows = notebook_usage.table({"a": (50.0, 5000.0, 100.0), "b": (121.0, 121.0, 100.0), "c": (1.0, 1.0, 2001.0)})
    assert [line.split("|")[5].strip() for line in rows[2:]] == ["kept", "OVER BUDGET", "OVER BUDGET"]
    assert notebook_usage.excess(60, 1000) == 0.5
