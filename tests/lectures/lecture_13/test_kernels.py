"""Lecture 13 in CUDA: a softmax for each ragged row, on any degrees."""

import numpy as np
import pytest
import torch

from attention import beyond as m


def run(scores, target, n_nodes):
    """The report of the kernel, after its output has been compared."""
    kernel, launch, given = m.segment_softmax_launch(scores, target, n_nodes)
    given[2].fill_(float("nan"))
    report = kernel.check[launch](*given)
    assert report.ok, report.problems[0]
    wanted = m.segment_softmax(np.asarray(scores, np.float32)[:, None].astype(float), target, n_nodes)[:, 0]
    np.testing.assert_allclose(given[2].numpy(), wanted, rtol=0, atol=1e-6)
    return report


def test_random_degrees_agree_and_each_score_is_read_three_times():
    rng = np.random.default_rng(0)
    for n_nodes in (1, 3, 4, 5, 17):
        target = np.repeat(np.arange(n_nodes), rng.integers(0, 70, n_nodes))
        report = run(3 * rng.standard_normal(len(target)), target, n_nodes)
        loaded = sum(row.bytes for row in report.rows if row.kind == "load" and row.array == "scores")
        assert loaded == 3 * 4 * len(target) and report.global_stored == 4 * len(target)


@pytest.mark.parametrize("size", [-200.0, 1e4, -1e4])
def test_scores_far_from_zero_give_no_nan(size):
    target = np.repeat([0, 2], [5, 40])
    run(size + np.random.default_rng(1).standard_normal(45), target, 3)


def test_targets_that_are_not_sorted_are_refused():
    with pytest.raises(ValueError, match="target must be sorted"):
        m.segment_softmax_launch(np.zeros(3), np.array([1, 0, 1]), 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU, or a torch without CUDA")
def test_on_a_gpu_it_agrees_with_the_cpu():
    rng = np.random.default_rng(2)
    target = np.repeat(np.arange(50), rng.integers(0, 90, 50))
    scores = torch.from_numpy(rng.standard_normal(len(target), np.float32))
    kernel, launch, given = m.segment_softmax_launch(scores.cuda(), target, 50)
    kernel.fast[launch](*given)
    wanted = m.segment_softmax(scores.numpy()[:, None], target, 50)[:, 0]
    np.testing.assert_allclose(given[2].cpu(), wanted, atol=1e-6)
