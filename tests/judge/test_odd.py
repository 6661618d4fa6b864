"""What spoils the next check: after it a fresh process takes over, and no child is left behind."""

import functools
import os
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import torch

from tests.judge import specimens
from utils.judge import process


def replaces_exp(x, axis=-1):
    np.sum = lambda *args, **kwargs: 0
    return x / x.sum(axis, keepdims=True)


def changes_the_default_type(x, axis=-1):
    torch.set_default_dtype(torch.float64)
    return x / x.sum(axis, keepdims=True)


def wraps_a_function_of_torch(x, axis=-1):
    torch.manual_seed = functools.wraps(torch.manual_seed)(lambda seed: None)
    return x / x.sum(axis, keepdims=True)


def changes_the_folder(x, axis=-1):
    os.chdir("/")
    return x / x.sum(axis, keepdims=True)


def leaves_a_child(x, axis=-1):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
    return x / x.sum(axis, keepdims=True)


def forks(x, axis=-1):
    os.fork()
    return x / x.sum(axis, keepdims=True)


def leaves_a_thread(x, axis=-1):
    threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
    return x / x.sum(axis, keepdims=True)


@pytest.mark.parametrize(
    "answer",
    [replaces_exp, wraps_a_function_of_torch, changes_the_default_type, changes_the_folder]
    + [leaves_a_child, forks, leaves_a_thread],
    ids=lambda answer: answer.__name__,
)
def test_after_something_odd_a_fresh_process_takes_over(answer):
    specimens.shares.judge(specimens.shares.oracle)
    before = process.worker._process.pid
    specimens.shares.judge(answer)
    assert process.worker._process.pid != before
    assert not psutil.pid_exists(before)

    def looks(x, axis=-1):
        assert np.sum([1, 2]) == 3 and torch.get_default_dtype() == torch.float32 and threading.active_count() <= 2
        return x / x.sum(axis, keepdims=True)

    assert specimens.shares.judge(looks).passed
    now = process.worker._process.pid
    assert specimens.shares.judge(looks).passed and process.worker._process.pid == now, "nothing odd, the same process"


def test_what_torch_imports_at_the_first_step_is_nothing_odd():
    """An optimiser's first step imports a part of torch that wraps torch.manual_seed: a fresh process costs seconds."""
    process.worker.restart()
    specimens.training_step.judge(specimens.training_step.oracle)
    before = process.worker._process.pid
    assert specimens.training_step.judge(specimens.training_step.oracle).passed
    assert process.worker._process.pid == before


def test_no_child_is_left_behind():
    def children_of(pid):
        return {p.pid for p in psutil.process_iter() if psutil.pid_exists(p.pid) and p.ppid() == pid}

    def twice_removed(x, axis=-1):
        code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(987)'], start_new_session=True)"
        subprocess.run([sys.executable, "-c", code], check=True)
        return x / x.sum(axis, keepdims=True)

    specimens.shares.judge(twice_removed)
    sleeping = [p for p in psutil.process_iter(["cmdline"]) if "time.sleep(987)" in " ".join(p.info["cmdline"] or [])]
    assert [p for p in sleeping if p.status() != psutil.STATUS_ZOMBIE] == []
