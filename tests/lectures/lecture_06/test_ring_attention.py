"""Ring attention on real processes: equal to one process, and a clear end when a rank fails."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from attention.flash import ring_attention, ring_attention_numpy
from attention.fundamentals import attention_numpy
from utils.paths import ROOT

pytestmark = pytest.mark.slow  # each test starts processes that import torch


def draw(n, d=8, d_v=5, dtype=np.float64):
    rng = np.random.default_rng(n)
    return [rng.standard_normal((n, width)).astype(dtype) for width in (d, d, d_v)]


def test_four_processes_equal_one_under_a_causal_mask():
    q, k, v = draw(36)
    out = ring_attention(q, k, v, n_ranks=4, causal=True)
    np.testing.assert_allclose(out, attention_numpy(q, k, v, causal=True), rtol=0, atol=1e-6)


def test_contiguous_parts_and_single_precision_give_the_same():
    q, k, v = draw(10, dtype=np.float32)
    out = ring_attention(q, k, v, n_ranks=2, causal=True, scale=0.3, striped=False)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, attention_numpy(q, k, v, causal=True, scale=0.3), rtol=0, atol=1e-6)


def test_a_rank_that_dies_is_named_and_not_the_time_limit():
    q, k, v = draw(16)
    with pytest.raises(RuntimeError, match="rank 2 of 4 ended with exit code 3"):  # and not that ranks were not done
        ring_attention(q, k, v, n_ranks=4, time_limit=300, dies=2)


def test_ranks_that_are_not_done_in_time_are_named_at_the_time_limit():
    q, k, v = draw(16)
    with pytest.raises(RuntimeError, match=r"ranks \[0, 1\] were not done after 0.2 seconds"):
        ring_attention(q, k, v, n_ranks=2, time_limit=0.2)


@pytest.mark.parametrize("striped", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n_ranks", [1, 2, 3, 6])
def test_the_schedule_in_one_process_equals_attention(n_ranks, causal, striped):
    q, k, v = draw(12)
    positions = np.arange(12).reshape(-1, n_ranks).T if striped else np.arange(12).reshape(n_ranks, -1)
    out = np.empty_like(v)
    out[positions] = ring_attention_numpy(q[positions], k[positions], v[positions], positions, causal)
    np.testing.assert_allclose(out, attention_numpy(q, k, v, causal=causal), rtol=0, atol=1e-12)


def test_shapes_that_do_not_fit_get_one_sentence():
    q, k, v = draw(10)
    with pytest.raises(ValueError, match="n a multiple of 4, got"):
        ring_attention(q, k, v, n_ranks=4)
    with pytest.raises(ValueError, match="n a multiple of 2, got"):
        ring_attention(q[:8], k, v, n_ranks=2)


STRANGE_HOST = ["unshare", "--uts", "sh", "-c", 'hostname no-such-host.invalid && exec "$@"', "sh"]


def may_rename_the_host():
    return (
        bool(shutil.which("unshare"))
        and not subprocess.run([*STRANGE_HOST, "true"], check=False, capture_output=True).returncode
    )


@pytest.mark.skipif(not may_rename_the_host(), reason="a host name of its own needs Linux and root")
def test_a_host_name_that_nothing_resolves_is_no_reason_for_a_warning():
    program = """if __name__ == "__main__":
    import numpy as np
    from attention.flash import ring_attention
    print(ring_attention(*np.ones((3, 8, 2)), n_ranks=2).sum())"""
    command = [*STRANGE_HOST, sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("16.0", "")
