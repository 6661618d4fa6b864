"""Nothing a kernel does takes its process down: crashes, endless loops, deadlocks, a worker that dies, an interrupt."""

import os
import platform
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from utils import cuda
from utils.cuda.cpu import process

DOUBLE = "__global__ void twice(float* x) { x[threadIdx.x] *= 2.f; }"
WILD = "__global__ void wild(float* x) { x[(1ll << 40) * (1 + threadIdx.x)] = 1.f; }"
ENDLESS = "__global__ void endless(volatile float* x) { while (x[0] == 0.f) x[1] += 1.f; }"
SPIN = "__global__ void spin(int* x) { if (blockIdx.x == 0) while (atomicAdd(x, 0) == 0) ; else atomicExch(x, 1); }"


def still_works():
    x = np.ones(32, np.float32)
    cuda.compile(DOUBLE)[1, 32](x)
    return (x == 2).all()


def test_a_crash_of_a_plain_run_is_one_clear_error_and_the_next_launch_works():
    kernel = cuda.compile(WILD)
    with pytest.raises(cuda.KernelError, match=r"CRASH: wild crashed the process it ran in\. Run it checked"):
        kernel.fast[1, 1](np.zeros(1, np.float32))
    assert still_works()


def test_the_same_kernel_checked_says_what_is_wrong():
    report = cuda.compile(WILD).check[1, 1](np.zeros(1, np.float32))
    assert [p.kind for p in report.problems] == ["out of bounds"] and "far from every array" in str(report.problems[0])


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="ARM64 divides by zero without complaint")
def test_an_integer_division_by_zero_is_named():
    report = cuda.compile("__global__ void k(int* x) { x[0] = x[1] / x[2]; }").check[1, 1](np.zeros(3, np.int32))
    kind = "division by zero" if sys.platform == "linux" else "crash"
    assert [p.kind for p in report.problems] == [kind] and "integer division by zero" in str(report.problems[0]).lower()


@pytest.mark.parametrize("how", ["checked", "plain"])
def test_an_endless_loop_is_stopped_at_the_time_limit(how):
    kernel = cuda.compile(ENDLESS, time_limit=1)
    launch = kernel if how == "checked" else kernel.fast
    with pytest.raises(
        cuda.KernelError,
        match=r"TIME LIMIT: endless ran for 1 s and was stopped(, in thread \(0,0,0\) of block .*)?\. Look for a loop.*; or launch fewer blocks \(1\)",
    ):
        launch[1, 1](np.zeros(2, np.float32))
    assert still_works()


def test_a_block_that_waits_for_a_later_one_is_stopped():
    report = cuda.compile(SPIN, time_limit=1).check[2, 1](np.zeros(1, np.int32))
    assert [p.kind for p in report.problems] == ["time limit"] and not report.ok
    assert report.global_loaded == 0 and "TIME LIMIT" in str(report) and report.table()
    assert still_works()


def test_a_deadlock_of_a_plain_run_is_named_too():
    kernel = cuda.compile("""
__global__ void stuck(float* x) {
  if (threadIdx.x < 16) __syncwarp();
  __syncthreads();
}""")
    with pytest.raises(cuda.KernelError, match="DEADLOCK .*line 3"):
        kernel.fast[1, 32](np.zeros(1, np.float32))
    assert still_works()


def test_a_worker_that_died_between_launches_is_replaced():
    assert still_works()
    first = process.worker().process
    first.kill()
    first.wait()
    assert still_works()


def test_a_worker_that_dies_during_a_launch_is_a_clear_error():
    kernel = cuda.compile("__global__ void k(float* x) { *(volatile int*)8 = 1; }")
    assert still_works()
    with pytest.raises(cuda.KernelError, match="CRASH"):
        kernel.fast[1, 1](np.zeros(1, np.float32))
    assert still_works()


def run_script(body, **how):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(body)], stdout=subprocess.PIPE, text=True, **how)


ENDLESS_SCRIPT = f"""
    import numpy as np
    from utils import cuda
    from utils.cuda.cpu import process
    kernel = cuda.compile({ENDLESS!r})
    print(process.worker().process.pid, flush=True)
    try:
        kernel.fast[1, 1](np.zeros(2, np.float32))
    except KeyboardInterrupt:
        x = np.ones(32, np.float32)
        cuda.compile({DOUBLE!r})[1, 32](x)
        print("interrupted, and goes on:", x[0], flush=True)
    """


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        with open(f"/proc/{pid}/stat") as stat:  # a zombie waits only for its parent to look
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def gone_within(pid, seconds):
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_stops_the_kernel_and_the_next_launch_works():
    script = run_script(ENDLESS_SCRIPT)
    worker = int(script.stdout.readline())
    time.sleep(1)
    script.send_signal(signal.SIGINT)
    assert script.communicate(timeout=60)[0] == "interrupted, and goes on: 2.0\n"
    assert script.returncode == 0 and gone_within(worker, 10)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_its_parent_even_in_an_endless_kernel(how):
    script = run_script(ENDLESS_SCRIPT)
    worker = int(script.stdout.readline())
    time.sleep(0.5)
    script.send_signal(how)
    script.wait(60)
    assert gone_within(worker, 10)


def test_a_script_needs_no_main_guard_and_leaves_nothing_running():
    script = run_script(f"""
        import numpy as np
        from utils import cuda
        from utils.cuda.cpu import process
        x = np.ones(32, np.float32)
        cuda.compile({DOUBLE!r})[1, 32](x)
        print(process.worker().process.pid, x[0])
        """)
    pid, value = script.communicate(timeout=60)[0].split()
    assert value == "2.0" and script.returncode == 0
    if sys.platform == "linux":
        assert gone_within(int(pid), 10)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_gets_a_worker_of_its_own():
    assert still_works()
    mine = process.worker().process.pid
    child = os.fork()
    if child == 0:
        ok = still_works() and process.worker().process.pid != mine
        process.worker().close()
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert still_works() and process.worker().process.pid == mine


def test_arrays_larger_than_the_first_shared_memory_come_back():
    x = np.ones(6_000_000, np.float32)
    cuda.compile("__global__ void first(float* x, int n) { x[n - 1] = 7.f; }").fast[1, 1](x, x.size)
    assert x[-1] == 7 and x[:-1].sum() == x.size - 1


def test_a_plain_run_does_not_depend_on_the_number_of_threads(monkeypatch):
    source = "__global__ void k(float* y) { y[32 * blockIdx.x + threadIdx.x] = expf(.1f * blockIdx.x + threadIdx.x); }"
    kernel, results = cuda.compile(source), []
    for cores in (1, 2, 3):
        monkeypatch.setattr("utils.cuda.kernel._cores", lambda cores=cores: cores)
        y = np.zeros(320, np.float32)
        kernel.fast[10, 32](y)
        results.append(y)
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


def test_a_sum_by_atomics_is_the_same_every_time():
    source = "__global__ void k(const float* x, float* s) { atomicAdd(s, x[blockIdx.x * 32 + threadIdx.x]); }"
    kernel = cuda.compile(source)
    x, seen = np.random.default_rng(0).random(3200, dtype=np.float32), set()
    for _ in range(3):
        s = np.zeros(1, np.float32)
        kernel.fast[100, 32](x, s)
        seen.add(float(s[0]))
    assert len(seen) == 1
