"""The test for leaks that exercise 12F asks for, run on every causal function and layer that the course exports."""

import inspect

import numpy as np
import pytest
import torch

import attention
from attention import latent, linear
from attention.mixture import test_causal as sees_no_future
from attention.rotary import Rotary
from utils import training

rng = np.random.default_rng(5)
SQUARES, EXPERTS = rng.standard_normal((6, 8, 8)), rng.standard_normal((2, 4, 8, 8))
TURNS = {"positions": Rotary(4)}


def ways(name, call):
    """{name: a function of an array (n, 8)} for the three functions of a triple; call(function, rows) calls one."""

    def by(function, tensors):
        def layer(rows):
            found = call(function, torch.from_numpy(rows) if tensors else rows)
            found = found[0] if isinstance(found, tuple) else found
            return np.asarray(found)

        return layer

    return {
        f"{name}{way}": by(getattr(attention, name + way), way == "_torch")
        for way in ("_numpy", "_torch", "_cuda")
        if hasattr(attention, name + way)
    }


def like(rows, array):
    """An array as what `rows` is, array or tensor."""
    return torch.from_numpy(array) if isinstance(rows, torch.Tensor) else array


def layer(name, *sizes, home=attention, how=None, **named):
    """A PyTorch layer of the course, drawn, as a function of an array (n, 8)."""
    module = training.initialise(getattr(home, name)(*sizes, **named).double(), 0).requires_grad_(False)
    return {name: lambda rows: module(torch.from_numpy(rows)[None], **(how or {}))[0].numpy()}


def blocks(function, rows):
    side = -(-len(rows) // 3)
    there = np.eye(side, dtype=bool) | (np.arange(side) == 0)
    return function(rows, rows, rows, there, 3, causal=True)


def scanned(function, rows):
    w = [like(rows, a) for a in SQUARES]
    delta = abs(rows @ w[0])
    return function(rows[None], delta[None] / 10, -abs(w[1]), (rows @ w[2])[None], (rows @ w[3])[None])[0]


def walked(rows):
    step = abs(rows @ SQUARES[0]) / 10
    b, c = rows @ SQUARES[1], rows @ SQUARES[2]
    return attention.stream(*(a[None] for a in (rows, step)), -abs(SQUARES[3]), b[None], c[None], SQUARES[4][:, :4])[0][
        0
    ]


def mixture(function, rows):
    w, (w_q, w_o) = ([like(rows, a) for a in given] for given in (SQUARES, EXPERTS))
    return function(rows, w[0][:, :4], w_q, w[1], w[2], w_o, 2, causal=True)


CAUSAL, HOW = {"causal": True}, {"how": {"causal": True}}
LAYERS = (
    ways("attention", lambda f, r: f(r, r, r, **CAUSAL))
    | ways("multi_head_attention", lambda f, r: f(r, r, *(like(r, w) for w in SQUARES[:4]), 2, **CAUSAL))
    | layer("MultiHeadAttention", 8, 2, **TURNS, **HOW)
    | ways("flash_attention", lambda f, r: f(r, r, r, **CAUSAL))
    | {"ring_attention_numpy": lambda r: ring(r)}
    | ways("block_sparse_attention", blocks)
    | ways("sliding_window_attention", lambda f, r: f(r, r, r, 3))
    | {"compressed_attention": lambda r: attention.compressed_attention(r, r, r, 3)}
    | {"native_sparse_attention": lambda r: native(r)}
    | ways("grouped_query_attention", lambda f, r: f(r.reshape(len(r), 2, 4).swapaxes(0, 1), r[None, :, :4], r[None, :, 4:], **CAUSAL).swapaxes(0, 1).reshape(len(r), 8))
    | layer("GroupedQueryAttention", 8, 2, 1, **TURNS, **HOW)
    | layer("MultiHeadLatentAttention", 8, 2, 4, 4, 4, **HOW)
    | layer("IndexedLatentAttention", 8, 2, 4, 4, 4, 6, top_k=3, index_heads=2, d_index=4, home=latent)
    | ways("linear_attention", lambda f, r: f(abs(r), abs(r), r, chunk=4, normalise=True))
    | ways("selective_scan", scanned)
    | {
        "chunked_attention": lambda r: attention.chunked_attention(r, r, r, 4)[0],
        "stream": walked,
        "wkv": lambda r: attention.wkv(abs(SQUARES[0, 0]), SQUARES[0, 1], r, r @ SQUARES[1]),
        "long_convolution": lambda r: attention.long_convolution(r, SQUARES.reshape(-1, 8)[: len(r)]),
        "infini_attention": lambda r: linear.infini_attention(r, r, r, 3, 0.5, delta=True),
    }
    | layer("Mamba", 8, 16)
    | ways("differential_attention", lambda f, r: f(r, r, r @ like(r, SQUARES[0]), r @ like(r, SQUARES[1]), r, 0.7, **CAUSAL))
    | layer("DifferentialAttention", 8, 2, **HOW)
    | ways("mixture_attention", mixture)
    | layer("RoutedAttention", 8, 4, 4, 2, **TURNS)
    | layer("MixtureOfHeadsAttention", 8, 2, 1, **TURNS, **HOW)
)  # fmt: skip
ELSEWHERE = {  # what has `causal` among its arguments and is no function from a text to a text
    "attention_weights": "a map, tested by its layers",
    "LightningIndexer": "scores, used by IndexedLatentAttention",
    "ring_attention": "starts processes; ring_attention_numpy is the same",
    "flash_attention_backward_numpy": "gradients flow back", "flash_attention_backward_torch": "gradients flow back",
    "flash_attention_backward_cuda": "gradients flow back",
}  # fmt: skip


def whole(rows, parts):
    """The rows, and behind them as many others as make their number a multiple of `parts`."""
    return np.concatenate([rows, np.full((-len(rows) % parts, 8), 9.0)])


def ring(rows):
    full = whole(rows, 2)
    halves, places = full.reshape(2, -1, 8), np.arange(len(full)).reshape(2, -1)
    return attention.ring_attention_numpy(halves, halves, halves, places, causal=True).reshape(-1, 8)[: len(rows)]


def native(rows):
    full = whole(rows, 3)
    n = len(full)
    return attention.native_sparse_attention(full, [full] * 3, [full] * 3, np.ones((n, 3)), 3, 2, 4)[: len(rows)]


@pytest.mark.parametrize("name", LAYERS)
def test_no_attention_of_the_course_sees_the_future(name):
    sees_no_future(LAYERS[name])


def test_every_causal_function_and_layer_that_is_exported_is_here():
    def is_causal(thing):
        call = thing.forward if inspect.isclass(thing) and hasattr(thing, "forward") else thing
        return callable(call) and "causal" in inspect.signature(call).parameters

    exported = {name for name in attention.__all__ if is_causal(getattr(attention, name))}
    assert exported - set(LAYERS) == set(ELSEWHERE)


def test_a_leak_would_be_seen():
    with pytest.raises(AssertionError):
        sees_no_future(lambda rows: attention.attention_numpy(rows, rows, rows))
    with pytest.raises(AssertionError):
        sees_no_future(lambda rows: rows - rows.mean(0))
