"""Rows beside packages that are none of the course's: fla-core (flash-linear-attention) and torch-geometric.

    python -m pip install --no-deps fla-core==0.6.0 torch-geometric==2.8.1 xxhash   # in an environment of your own
    python -m pytest -n 0 tests/conformance/test_elsewhere.py

They stand in no requirements file, so these rows are not in the table, and their tests are skipped where a package is
missing. With the two versions above the largest difference of all rows is 4e-7 (measured on 2026-11-30). Of fla-core single files are read, those that need no Triton (`naive.py` of a mechanism); it is not imported.
"""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy as np
import torch

from attention import beyond, sparse
from attention.fundamentals import attention_torch
from tests.conformance.table import Row
from tests.conformance.with_beyond import graph
from tests.conformance.with_linear import HEADS, LINEAR, D, N, inputs, walked
from tests.conformance.with_torch import draw, three

ROWS = []


def missing(oracle):
    """The name of the package that a row of this oracle needs and that is not there, "" where it is."""
    package = oracle.split(" ")[0]
    return "" if importlib.util.find_spec({"fla-core": "fla"}.get(package, package.replace("-", "_"))) else package


def row(mechanism, oracle, cases):
    def register(run):
        ROWS.append(Row(mechanism, oracle, run, cases))
        return run

    return register


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


@row("linear attention, three ways", "fla-core linear_attn/naive", {"a sum": {}, "normalised": dict(normalise=True)})
def sums(factor, normalise=False):
    q, k, v, _, _ = inputs()
    q, k = (a.abs() if normalise else a for a in (q, k))
    theirs = naive("linear_attn").naive_recurrent_linear_attn(q, k, v, scale=1.0, normalize=normalise)[0]
    turned = [a.transpose(1, 2) for a in (factor * q, k, v)]
    if normalise:  # a factor would cancel out in a mean: it stands before the values
        turned = [turned[0] / factor, turned[1], factor * turned[2]]
    return [a.swapaxes(1, 2) for a in three(LINEAR, *turned, normalise=normalise)], theirs


@row("retention", "fla-core retention/naive, the parallel form", {"all heads": {}})
def retention(factor):
    q, k, v, _, beta = inputs()
    decay = torch.log(1 - 2.0 ** (-5.0 - torch.arange(HEADS)))[None, None, :, None].expand_as(beta)
    theirs = naive("retention").naive_retention(*(a.transpose(1, 2) for a in (q, k, v))).transpose(1, 2)
    return [walked(factor * q / math.sqrt(D), k, v, decay, torch.ones_like(beta), erase=False)], theirs


@row("GLA", "fla-core gla/naive", {"a decay for each row": {}})
def gla(factor):
    q, k, v, log_decay, beta = inputs(vector=True)
    theirs = naive("gla").naive_recurrent_gla(q, k, v, log_decay)[0]
    return [walked(factor * q / math.sqrt(D), k, v, log_decay, torch.ones_like(beta), erase=False)], theirs


@row(
    "one decay a head (Mamba-2's)",
    "fla-core simple_gla/naive",
    {form: dict(form=form) for form in ("parallel", "chunk")},
)
def simple_gla(factor, form):
    q, k, v, log_decay, beta = inputs()
    found = getattr(naive("simple_gla"), f"naive_{form}_simple_gla")(q, k, v, log_decay[..., 0])[0]
    return [walked(factor * q / math.sqrt(D), k, v, log_decay, torch.ones_like(beta), erase=False)], found


@row("delta rule", "fla-core delta_rule/naive", {form: dict(form=form) for form in ("recurrence", "chunkwise")})
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


@row("gated delta rule", "fla-core gated_delta_rule/naive", {form: dict(form=form) for form in ("recurrent", "chunk")})
def gated_delta(factor, form):
    q, k, v, log_decay, beta = inputs()
    function = getattr(naive("gated_delta_rule"), f"naive_{form}_gated_delta_rule")
    theirs = function(q, k, v, g=log_decay[..., 0], beta=beta[..., 0])[0]
    return [walked(factor * q / math.sqrt(D), k, v, log_decay, beta)], theirs


@row("Kimi Delta Attention", "fla-core kda/naive", {"token by token": {}})
def kda(factor):
    q, k, v, log_decay, beta = inputs(vector=True)
    theirs = naive("kda").naive_recurrent_kda(q, k, v, log_decay, beta[..., 0])[0]
    return [walked(factor * q / math.sqrt(D), k, v, log_decay, beta)], theirs


@row("two reflections a token (DeltaProduct)", "fla-core gated_delta_product/naive", {"beta up to 2": {}})
def product(factor, n=35):
    """Two steps of our memory for one token of theirs; the queries of the first are not read."""
    q, k, v, log_decay, beta = inputs(largest=2.0)
    function = naive("gated_delta_product").naive_recurrent_gated_delta_product
    theirs = function(q[:, 1::2], k, v, log_decay[:, ::2, :, 0], beta[..., 0], 1 / math.sqrt(D), num_householder=2)
    decay = log_decay * (torch.arange(N) % 2 == 0)[None, :, None, None]
    ours = walked(factor * q / math.sqrt(D), k, v, decay, beta)[:, 1::2]
    return [ours], theirs[0] if isinstance(theirs, tuple) else theirs


# --- 07: compressed, selected, chosen -------------------------------------------------------------------------------


@row("compressed keys", "fla-core nsa/naive, compression", {f"blocks of {m}": dict(m=m) for m in (4, 7)})
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


@row("selected blocks", "fla-core nsa/naive, selection", {f"{kept} blocks": dict(kept=kept) for kept in (2, 4)})
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
    "fla-core dsa/naive",
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


# --- 13: graphs and sets ----------------------------------------------------------------------------------------------

GRAPHS = {"20 nodes, 70 edges": dict(n=20, n_edges=70), "6 nodes, 18 edges": dict(n=6, n_edges=18)}


@row("graph attention, one head", "torch-geometric GATConv", GRAPHS)
def gat(factor, n, n_edges):
    from torch_geometric.nn import GATConv

    h, target, source, w, a_target, a_source = graph(n, n_edges)
    theirs = GATConv(h.shape[1], w.shape[1], add_self_loops=False, bias=False)
    theirs.lin.weight.data = w.T.contiguous()
    theirs.att_src.data, theirs.att_dst.data = a_source[None, None], a_target[None, None]
    edges = torch.from_numpy(np.stack([source, target]))
    weights = (a.numpy() for a in (w, factor * a_target, factor * a_source))
    return [beyond.graph_attention(h.numpy(), source, target, *weights)[0]], theirs(h, edges)


@row("graph attention that ranks anew (GATv2), one head", "torch-geometric GATv2Conv", GRAPHS)
def gatv2(factor, n, n_edges):
    from torch_geometric.nn import GATv2Conv

    h, target, source, w, a, _ = graph(n, n_edges)
    (w_target,) = draw(37, w.shape)
    theirs = GATv2Conv(h.shape[1], w.shape[1], add_self_loops=False, bias=False)
    theirs.lin_l.weight.data, theirs.lin_r.weight.data = w.T.contiguous(), w_target.T.contiguous()
    theirs.att.data = a[None, None]
    edges = torch.from_numpy(np.stack([source, target]))
    weights = (one.numpy() for one in (w_target, w, factor * a))
    return [beyond.graph_attention_v2(h.numpy(), source, target, *weights)[0]], theirs(h, edges)


@row("induced set attention", "torch-geometric InducedSetAttentionBlock", {"whole": {}, "padding": dict(padding=True)})
def isab(factor, padding=False, d=16, heads=2, m=4):
    from torch_geometric.nn.aggr.utils import InducedSetAttentionBlock

    theirs = InducedSetAttentionBlock(d, m, heads, layer_norm=False).eval()
    ours = beyond.InducedSetAttention(d, heads, m)
    shapes = [(m, d), *[(d, d)] * 10]
    points, *matrices = (a if i == 0 else a * d**-0.5 for i, a in enumerate(draw(38, *shapes)))
    ours.points.data, theirs.ind.data = points, points[None]
    pairs = ((ours.gather, theirs.mab1), (ours.spread, theirs.mab2))
    for (block, other), part in zip(pairs, (matrices[:5], matrices[5:]), strict=True):
        w_q, w_k, w_v, w_o, w_f = part
        for name, w in zip(("w_q", "w_k", "w_v", "w_o", "w_f"), (factor * w_q, w_k, w_v, w_o, w_f), strict=True):
            getattr(block, name).data = w
        other.attn.in_proj_weight.data = torch.cat([w.T for w in (w_q, w_k, w_v)])
        other.attn.out_proj.weight.data, other.lin.weight.data = w_o.T, w_f.T
        for bias in (other.attn.in_proj_bias, other.attn.out_proj.bias, other.lin.bias):
            bias.data.zero_()
    (x,) = draw(39, (2, 9, d))
    mask = torch.arange(9) < torch.tensor([[9], [5]]) if padding else None
    expected = theirs(x, mask)
    shown = slice(None) if mask is None else mask
    return [ours(x, mask)[shown]], expected[shown]
