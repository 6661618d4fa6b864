"""Rows of the table: the node tests of the ONNX standard, those whose result is in single precision."""

import importlib.metadata

import numpy as np
import torch

from attention.kv_cache import KVCache, RingKVCache
from attention.rotary import apply_rope_numpy, apply_rope_torch
from tests.conformance import onnx_cases as onnx
from tests.conformance.table import row
from tests.conformance.with_torch import ATTENTION, three

ONNX = f"onnx {importlib.metadata.version('onnx')}, node tests"


def of_single(operator, output):
    """{name: {"case": Case}} of an operator's cases that the course answers and whose result is in single precision."""
    return {case.name: {"case": case} for case in onnx.cases(operator)
            if not case.skipped and case.outputs[output].dtype == np.float32}  # fmt: skip


@row("attention", ONNX, of_single("Attention", "Y"))
def attention(factor, case):
    q, k, v, mask, scale = onnx.as_attention(case)
    tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in (q * q.dtype.type(factor), k, v)]
    found = three(ATTENTION, *tensors, mask, scale=scale)
    return found, onnx.heads(case.outputs["Y"], case.attributes.get("q_num_heads"))


def by_torch(*arguments, **named):
    return apply_rope_torch(*map(torch.from_numpy, arguments), **named).numpy()


def rotated(case, apply_rope):
    """What apply_rope makes of a case of RotaryEmbedding.

    The standard's cosines and sines are random numbers, which no angle has. A rotation is linear in them: turned by
    nothing and by a quarter, and added with these weights, our function must give the same.
    """
    given, interleaved = case.inputs, bool(case.attributes.get("interleaved"))
    x = onnx.heads(given["input"], case.attributes.get("num_heads")).astype(np.float64)
    width = case.attributes.get("rotary_embedding_dim") or x.shape[-1]
    cos, sin = given["cos_cache"], given["sin_cache"]
    if "position_ids" in given:
        cos, sin = cos[given["position_ids"]], sin[given["position_ids"]]
    cos, sin = ((np.repeat(a, 2, -1) if interleaved else np.concatenate([a, a], -1))[:, None] for a in (cos, sin))
    turned = x[..., :width].copy()
    still, quarter = (
        apply_rope(turned, np.ones(x.shape[2], dtype=np.int64), np.full(width // 2, angle), interleaved=interleaved)
        for angle in (0.0, np.pi / 2)
    )
    return np.concatenate([still * cos + quarter * sin, x[..., width:]], axis=-1).astype(np.float32)


@row("RoPE, both ways to pair", ONNX, of_single("RotaryEmbedding", "output"))
def rope(factor, case):
    theirs = onnx.heads(case.outputs["output"], case.attributes.get("num_heads"))
    return [np.float32(factor) * rotated(case, apply_rope) for apply_rope in (apply_rope_numpy, by_torch)], theirs


def written(case):
    """What our caches hold after a case of TensorScatter: tensors (batch, n_heads, capacity, d)."""
    past, update = (torch.from_numpy(case.inputs[name]) for name in ("past_cache", "update"))
    if past.ndim == 3:
        past, update = past[:, None], update[:, None]
    circular, rows = case.attributes.get("mode") == b"circular", []
    for i, index in enumerate(case.inputs["write_indices"]):
        cache = (RingKVCache if circular else KVCache)(1, *past.shape[1:], past.dtype)
        cache.k[:] = past[i]
        cache.length = int(index)
        for part in update[i : i + 1].split(1 if circular else update.shape[2], dim=2):
            cache.update(part, part[..., : cache.v.shape[-1]])
        rows.append(cache.k)
    return torch.cat(rows)


@row("writing into a cache", ONNX, of_single("TensorScatter", "present_cache"))
def scatter(factor, case):
    theirs = case.outputs["present_cache"]
    return [factor * written(case)], theirs if theirs.ndim == 4 else theirs[:, None]
