"""Rows of the table for lecture 13: graphs by torch's own scatter and densely, and a vision transformer from transformers."""

import numpy as np
import torch
from torch.nn import functional as F
from transformers.models.vit import modeling_vit as vit

from attention import beyond
from attention.experiments.beyond import VisionTransformer
from tests.conformance.table import row
from tests.conformance.with_torch import TORCH, draw
from tests.conformance.with_transformers import FROM
from utils import training

GRAPHS = {"20 nodes, 70 edges": dict(n=20, n_edges=70), "6 nodes, 18 edges": dict(n=6, n_edges=18)}


def graph(n, n_edges, d=8, d_out=5):
    """Features, sorted edges with loops and without doubles, and the three weights of a head."""
    h, w, a_target, a_source = draw(21, (n, d), (d, d_out), (d_out,), (d_out,))
    edge = np.zeros(n * n, bool)
    edge[np.random.default_rng(22).permutation(n * n)[: n_edges - n]] = True
    target, source = np.nonzero(edge.reshape(n, n) | np.eye(n, dtype=bool))
    return h, target, source, w / d**0.5, a_target, a_source


def ours(factor, h, target, source, *weights):
    w, a_target, a_source = (one.numpy() for one in weights)
    return [beyond.graph_attention(h.numpy(), source, target, w, factor * a_target, factor * a_source)[0]]


@row("graph attention, one head", f"{TORCH}, scatter_reduce and scatter_add", GRAPHS)
def by_scatter(factor, n, n_edges):
    h, target, source, w, a_target, a_source = given = graph(n, n_edges)
    features, at, of = h @ w, torch.from_numpy(target), torch.from_numpy(source)
    scores = F.leaky_relu((features @ a_target)[at] + (features @ a_source)[of], 0.2)
    top = torch.full((n,), -torch.inf).scatter_reduce(0, at, scores, "amax")
    powers = (scores - top[at]).exp()
    weights = powers / torch.zeros(n).scatter_add(0, at, powers)[at]
    return ours(factor, *given), torch.zeros_like(features).index_add(0, at, weights[:, None] * features[of])


@row("graph attention, one head", f"{TORCH}, softmax of a dense masked matrix", GRAPHS)
def by_dense(factor, n, n_edges):
    h, target, source, w, a_target, a_source = given = graph(n, n_edges)
    features, edge = h @ w, torch.zeros(n, n, dtype=torch.bool)
    edge[target, source] = True
    scores = F.leaky_relu((features @ a_target)[:, None] + features @ a_source, 0.2)
    return ours(factor, *given), torch.softmax(scores.masked_fill(~edge, -torch.inf), -1) @ features


@row("graph attention that ranks anew (GATv2), one head", f"{TORCH}, softmax of a dense masked matrix", GRAPHS)
def by_dense_v2(factor, n, n_edges):
    h, target, source, w, a, _ = graph(n, n_edges)
    (w_target,) = draw(27, w.shape)
    features, edge = h @ w, torch.zeros(n, n, dtype=torch.bool)
    edge[target, source] = True
    scores = F.leaky_relu((h @ w_target)[:, None] + features, 0.2) @ a
    weights = (one.numpy() for one in (w_target, w, factor * a))
    mine = beyond.graph_attention_v2(h.numpy(), source, target, *weights)[0]
    return [mine], torch.softmax(scores.masked_fill(~edge, -torch.inf), -1) @ features


@row("set attention block", f"{TORCH}, nn.MultiheadAttention", {"whole": {}, "padding": dict(padding=True)})
def block(factor, padding=False):
    module = training.initialise(beyond.SetBlock(16, 4), 23)
    theirs = torch.nn.MultiheadAttention(16, 4, bias=False, batch_first=True)
    theirs.in_proj_weight.data = torch.cat([2 * w.data.T for w in (module.w_q, module.w_k, module.w_v)])
    theirs.out_proj.weight.data = module.w_o.data.T
    for name in ("w_q", "w_k", "w_v"):
        getattr(module, name).data *= 2 * (factor if name == "w_q" else 1.0)
    x, y = draw(24, (3, 5, 16), (3, 9, 16))
    there = torch.arange(9) < torch.tensor([[9], [4], [1]]) if padding else None
    h = x + theirs(x, y, y, key_padding_mask=None if there is None else ~there)[0]
    return [module(x, y, there)], h + torch.relu(h @ module.w_f)


@row("vision transformer: patches, class token, layers", FROM + "ViTModel", {"two layers": {}, "one layer": dict(n=1)})
def pictures(factor, n=2):
    module = training.initialise(VisionTransformer(32, n), 25)
    config = vit.ViTConfig(image_size=8, patch_size=2, num_channels=1, hidden_size=32, num_hidden_layers=n,
                           num_attention_heads=4, intermediate_size=64, layer_norm_eps=1e-5)  # fmt: skip
    theirs = vit.ViTModel(config, add_pooling_layer=False).eval()
    theirs.embeddings.cls_token.data = module.class_token.data[None]
    theirs.embeddings.position_embeddings.data = module.places.data[None]
    theirs.embeddings.patch_embeddings.projection.weight.data = module.embed.weight.data.view(32, 1, 2, 2)
    theirs.embeddings.patch_embeddings.projection.bias.data = module.embed.bias.data
    for own, layer in zip(module.blocks, theirs.layers, strict=True):
        own.qkv.weight.data *= 3  # scores of unit size
        attention, mlp = layer.attention, layer.mlp
        pairs = zip(own.qkv.weight.chunk(3), own.qkv.bias.chunk(3), "qkv", strict=True)
        for weight, bias, name in pairs:
            projection = getattr(attention, f"{name}_proj")
            projection.weight.data, projection.bias.data = weight.data.clone(), bias.data.clone()
        attention.o_proj.load_state_dict(own.out.state_dict())
        mlp.fc1.load_state_dict(own.up.state_dict())
        mlp.fc2.load_state_dict(own.down.state_dict())
        own.qkv.weight.data[:32] *= factor
        own.qkv.bias.data[:32] *= factor
    (images,) = draw(26, (4, 8, 8))
    return [module(images)], module.head(theirs(images[:, None]).last_hidden_state[:, 0])
