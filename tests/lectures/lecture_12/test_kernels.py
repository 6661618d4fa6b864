"""Lecture 12 in CUDA: slots sorted by expert, weights read once a tile, and the function that puts the kernels together."""

import re

import numpy as np
import pytest
import torch

from utils import cuda

g = pytest.importorskip("attention.mixture")
if not hasattr(g, "experts_launch"):
    pytest.skip("lecture 12 has no CUDA part yet", allow_module_level=True)


def draw(seed, n, d_model, n_experts, d_head, lead=()):
    """x, w_router, w_q, w_k, w_v, w_o in double precision."""
    rng = np.random.default_rng(seed)
    shapes = (d_model, n_experts), (n_experts, d_model, d_head), (d_model, d_head), (d_model, d_head)
    weights = [
        rng.standard_normal(shape) / max(1, shape[-2]) ** 0.5 for shape in (*shapes, (n_experts, d_head, d_model))
    ]
    return rng.standard_normal((*lead, n, d_model)), *weights


def routed(x, w_router, w_q, w_k, w_v, w_o, top_k, causal=False):
    """One token and one of its experts at a time, in float64."""
    x, w_router, w_q, w_k, w_v, w_o = (np.asarray(a, float) for a in (x, w_router, w_q, w_k, w_v, w_o))
    out = np.zeros(x.shape)
    for at in np.ndindex(x.shape[:-1]):
        end = at[-1] + 1 if causal else x.shape[-2]
        keys, values, logits = x[at[:-1]][:end] @ w_k, x[at[:-1]][:end] @ w_v, x[at] @ w_router
        chosen = np.argsort(-logits, kind="stable")[:top_k]
        gates = np.exp(logits[chosen] - logits[chosen].max())
        for expert, gate in zip(chosen, gates / gates.sum()):
            scores = keys @ (x[at] @ w_q[expert]) / w_q.shape[2] ** 0.5
            powers = np.exp(scores - scores.max())
            out[at] += gate * (powers @ values / powers.sum()) @ w_o[expert]
    return out


def compare(got, wanted, tolerance=1e-5):
    assert got.shape == wanted.shape
    largest = max(1e-3, np.abs(wanted).max(initial=0))
    np.testing.assert_allclose(np.asarray(got, float), wanted, rtol=0, atol=tolerance * largest)


def launched(seed, n, d_model, n_experts, d_head, top_k):
    """experts_launch for the queries of some drawn tokens, with their gates; and the slots."""
    x, w_router, w_q, *_ = draw(seed, n, d_model, n_experts, d_head)
    chosen, gates = g.route(x, w_router, top_k)
    token, row, slot, tiles = slots = g.routed_slots(chosen[None], n_experts)
    rows, w_q = torch.from_numpy(x).float(), torch.from_numpy(w_q).float()
    return g.experts_launch(rows, w_q, token, row, gates.reshape(-1)[slot.long()], tiles), slots


def of(report, array):
    return sum(row.bytes for row in report.rows if row.array == array)


def test_twenty_random_sizes_agree_and_read_what_the_formula_says():
    rng = np.random.default_rng(0)
    for turn in range(20):
        n, d_model, n_experts, d_head = (int(x) for x in rng.integers(1, (90, 70, 9, 90)))
        top_k = int(rng.integers(1, n_experts + 1))
        (kernel, launch, given), (token, row, slot, tiles) = launched(turn, n, d_model, n_experts, d_head, top_k)
        report = kernel.check[launch](*given)
        assert report.ok, report.problems[0]
        x, w, _, _, gates, _, y, *_ = given
        wanted = np.zeros(y.shape)
        for expert, begin, end in tiles.tolist():
            for s in range(begin, end):
                wanted[row[s]] = float(gates[s]) * (x[token[s]].double().numpy() @ w[expert].double().numpy())
        compare(y, wanted)
        assert (of(report, "x"), of(report, "w"), of(report, "y")) == g.experts_bytes(tiles, d_model, d_head)


def test_it_has_no_bank_conflicts_and_reads_side_by_side_with_all_threads():
    (kernel, launch, given), (*_, tiles) = launched(1, 200, 64, 8, 64, 2)
    report = kernel.check[launch](*given)
    assert report.bank_conflicts == 0 and report.shared_bytes <= 48 * 1024
    assert all(row.sectors == row.ideal_sectors for row in report.rows if row.array in ("x", "w", "y"))
    assert report.workers["w", "load"] == 256 * len(tiles)


@pytest.mark.parametrize("which", [0, 1])
def test_every_barrier_is_needed_and_its_absence_reported(which):
    (kernel, launch, given), _ = launched(2, 40, 70, 3, 24, 2)
    barriers = list(re.finditer(r"__syncthreads\(\);", kernel.source))
    assert len(barriers) == 2
    source = kernel.source[: barriers[which].start()] + kernel.source[barriers[which].end() :]
    report = cuda.compile(source, name="grouped_matmul").check[launch](*given)
    assert {"race", "out of bounds"} & {problem.kind for problem in report.problems}


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_slots_are_sorted_by_expert_and_each_stands_in_one_tile(top_k):
    chosen = torch.from_numpy(
        np.random.default_rng(3).permuted(np.tile(np.arange(5), (2, 70, 1)), axis=-1)[..., :top_k]
    )
    token, row, slot, tiles = g.routed_slots(chosen, 5)
    assert sorted(slot.tolist()) == sorted(row.tolist()) == list(range(140 * top_k))
    assert [s for _, begin, end in tiles.tolist() for s in range(begin, end)] == list(range(140 * top_k))
    for expert, begin, end in tiles.tolist():
        assert 0 < end - begin <= 32 and (chosen.reshape(-1)[slot[begin:end].long()] == expert).all()
    heads = chosen.movedim(-1, 1).reshape(-1)  # (batch, top_k, seq)
    assert (heads[row.long()] == chosen.reshape(-1)[slot.long()]).all() and (token == slot // top_k).all()


# --- the function around it ------------------------------------------------------------------------------------------


def test_twenty_random_layers_agree():
    rng = np.random.default_rng(4)
    for turn in range(20):
        n, d_model, n_experts, d_head = (int(x) for x in rng.integers(1, (70, 70, 9, 70)))
        options = int(rng.integers(1, n_experts + 1)), bool(rng.integers(2))
        arrays = draw(turn, n, d_model, n_experts, d_head, (2,))
        compare(g.mixture_attention_cuda(*arrays, *options), routed(*arrays, *options))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("lead", "shape", "top_k"), [
    ((), (5, 6, 3, 4), 2), ((0,), (5, 6, 3, 4), 2), ((2, 3), (5, 6, 3, 4), 1), ((2,), (0, 6, 3, 4), 2),
    ((2,), (1, 1, 1, 1), 1), ((), (40, 8, 4, 5), 4), ((2,), (3, 0, 2, 3), 1),
])  # fmt: skip
def test_arrays_and_tensors_of_any_size_come_back_in_their_kind(lead, shape, top_k, causal):
    arrays = draw(5, *shape, lead)
    wanted = routed(*arrays, top_k, causal)
    out = g.mixture_attention_cuda(*arrays, top_k, causal)
    assert out.dtype == np.float64
    compare(out, wanted)
    out = g.mixture_attention_cuda(*(torch.from_numpy(a) for a in arrays), top_k, causal)
    assert isinstance(out, torch.Tensor) and out.dtype == torch.float64
    compare(out, wanted)


def test_equal_logits_go_to_the_first_experts():
    arrays = list(draw(6, 9, 4, 5, 3))
    arrays[1][:] = 0
    compare(g.mixture_attention_cuda(*arrays, 2), routed(*arrays, 2))
    compare(
        g.mixture_attention_cuda(*arrays, 2),
        routed(arrays[0], arrays[1][:, :2], arrays[2][:2], *arrays[3:5], arrays[5][:2], 2),
    )


def test_what_comes_later_changes_nothing_be_it_nan():
    x, *weights = draw(7, 20, 8, 4, 5)
    clean = g.mixture_attention_cuda(x, *weights, 2, True)
    x[12] = np.nan
    out = g.mixture_attention_cuda(x, *weights, 2, True)
    np.testing.assert_allclose(out[:12], clean[:12], rtol=1e-6)
    assert np.isnan(out[12:]).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU, or a torch without CUDA")
def test_on_a_gpu_it_agrees_with_the_cpu():
    arrays = draw(8, 300, 64, 8, 64, (2,))
    out = g.mixture_attention_cuda(*(torch.from_numpy(a).cuda() for a in arrays), 2, True)
    compare(out.cpu(), routed(*arrays, 2, True))
