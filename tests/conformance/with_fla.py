"""Rows of the table for lectures 07 and 10: the naive functions of fla-core (flash-linear-attention).

Its package needs Triton and is not imported: the file `naive.py` of a mechanism is plain PyTorch and is read alone.
"""

import importlib.util
import math
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch

from attention import sparse
from attention.fundamentals import attention_torch
from tests.conformance.table import row
from tests.conformance.with_linear import HEADS, LINEAR, D, N, inputs, walked
from tests.conformance.with_torch import draw, three

FROM = f"fla-core {version('fla-core')}, "


def naive(name):
    """The file fla/ops/NAME/naive.py as a module. What it imports from the package, which needs Triton, is empty."""
    folder = Path(importlib.util.find_spec("fla").submodule_search_locations[0])
    stubs = {
        "fla": [],
        "fla.ops": [],
        "fla.ops.utils": ["prepare_chunk_offsets"],
        "fla.ops.utils.pooling": ["mean_pooling"],
    }
    spec = importlib.util.spec_from_file_location(f"naive_{name}", folder / "ops" / name / "naive.py")
    module = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules):
        for stub, names in stubs.items():
            sys.modules[stub] = ModuleType(stub)
            vars(sys.modules[stub]).update(dict.fromkeys(names))
        spec.loader.exec_module(module)
    return module


# --- 10: one line, seven models; theirs are (batch, seq, heads, d) unless turned --------------------------------------


@row("linear attention, three ways", FROM + "linear_attn/naive", {"a sum": {}, "normalised": dict(normalise=True)})
def sums(factor, normalise=False):
    q, k, v, _, _ = inputs()
    q, k = (a.abs() if normalise else a for a in (q, k))
    theirs = naive("linear_attn").naive_recurrent_linear_attn(q, k, v, scale=1.0, normalize=normalise)[0]
    turned = [a.transpose(1, 2) for a in (factor * q, k, v)]
    if normalise:  # a factor would cancel out in a mean: it stands before the values
        turned = [turned[0] / factor, turned[1], factor * turned[2]]
    return [a.swapaxes(1, 2) for a in three(LINEAR, *turned, normalise=normalise)], theirs


@row("retention", FROM + "retention/naive, the parallel form", {"all heads": {}})
def retention(factor):
    q, k, v, _, beta = inputs()
    decay = torch.log(1 - 2.0 ** (-5.0 - torch.arange(HEADS)))[None, None, :, None].expand_as(beta)
    theirs = naive("retention").naive_retention(*(a.transpose(1, 2) for a in (q, k, v))).transpose(1, 2)
    return [walked(factor * q / math.sqrt(D), k, v, decay, torch.ones_like(beta), erase=False)], theirs


@row("GLA", FROM + "gla/naive", {"a decay for each row": {}})
def gla(factor):
    q, k, v, log_decay, beta = inputs(vector=True)
    theirs = naive("gla").naive_recurrent_gla(q, k, v, log_decay)[0]
    return [walked(factor * q / math.sqrt(D), k, v, log_decay, torch.ones_like(beta), erase=False)], theirs


@row(
    "one decay a head (Mamba-2's)",
    FROM + "simple_gla/naive",
    {form: dict(form=form) for form in ("parallel", "chunk")},
)
def simple_gla(factor, form):
    q, k, v, log_decay, beta = inputs()
    found = getattr(naive("simple_gla"), f"naive_{form}_simple_gla")(q, k, v, log_decay[..., 0])[0]
    return [walked(factor * q / math.sqrt(D), k, v, log_decay, torch.ones_like(beta), erase=False)], found


@row("delta rule", FROM + "delta_rule/naive", {form: dict(form=form) for form in ("recurrence", "chunkwise")})
def delta(factor, form, n=64):
    q, k, v, log_decay, beta = (a[:, :n] for a in inputs())
    turned = [a.transpose(1, 2) for a in (q, k, v)]
    given = beta[..., 0].transpose(1, 2)
    theirs = getattr(naive("delta_rule"), f"delta_rule_{form}")(*turned, given)[0].transpose(1, 2)
    return [walked_part(factor * q / math.sqrt(D), k, v, 0 * log_decay, beta)], theirs


def walked_part(q, k, v, log_decay, beta):
    """`walked` for another length: padded with tokens whose outputs are cut off again."""
    n = q.shape[1]
    longer = [torch.nn.functional.pad(a, (0, 0, 0, 0, 0, N - n)) for a in (q, k, v, log_decay, beta)]
    return walked(*longer)[:, :n]


@row("gated delta rule", FROM + "gated_delta_rule/naive", {form: dict(form=form) for form in ("recurrent", "chunk")})
def gated_delta(factor, form):
    q, k, v, log_decay, beta = inputs()
    function = getattr(naive("gated_delta_rule"), f"naive_{form}_gated_delta_rule")
    theirs = function(q, k, v, g=log_decay[..., 0], beta=beta[..., 0])[0]
    return [walked(factor * q / math.sqrt(D), k, v, log_decay, beta)], theirs


@row("Kimi Delta Attention", FROM + "kda/naive", {"token by token": {}})
def kda(factor):
    q, k, v, log_decay, beta = inputs(vector=True)
    theirs = naive("kda").naive_recurrent_kda(q, k, v, log_decay, beta[..., 0])[0]
    return [walked(factor * q / math.sqrt(D), k, v, log_decay, beta)], theirs


@row("two reflections a token (DeltaProduct)", FROM + "gated_delta_product/naive", {"beta up to 2": {}})
def product(factor, n=35):
    """Two steps of our memory for one token of theirs; the queries of the first are not read."""
    q, k, v, log_decay, beta = inputs(largest=2.0)
    function = naive("gated_delta_product").naive_recurrent_gated_delta_product
    theirs = function(q[:, 1::2], k, v, log_decay[:, ::2, :, 0], beta[..., 0], 1 / math.sqrt(D), num_householder=2)
    decay = log_decay * (torch.arange(N) % 2 == 0)[None, :, None, None]
    ours = walked(factor * q / math.sqrt(D), k, v, decay, beta)[:, 1::2]
    return [ours], theirs[0] if isinstance(theirs, tuple) else theirs


# --- 07: compressed, selected, chosen -------------------------------------------------------------------------------


@row("compressed keys", FROM + "nsa/naive, compression", {f"blocks of {m}": dict(m=m) for m in (4, 7)})
def compression(factor, m, n=28):
    q, k, v = draw(31, *[(2, n, 3, D)] * 3)
    means = [a.unflatten(1, (n // m, m)).mean(2) for a in (k, v)]
    theirs = naive("nsa").naive_nsa_compression(q, *means, m, D**-0.5)[0]
    ours = sparse.compressed_attention(*(a.transpose(1, 2).numpy() for a in (factor * q, k, v)), m)
    return [ours.swapaxes(1, 2)], theirs


BLOCK_SPARSE = (
    sparse.block_sparse_attention_numpy,
    sparse.block_sparse_attention_torch,
    sparse.block_sparse_attention_cuda,
)


@row("selected blocks", FROM + "nsa/naive, selection", {f"{kept} blocks": dict(kept=kept) for kept in (2, 4)})
def selection(factor, kept, n=32, size=4):
    q, k, v = draw(32, *[(1, n, 3, D)] * 3)
    (scores,) = draw(33, (1, 3, n // size, n // size))
    there = torch.from_numpy(sparse.select_blocks(scores.numpy(), kept))
    order = torch.sort(there.int(), dim=-1, descending=True, stable=True)
    blocks = torch.where(order.values > 0, order.indices, -1)[..., :kept]  # (1, heads, rows, kept), -1: none
    blocks = blocks.repeat_interleave(size, 2).transpose(1, 2)
    theirs = naive("nsa").naive_nsa_selection(q, k, v, blocks, size)
    turned = [a.transpose(1, 2).contiguous() for a in (factor * q, k, v)]
    found = three(BLOCK_SPARSE, *turned, there.numpy(), size, causal=True)
    return [a.swapaxes(1, 2) for a in found], theirs


@row(
    "attention to the keys that an indexer chooses",
    FROM + "dsa/naive",
    {f"{kept} keys": dict(kept=kept) for kept in (3, 30)},
)
def indexed(factor, kept, n=30, d_model=20):
    (x,) = draw(34, (2, n, d_model))
    q, k, v = draw(35, *[(2, n, 4, D)] * 3)
    ours = sparse.LightningIndexer(d_model, 4, 8)
    for parameter, drawn in zip(ours.parameters(), draw(36, *[p.shape for p in ours.parameters()])):
        parameter.data = drawn
    keys = ours.norm(ours.key(x))
    chosen = naive("dsa").naive_dsa_indexer(
        ours.query(x).unflatten(-1, (4, 8)), keys, ours.weight(x), topk=kept, activation="relu"
    )
    theirs = naive("dsa").naive_dsa(q, k, v, None, None, indices=chosen, topk=kept)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    scores = ours(x, causal=True)
    best = torch.zeros(2, n, n, dtype=torch.bool).scatter(-1, scores.topk(kept, -1).indices, True)
    mask = best & ~scores.isinf()
    found = attention_torch(*(a.transpose(1, 2) for a in (factor * q, k, v)), mask[:, None])
    return [found.transpose(1, 2)], theirs
