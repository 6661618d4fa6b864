# Generated from solutions/10_linear_and_state_space_attention.py by `python course.py build`. Edit that file, not this one.
"""Lecture 10 · Linear and state-space attention: what it trains for itself alone."""

import math

import numpy as np
import torch
from torch import nn

from attention.linear import selective_scan_torch
from attention.multi_head import masked_softmax
from utils import data, training

__all__ = [
    "head_inputs",
    "masked_form",
    "mamba2_form",
    "delta_form",
    "references",
    "mamba_parts",
    "LearnedFeatures",
    "Imitation",
    "RecallMixer",
    "RecallModel",
    "recall_batches",
    "recall_loss",
    "recall_accuracy",
    "train_recall",
    "ParityModel",
    "parity_batches",
    "parity_loss",
    "train_parity",
    "parity_accuracy",
]


@torch.no_grad()
def head_inputs(sentence, layer=3, head=1, length=32):
    """(tokens, q, k, q_texts, k_texts) of one head of MiniLM, float64: of a sentence (n, 32), and of course prose (texts, length, 32)."""
    model, tokenizer = data.minilm()
    own = model.encoder.layer[layer].attention.self
    at = slice(head * 32, (head + 1) * 32)

    def projected(ids):
        x = model(input_ids=ids, output_hidden_states=True).hidden_states[layer].double()
        parts = ((own.query, own.query.bias.double()), (own.key, torch.zeros(384, dtype=torch.float64)))
        return [(x @ part.weight.double().T + bias)[..., at] for part, bias in parts]

    ids = tokenizer(sentence, return_tensors="pt")["input_ids"]
    rows = tokenizer(data.course_prose(), add_special_tokens=False, verbose=False)["input_ids"]
    texts = torch.tensor(rows[: len(rows) // length * length]).view(-1, length)
    q, k = projected(ids)
    return tokenizer.convert_ids_to_tokens(ids[0].tolist()), q[0], k[0], *projected(texts)


class LearnedFeatures(nn.Module):
    """x (..., d) to 2 m positive features: softmax(x w + b) and softmax(-(x w + b)), after Zhang et al. 2024."""

    def __init__(self, d, m):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(d, m)), nn.Parameter(torch.zeros(m))

    def forward(self, x):
        y = 3 * (x @ self.w) + self.b
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)


class Imitation(nn.Module):
    """Features of queries and of keys."""

    def __init__(self, d, m):
        super().__init__()
        self.of_q, self.of_k = LearnedFeatures(d, m), LearnedFeatures(d, m)


def masked_form(q, k, v, log_decay, _beta):
    """Linear attention with decays as one masked matrix, in which the decay from j to i is the exponential of a difference."""
    total = np.cumsum(log_decay * np.ones(k.shape), axis=0)
    between = np.exp(np.minimum(total[:, None] - total, 0.0))                             # (n, n, d)
    return np.tril(np.einsum("id,jd,ijd->ij", q, k, between)) @ v


def mamba2_form(q, k, v, log_decay, beta):
    """Mamba-2's chunked scan, one head: a is -1, its step is -log_decay, and the value is divided by that step."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    steps = torch.from_numpy(-log_decay)[None]
    x, b, c = (torch.from_numpy(a)[None, :, None] for a in (v * beta / -log_decay, k, q))
    return mamba2_chunk_scan(x, steps, -torch.ones(1), b, c, 32)[0, :, 0].numpy()


def delta_form(q, k, v, log_decay, beta):
    """A chunked delta rule: Kimi Linear's where each row has its decay, Qwen3-Next's otherwise. They scale q by 1/sqrt(d)."""
    from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    each_row = log_decay.shape[1] > 1
    function = chunk_kimi_delta_attention if each_row else torch_chunk_gated_delta_rule
    given = [torch.from_numpy(a)[None, :, None] for a in (q, k, v, log_decay if each_row else log_decay[:, 0])]
    out, _ = function(*given, torch.from_numpy(beta)[None], initial_state=None, output_final_state=False)
    return math.sqrt(q.shape[1]) * out[0, :, 0].numpy()


references = {
    "linear attention": masked_form, "retention": masked_form, "GLA": masked_form, "Mamba-2": mamba2_form,
    "DeltaNet": delta_form, "Gated DeltaNet": delta_form, "Kimi Delta Attention": delta_form,
}


@torch.no_grad()
def mamba_parts(layer, x):
    """What flows through a Mamba layer for one text x (n, d_model): {name: array}, in the order of the picture."""
    u, gate = (x @ layer.w_in).chunk(2, dim=-1)
    padded = nn.functional.pad(u, (0, 0, layer.conv.shape[1] - 1, 0))
    convolved = sum(padded[i : i + len(x)] * layer.conv[:, i] for i in range(layer.conv.shape[1])) + layer.conv_bias
    convolved = nn.functional.silu(convolved)
    found = convolved @ layer.w_x
    delta = nn.functional.softplus(found[:, : layer.rank] @ layer.w_dt + layer.dt_bias)
    b, c = found[:, layer.rank :].split(layer.d_state, -1)
    y = selective_scan_torch(convolved[None], delta[None], -layer.a_log.exp(), b[None], c[None], layer.d)[0]
    return {"x": x, "u": u, "gate": gate, "u, convolved": convolved, "Δ, b, c": found, "y": y, "out": layer(x[None])[0]}


class RecallMixer(nn.Module):
    """One head with keys of d_k: "softmax", "linear" (elu + 1, normalised) or "delta rule" (in one chunk, by a solve)."""

    def __init__(self, kind, d, d_k):
        super().__init__()
        self.kind = kind
        shapes = {"w_q": (d, d_k), "w_k": (d, d_k), "w_v": (d, d), "w_o": (d, d)} | ({"w_b": (d, 1)} if kind == "delta rule" else {})
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        q, k, v = x @ self.w_q, x @ self.w_k, x @ self.w_v
        if self.kind == "softmax":
            return masked_softmax(q @ k.mT / math.sqrt(q.shape[-1]), causal=True) @ v @ self.w_o
        if self.kind == "linear":
            weights = ((nn.functional.elu(q) + 1) @ (nn.functional.elu(k) + 1).mT).tril()
            return weights / weights.sum(-1, keepdim=True) @ v @ self.w_o
        q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
        beta = torch.sigmoid(x @ self.w_b)
        lower = torch.eye(x.shape[1], dtype=x.dtype) + (beta * (k @ k.mT)).tril(-1)
        return (q @ k.mT).tril() @ torch.linalg.solve_triangular(lower, beta * v, upper=False) @ self.w_o


class RecallModel(nn.Module):
    """ids (batch, n) to logits (batch, n, 64): for each kind a layer of short convolution and RecallMixer."""

    def __init__(self, kinds, d=32, d_k=8):
        super().__init__()
        self.embedding = nn.Embedding(64, d)
        self.norms = nn.ModuleList(nn.RMSNorm(d) for _ in range(len(kinds) + 1))
        self.convs = nn.ModuleList(nn.Conv1d(d, d, 3, groups=d) for _ in kinds)
        self.mixers = nn.ModuleList(RecallMixer(kind, d, d_k) for kind in kinds)
        self.out = nn.Parameter(torch.randn(d, 64))

    def forward(self, ids):
        x = self.embedding(ids)
        for norm, conv, mixer in zip(self.norms, self.convs, self.mixers):
            y = norm(x)
            x = x + mixer(y + conv(nn.functional.pad(y.mT, (2, 0))).mT)
        return self.norms[-1](x) @ self.out


def recall_batches(batch, seed, pairs=8):
    """Endless (ids (batch, 3 pairs), answers (batch, pairs)): key, value, key, value, ..., then the keys in another order."""
    rng = np.random.default_rng(seed)
    while True:
        keys = np.argsort(rng.random((batch, 32)), 1)[:, :pairs]
        values, order = rng.integers(32, 64, (batch, pairs)), np.argsort(rng.random((batch, pairs)), 1)
        asked, answers = (np.take_along_axis(a, order, 1) for a in (keys, values))
        told = np.stack([keys, values], 2).reshape(batch, -1)
        yield torch.from_numpy(np.concatenate([told, asked], 1)), torch.from_numpy(answers)


def recall_loss(model, given):
    """The mean cross-entropy of the answers, in nats."""
    ids, answers = given
    return nn.functional.cross_entropy(model(ids)[:, -answers.shape[1] :].mT, answers)


def recall_accuracy(model, given):
    """The share of answers that are right."""
    ids, answers = given
    return float((model(ids)[:, -answers.shape[1] :].argmax(-1) == answers).double().mean())


def train_recall(kinds, d_k, steps=200, seed=0):
    """The accuracy on texts not seen before at 0, 50, 100, ... steps: a list. kinds: one for both layers, or two."""
    model = training.initialise(RecallModel(kinds * 2 if len(kinds) == 1 else kinds, d_k=d_k).double(), seed)
    test = next(recall_batches(256, seed=99))
    with torch.no_grad():
        first = recall_accuracy(model, test)
    found = training.fit(model, recall_batches(32, seed), recall_loss, steps, lr=8e-3,
                         evaluate=lambda trained: recall_accuracy(trained, test), every=50)
    return [first, *found.metrics]


class ParityModel(nn.Module):
    """bits (batch, n) to logits (batch, n, 2): one delta rule with beta from 0 to `largest`."""

    def __init__(self, largest, d=8):
        super().__init__()
        self.largest, self.embedding, self.norm = largest, nn.Embedding(2, d), nn.RMSNorm(d)
        for name, columns in {"w_q": d, "w_k": d, "w_v": d, "w_b": 1, "out": 2}.items():
            setattr(self, name, nn.Parameter(torch.randn(d, columns)))

    def forward(self, bits):
        x = self.embedding(bits)
        q, k, v = x @ self.w_q, nn.functional.normalize(x @ self.w_k, dim=-1), x @ self.w_v
        beta = self.largest * torch.sigmoid(4 * (x @ self.w_b))
        lower = torch.eye(x.shape[1], dtype=x.dtype) + (beta * (k @ k.mT)).tril(-1)
        return self.norm((q @ k.mT).tril() @ torch.linalg.solve_triangular(lower, beta * v, upper=False)) @ self.out


def parity_batches(seed):
    """Endless bits (64, n), n from 4 to 16."""
    rng = np.random.default_rng(seed)
    while True:
        yield torch.from_numpy(rng.integers(0, 2, (64, int(rng.integers(4, 17)))))


def parity_loss(model, bits):
    """The mean cross-entropy of whether the number of ones so far is odd, in nats."""
    return nn.functional.cross_entropy(model(bits).mT, bits.cumsum(1) % 2)


def train_parity(largest, seed, steps=300):
    """A ParityModel trained on texts of 4 to 16 bits."""
    model = training.initialise(ParityModel(largest).double(), seed)
    training.fit(model, parity_batches(seed), parity_loss, steps, lr=2e-2)
    return model


@torch.no_grad()
def parity_accuracy(model, n):
    """The share of right answers at the last eight of n bits."""
    bits = torch.from_numpy(np.random.default_rng(9).integers(0, 2, (64, n)))
    return float((model(bits)[:, -8:].argmax(-1) == (bits.cumsum(1) % 2)[:, -8:]).double().mean())
