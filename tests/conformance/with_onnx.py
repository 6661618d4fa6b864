"""Rows of the table: the node tests of the ONNX standard, those whose result is in single precision."""

import importlib.metadata

import numpy as np
import torch

from attention import grouped_query, linear
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


GROUPED = (
    grouped_query.grouped_query_attention_numpy,
    grouped_query.grouped_query_attention_torch,
    grouped_query.grouped_query_attention_cuda,
)


def fewer_key_heads(case):
    """Whether several heads of queries share one of keys: `as_attention` repeats keys, this row does not."""
    says, q, k = case.attributes, case.inputs["Q"], case.inputs["K"]
    return says["q_num_heads"] != says["kv_num_heads"] if "q_num_heads" in says else q.shape[1] != k.shape[1]


GROUPS = {name: given for name, given in of_single("Attention", "Y").items() if fewer_key_heads(given["case"])}


@row("grouped-query attention", ONNX, GROUPS)
def grouped(factor, case):
    q, k, v, mask, scale = onnx.as_attention(case)
    n_kv = case.attributes.get("kv_num_heads") or case.inputs["K"].shape[1]
    k, v = (a[:, :: q.shape[1] // n_kv] for a in (k, v))
    tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in (q * q.dtype.type(factor), k, v)]
    found = three(GROUPED, *tensors, torch.from_numpy(np.ascontiguousarray(mask)), scale=scale)
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


def remembered(case, factor=1.0):
    """The output (batch, seq, columns) and the last state of a case of LinearAttention, by steps of our memory."""
    given, says = case.inputs, case.attributes
    rule = says.get("update_rule", b"gated_delta")
    n_heads, n_kv_heads = says["q_num_heads"], says["kv_num_heads"]
    single = {name: a.astype(np.float32) for name, a in given.items()}
    q, k, v = (
        onnx.heads(single[name], n) for name, n in (("query", n_heads), ("key", n_kv_heads), ("value", n_kv_heads))
    )
    q = q * np.float32(factor * (says.get("scale") or q.shape[-1] ** -0.5))
    (batch, _, seq, d), none = k.shape, np.ones((len(k), n_kv_heads, k.shape[2], 1), np.float32)
    decay = np.exp(onnx.heads(single["decay"], n_kv_heads)) if "decay" in given else none
    beta = single["beta"].swapaxes(1, 2)[..., None] * none if "beta" in given else none
    state = single.get("past_state", np.zeros((batch, n_kv_heads, d, v.shape[-1]), np.float32))
    out = np.zeros((batch, seq, n_heads, v.shape[-1]), np.float32)
    for t in range(seq):
        state = linear.memory_step(state, k[:, :, t], v[:, :, t], decay[:, :, t], beta[:, :, t], b"delta" in rule)
        read = np.repeat(state, n_heads // n_kv_heads, axis=1)  # query heads that share a memory
        out[:, t] = (q[:, :, t, None] @ read)[:, :, 0]
    return out.reshape(batch, seq, -1), state


def together(output, state):
    return np.concatenate([output.ravel(), state.ravel()])


@row("a linear memory with its state, one step after the other", ONNX, of_single("LinearAttention", "output"))
def memories(factor, case):
    return [together(*remembered(case, factor))], together(case.outputs["output"], case.outputs["present_state"])


def streamed(case, factor=1.0):
    """The output and the state (batch, channels, ...) of a case of CausalConvWithState, by `stream`.

    A scan that forgets at once, with one state of weight 1, hands the convolution through.
    """
    x, weight = (case.inputs[name].astype(np.float64) for name in ("input", "weight"))
    x, kernel = x.swapaxes(1, 2), factor * weight[:, 0]
    channels, ones = len(kernel), np.ones((*x.shape[:2], 1))
    state = None
    if "past_state" in case.inputs:
        tail = case.inputs["past_state"].swapaxes(1, 2).astype(np.float64)
        state = tail, np.zeros((len(x), channels, 1))
    y, (tail, _) = linear.stream(x, np.ones_like(x), np.full((channels, 1), -np.inf), ones, ones, kernel, state)
    y = y + case.inputs["bias"] if "bias" in case.inputs else y
    if case.attributes.get("activation", b"none") != b"none":
        y = y / (1 + np.exp(-y))
    return y.swapaxes(1, 2), tail.swapaxes(1, 2)


@row("the convolution before a scan, with its state", ONNX, of_single("CausalConvWithState", "output"))
def convolutions(factor, case):
    return [together(*streamed(case, factor))], together(case.outputs["output"], case.outputs["present_state"])
