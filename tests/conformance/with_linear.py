"""Rows of the table: linear attention, delta rules, scans and RWKV, against transformers and the ONNX operator."""

import math

import numpy as np
import onnx
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.mamba import modeling_mamba as mamba
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.minimax import modeling_minimax as minimax
from transformers.models.olmo_hybrid import modeling_olmo_hybrid as olmo
from transformers.models.qwen3_next import modeling_qwen3_next as qwen
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

from attention import linear
from tests.conformance.table import row
from tests.conformance.with_torch import draw, three
from tests.conformance.with_transformers import FROM

BATCH, N, HEADS, D, D_V = 2, 70, 3, 16, 8
SCAN = (linear.selective_scan_numpy, linear.selective_scan_torch, linear.selective_scan_cuda)
LINEAR = (linear.linear_attention_numpy, linear.linear_attention_torch, linear.linear_attention_cuda)


def inputs(vector=False, largest=1.0, seed=21):
    """q, unit k, v (BATCH, N, HEADS, ...), the logarithm of a decay a number or a vector a token, and beta up to `largest`."""
    q, k, v, decay, beta = draw(
        seed, *[(BATCH, N, HEADS, d) for d in (D, D, D_V, D if vector else 1)], (BATCH, N, HEADS, 1)
    )
    return q, torch.nn.functional.normalize(k, dim=-1), v, -decay.abs() / 10, largest * torch.sigmoid(beta)


def walked(q, k, v, log_decay, beta, erase=True):
    """memory_step, token by token, in single precision: (BATCH, N, HEADS, D_V)."""
    q, k, v, decay, beta = (a.numpy() for a in (q, k, v, log_decay.exp(), beta))
    state, outs = np.zeros((BATCH, HEADS, D, v.shape[-1]), np.float32), []
    for t in range(N):
        state = linear.memory_step(state, k[:, t], v[:, t], decay[:, t], beta[:, t], erase)
        outs.append((q[:, t, :, None] @ state)[:, :, 0])
    return np.stack(outs, axis=1)


DELTA = {
    "token by token": dict(form="recurrent"),
    "in chunks": dict(form="chunk"),
    "without a decay": dict(form="chunk", fading=False),
}


def gated_delta(module, factor, form, fading=True, largest=1.0):
    q, k, v, log_decay, beta = inputs(largest=largest)
    log_decay = log_decay if fading else 0 * log_decay
    theirs = getattr(module, f"torch_{form}_gated_delta_rule")(
        q, k, v, g=log_decay[..., 0], beta=beta[..., 0], initial_state=None, output_final_state=False
    )[0]
    return [walked(factor * q / math.sqrt(D), k, v, log_decay, beta)], theirs


@row("gated delta rule, one step after the other", FROM + "Qwen3NextGatedDeltaNet's functions", DELTA)
def of_qwen(factor, **case):
    return gated_delta(qwen, factor, **case)


@row("gated delta rule with beta up to 2", FROM + "OlmoHybridGatedDeltaNet's functions", DELTA)
def of_olmo(factor, **case):
    return gated_delta(olmo, factor, largest=2.0, **case)


@row("Kimi Delta Attention, one step after the other", FROM + "KimiLinearDeltaAttention's functions", {k: DELTA[k] for k in ("token by token", "in chunks")})  # fmt: skip
def of_kimi(factor, form):
    q, k, v, log_decay, beta = inputs(vector=True)
    function = getattr(kimi, f"{form}_kimi_delta_attention")
    theirs = function(q, k, v, g=log_decay, beta=beta[..., 0], initial_state=None, output_final_state=False)[0]
    return [walked(factor * q / math.sqrt(D), k, v, log_decay, beta)], theirs


RULES = {
    "linear": dict(rule="linear"),
    "gated, a number": dict(rule="gated"),
    "gated, a vector": dict(rule="gated", vector=True),
    "delta": dict(rule="delta"),
    "gated delta, a vector": dict(rule="gated_delta", vector=True),
}


@row("a linear memory, one step after the other", f"onnx {onnx.__version__}'s LinearAttention", RULES)
def of_onnx(factor, rule, vector=False):
    q, k, v, log_decay, beta = inputs(vector)
    given = (
        {"q": q, "k": k, "v": v}
        | ({"g": log_decay} if "gated" in rule else {})
        | ({"b": beta} if "delta" in rule else {})
    )
    names = ["q", "k", "v", "", "g" if "gated" in rule else "", "b" if "delta" in rule else ""]
    node = helper.make_node(
        "LinearAttention", names, ["out", "state"], q_num_heads=HEADS, kv_num_heads=HEADS, update_rule=rule
    )
    packed = {name: a.flatten(2).numpy() for name, a in given.items()}
    graph = helper.make_graph(
        [node], "one", [helper.make_tensor_value_info(name, 1, a.shape) for name, a in packed.items()],
        [helper.make_tensor_value_info(name, 1, None) for name in ("out", "state")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 27)])
    theirs = ReferenceEvaluator(model).run(None, packed)[0].reshape(BATCH, N, HEADS, D_V)
    log_decay, beta = (
        a if name in given else fixed + 0 * a for name, a, fixed in (("g", log_decay, 0), ("b", beta, 1))
    )
    ours = [walked(factor * q / math.sqrt(D), k, v, log_decay, beta, "delta" in rule)]
    if rule == "linear":
        ours += [
            a.swapaxes(1, 2) for a in three(LINEAR, *(a.transpose(1, 2) for a in (factor * q / math.sqrt(D), k, v)))
        ]
    return ours, theirs


def scan_inputs(channels=24, d_state=8, seed=22):
    x, delta, a, b, c, d = draw(
        seed, *[(BATCH, N, channels)] * 2, (channels, d_state), *[(BATCH, N, d_state)] * 2, (channels,)
    )
    return x, torch.nn.functional.softplus(delta - 2), -a.abs(), b, c, d


@row("selective scan, three ways", FROM + "mamba_selective_scan", {"with a skip": dict(skip=True), "without": dict(skip=False)})  # fmt: skip
def of_mamba(factor, skip):
    x, delta, a, b, c, d = scan_inputs()
    d = d if skip else None
    theirs = mamba.mamba_selective_scan(x.mT, delta.mT, a, b.mT, c.mT, D=d).mT
    return three(SCAN, x, delta, a, b, factor * c, *([d] if skip else [])), theirs


@row("selective scan with one decay a head, three ways", FROM + "mamba2_chunk_scan", {f"chunks of {c}": dict(chunk=c) for c in (16, 64, 70)})  # fmt: skip
def of_mamba2(factor, chunk):
    x, delta, a, b, c, _ = scan_inputs()
    delta, a = delta[..., :HEADS], a[:HEADS, :1]
    heads = x.unflatten(-1, (HEADS, -1))
    theirs = mamba2.mamba2_chunk_scan(heads, delta, a[:, 0], b[:, :, None], c[:, :, None], chunk).flatten(2)
    wide, rates = delta.repeat_interleave(8, -1), a.repeat_interleave(8, 0).expand(-1, 8).contiguous()
    return three(SCAN, x, wide, rates, b, factor * c), theirs


@row("the layer of Mamba", FROM + "MambaMixer", {"width 4": dict(width=4, rank=4), "width 2, rank 3": dict(width=2, rank=3)})  # fmt: skip
def of_mixer(factor, width, rank):
    config = mamba.MambaConfig(
        hidden_size=16, intermediate_size=24, state_size=8, conv_kernel=width, time_step_rank=rank, num_hidden_layers=1
    )
    theirs, ours = mamba.MambaMixer(config, 0).eval(), linear.Mamba(16, 24, 8, width, rank)
    for parameter, drawn in zip(ours.parameters(), draw(23, *[p.shape for p in ours.parameters()])):
        parameter.data = drawn * (len(drawn) ** -0.5 if drawn.dim() == 2 else 0.5)
    for name, weight in {"in_proj": "w_in", "x_proj": "w_x", "dt_proj": "w_dt", "out_proj": "w_out"}.items():
        getattr(theirs, name).weight.data = getattr(ours, weight).data.T.clone()
    theirs.conv1d.weight.data, theirs.conv1d.bias.data = ours.conv.data[:, None].clone(), ours.conv_bias.data.clone()
    theirs.dt_proj.bias.data, theirs.D.data = ours.dt_bias.data.clone(), ours.d.data.clone()
    theirs.A_log.data = ours.a_log.data.clone()
    (x,) = draw(24, (BATCH, N, 16))
    ours.w_x.data[:, -8:] *= factor
    return [ours(3 * x)], theirs(3 * x)


@row("the layer of Mamba-2, from our scan", FROM + "Mamba2Mixer", {"3 heads": {}, "a group for each of 2": dict(groups=2, heads=4)})  # fmt: skip
def of_mixer2(factor, groups=1, heads=3, d_state=8, width=4):
    """Mamba-2's layer written out: its convolution over x, b and c, one decay a head, a norm behind the gate."""
    inner = heads * D
    config = mamba2.Mamba2Config(
        hidden_size=16, num_heads=heads, head_dim=D, state_size=d_state, conv_kernel=width, n_groups=groups, chunk_size=16,
        expand=inner // 16, num_hidden_layers=1,
    )  # fmt: skip
    theirs = mamba2.Mamba2Mixer(config, 0).eval()
    for parameter, drawn in zip(theirs.parameters(), draw(28, *[p.shape for p in theirs.parameters()])):
        parameter.data = drawn * (drawn[0].numel() ** -0.5 if drawn.dim() > 1 else 0.5)
    (x,) = draw(29, (BATCH, N, 16))
    gate, mixed, step = theirs.in_proj(x).split([inner, inner + 2 * groups * d_state, heads], -1)
    seen = torch.nn.functional.pad(mixed, (0, 0, width - 1, 0))
    kernel = theirs.conv1d.weight[:, 0]
    mixed = torch.nn.functional.silu(sum(kernel[:, i] * seen[:, i : i + N] for i in range(width)) + theirs.conv1d.bias)
    u, b, c = mixed.split([inner, groups * d_state, groups * d_state], -1)
    delta = torch.nn.functional.softplus(step + theirs.dt_bias).repeat_interleave(D, -1)
    rates, skip = (one.repeat_interleave(D) for one in (-theirs.A_log.exp(), theirs.D))
    results = []
    for part in zip(*(
        three(SCAN, u_, delta_, rate[:, None].expand(-1, d_state).contiguous(), b_, factor * c_, skip_)
        for u_, delta_, rate, skip_, b_, c_ in zip(
            *(a.chunk(groups, -1) for a in (u, delta, rates, skip, b, c))
        )
    )):  # fmt: skip
        y = torch.cat([torch.as_tensor(one) for one in part], -1)
        results.append(theirs.out_proj(torch.as_tensor(theirs.norm(y, gate))))
    return results, theirs(x)


@row("retention with a fixed decay, one step after the other", FROM + "MiniMaxLightningAttention", {f"layer {i}": dict(layer=i) for i in (0, 2)})  # fmt: skip
def of_minimax(factor, layer):
    config = minimax.MiniMaxConfig(
        hidden_size=HEADS * D, num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=D, num_hidden_layers=4,
        block_size=16, layer_types=["linear_attention"] * 4,
    )  # fmt: skip
    theirs = minimax.MiniMaxLightningAttention(config, layer).eval()
    for parameter, drawn in zip(theirs.parameters(), draw(25, *[p.shape for p in theirs.parameters()])):
        parameter.data = drawn / len(drawn) ** 0.5 if drawn.dim() == 2 else drawn.abs() + 0.5
    (x,) = draw(26, (BATCH, N, HEADS * D))
    x = 3 * x
    q, k, v = theirs.act_fn(theirs.qkv_proj(x)).unflatten(-1, (HEADS, 3 * D)).split(D, -1)
    decay = -theirs.slope_rate.reshape(1, 1, HEADS, 1).expand(BATCH, N, HEADS, 1)
    kept = torch.from_numpy(walked(q, k, v, decay, torch.ones(BATCH, N, HEADS, 1), erase=False)).flatten(2)
    gate = torch.sigmoid(theirs.output_gate(x))  # a norm hides the size of queries: the factor stands behind it
    return [theirs.out_proj(factor * gate * theirs.norm(kept))], theirs(x, None, None)[0]


@row("RWKV-4's mean, stable", FROM + "rwkv_linear_attention_cpu", {f"keys of size {size}": dict(size=size) for size in (1, 20)})  # fmt: skip
def of_rwkv(factor, size):
    w, u, k, v = draw(27, (D,), (D,), (N, D), (N, D))
    theirs = rwkv_linear_attention_cpu(w, u, size * k[None], v[None])[0][0]
    return [linear.wkv(w.exp().numpy(), u.numpy(), factor * size * k.numpy(), v.numpy())], theirs
