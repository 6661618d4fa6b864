"""Rows of the table for lecture 13: graphs and sets, from torch-geometric."""

from importlib.metadata import version

import numpy as np
import torch
from torch_geometric.nn import GATConv, GATv2Conv
from torch_geometric.nn.aggr.utils import InducedSetAttentionBlock

from attention import beyond
from tests.conformance.table import row
from tests.conformance.with_beyond import GRAPHS, graph
from tests.conformance.with_torch import draw

FROM = f"torch-geometric {version('torch-geometric')}, "


@row("graph attention, one head", FROM + "GATConv", GRAPHS)
def gat(factor, n, n_edges):
    h, target, source, w, a_target, a_source = graph(n, n_edges)
    theirs = GATConv(h.shape[1], w.shape[1], add_self_loops=False, bias=False)
    theirs.lin.weight.data = w.T.contiguous()
    theirs.att_src.data, theirs.att_dst.data = a_source[None, None], a_target[None, None]
    edges = torch.from_numpy(np.stack([source, target]))
    weights = (a.numpy() for a in (w, factor * a_target, factor * a_source))
    return [beyond.graph_attention(h.numpy(), source, target, *weights)[0]], theirs(h, edges)


@row("graph attention that ranks anew (GATv2), one head", FROM + "GATv2Conv", GRAPHS)
def gatv2(factor, n, n_edges):
    h, target, source, w, a, _ = graph(n, n_edges)
    (w_target,) = draw(37, w.shape)
    theirs = GATv2Conv(h.shape[1], w.shape[1], add_self_loops=False, bias=False)
    theirs.lin_l.weight.data, theirs.lin_r.weight.data = w.T.contiguous(), w_target.T.contiguous()
    theirs.att.data = a[None, None]
    edges = torch.from_numpy(np.stack([source, target]))
    weights = (one.numpy() for one in (w_target, w, factor * a))
    return [beyond.graph_attention_v2(h.numpy(), source, target, *weights)[0]], theirs(h, edges)


@row("induced set attention", FROM + "InducedSetAttentionBlock", {"whole": {}, "padding": dict(padding=True)})
def isab(factor, padding=False, d=16, heads=2, m=4):
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
