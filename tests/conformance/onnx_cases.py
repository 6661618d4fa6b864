"""The node tests of the ONNX standard, and how its operator Attention is said with the course's functions."""

import importlib
import warnings
from typing import NamedTuple

import numpy as np

SOFTCAP = "scores squashed by tanh: no lecture builds that"
FILES = {
    "LinearAttention": "linear_attention",
    "CausalConvWithState": "causal_conv_with_state",
}  # others: in small letters


class Case(NamedTuple):
    """One node test: inputs and outputs by name (arrays; what is left out is missing), attributes by name."""

    name: str
    attributes: dict
    inputs: dict
    outputs: dict

    @property
    def skipped(self):
        """Why the course does not answer this case, "" where it does."""
        return SOFTCAP if self.attributes.get("softcap") else ""


def cases(operator):
    """All `Case`s of an operator ("Attention"), but for those that only spell it out in smaller operators."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random float16 numbers overflow while onnx draws them
        onnx = importlib.import_module("onnx")
        node = importlib.import_module("onnx.backend.test.case.node")
        importlib.import_module(f"onnx.backend.test.case.node.{FILES.get(operator, operator.lower())}")
    found = []
    for case in node._NodeTestCases:
        first, *rest = case.model.graph.node
        if rest or first.op_type != operator:
            continue
        inputs, outputs = case.data_sets[0]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in first.attribute}
        # Inputs left out in the middle have an empty name and no array.
        found.append(
            Case(
                case.name.removeprefix("test_"),
                attributes,
                dict(zip([n for n in first.input if n], [x for x in inputs if getattr(x, "shape", ()) != () or x])),
                dict(zip([n for n in first.output if n], outputs)),
            )
        )
    return found


def heads(x, n_heads):
    """(batch, seq, n_heads * d) as (batch, n_heads, seq, d); what has four axes already stays."""
    return x if x.ndim == 4 else x.reshape(*x.shape[:2], n_heads, -1).swapaxes(1, 2)


def as_attention(case):
    """The arguments (q, k, v, mask, scale) with which the course's attention gives a case's Y, in four axes.

    The course's mask is boolean. An additive one enters as more columns: [q scale, b] [k, 1]^T = q k^T scale + b.
    ONNX aligns a causal mask top-left, shifted by the keys that were there before; so it is written out.
    """
    given, says = case.inputs, case.attributes
    q = heads(given["Q"], says.get("q_num_heads"))
    k, v = (heads(given[name], says.get("kv_num_heads")) for name in "KV")
    n_before = 0
    if "past_key" in given:
        n_before = given["past_key"].shape[2]
        k, v = (np.concatenate([given[f"past_{name}"], new], axis=2) for name, new in (("key", k), ("value", v)))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))

    n_queries, n_keys = q.shape[2], k.shape[2]
    mask = np.ones((len(q), 1, n_queries, n_keys), bool)
    first = np.full(len(q), n_before)  # where the first query stands among the keys
    if "nonpad_kv_seqlen" in given:
        lengths = given["nonpad_kv_seqlen"]
        mask &= (np.arange(n_keys) < lengths[:, None])[:, None, None]
        first = lengths - n_queries
    ahead = np.arange(n_keys) - (first[:, None, None] + np.arange(n_queries)[:, None])
    if says.get("is_causal"):
        mask &= (ahead <= 0)[:, None]
    if says.get("left_window_size", -1) >= 0:
        mask &= (ahead >= -says["left_window_size"])[:, None]
    if says.get("right_window_size", -1) >= 0:
        mask &= (ahead <= says["right_window_size"])[:, None]

    scale = says.get("scale", q.shape[-1] ** -0.5)
    bias = given.get("attn_mask")
    if bias is not None:
        missing = n_keys - bias.shape[-1] if bias.shape[-1] > 1 else 0
        outside = False if bias.dtype == bool else -np.inf
        bias = np.pad(bias, [(0, 0)] * (bias.ndim - 1) + [(0, missing)], constant_values=outside)
        mask = mask & (bias if bias.dtype == bool else bias != -np.inf)
        if bias.dtype != bool:
            bias = np.where(np.isfinite(bias.astype(np.float32)), bias, np.zeros_like(bias))
            columns = np.broadcast_to(bias, (*q.shape[:3], n_keys)).astype(q.dtype)
            ones = np.broadcast_to(np.eye(n_keys, dtype=k.dtype), (*k.shape[:2], n_keys, n_keys))
            q = np.concatenate([(q * scale).astype(q.dtype), columns], axis=-1)
            k, scale = np.concatenate([k, ones], axis=-1), 1.0
    return q, k, v, mask, float(scale)
