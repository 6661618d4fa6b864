"""An operation of autograd from the course, which an answer may use: it travels by name, and opens no closed door."""

import pytest
import torch

from attention.flash import FlashAttention, flash_attention_torch
from utils.judge import packing
from utils.judge.exercise import find
from utils.judge.packing import pack
from utils.judge.report import lines
from utils.judge.result import NotSendable


def report(exercise, answer, own):
    return "\n".join(lines(exercise, exercise.judge(answer, own)))


def test_an_operation_of_autograd_travels_by_name_and_is_no_way_round_the_closed_door():
    tile_gradients = find("6D")

    def by_the_class(q, k, v, out, lse, d_out, causal=False, scale=None):
        tensors = [a.detach().requires_grad_() for a in (q, k, v)]
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return torch.autograd.grad(FlashAttention.apply(*tensors, causal, scale, 16, 16)[0], tensors, d_out)

    def by_the_function(q, k, v, out, lse, d_out, causal=False, scale=None):
        tensors = [a.detach().requires_grad_() for a in (q, k, v)]
        return torch.autograd.grad(flash_attention_torch(*tensors, causal, scale)[0], tensors, d_out)

    def by_its_globals(*args, **kwargs):
        return FlashAttention.backward.__wrapped__.__globals__["tile_gradients"](*args, **kwargs)

    for answer in (by_the_class, by_the_function, by_its_globals):
        for own in (None, tile_gradients.reference()):
            assert "it calls the course's own tile_gradients: write yours" in report(tile_gradients, answer, own)


def test_a_class_that_says_it_is_the_courses_operation_does_not_travel_as_it():
    said = {"__module__": "attention.flash", "__qualname__": "FlashAttention"}
    with pytest.raises(NotSendable, match="not the same object"):
        pack(type(FlashAttention)("FlashAttention", (torch.autograd.Function,), said))


def test_what_an_installed_package_holds_is_not_copied_wherever_it_is_installed():
    assert not packing._travels("numpy.core", "/home/ada/.local/lib/python3.11/site-packages/numpy/core.py")
    assert packing._travels("mine", "/home/ada/mine.py")
