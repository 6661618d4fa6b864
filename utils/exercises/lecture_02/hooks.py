"""Lecture 02: a module is asked with a hook at one of its places."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from utils.judge import drivers
from utils.judge.module import ModuleExercise, ModuleTrial
from utils.judge.trial import Call, precision


def replaced(_module, _inputs, output):
    """What a hook of a property puts in the place of what it sees: each head by a factor of its own."""
    return output * torch.arange(1, output.shape[1] + 1, dtype=output.dtype)[:, None, None]


def hooked(built, values, place):
    """Copy weights by name, and register that hook at a place."""
    drivers.by_name(built, values)
    found = getattr(built, place, None)
    if not isinstance(found, nn.Module):
        raise AttributeError(f"self.{place} is no module on which a hook can be registered")
    found.register_forward_hook(replaced)


class HookedTrial(ModuleTrial):
    def hooked(self, place, *args, make=None, **kwargs):
        """The output, with a hook at a place that replaces what it sees, after it was found equal to the oracle's."""
        make, values, _ = self._given(make or {})
        copy = partial(hooked, place=place)

        def compute(answer):
            return drivers.module(answer, make, values, copy, args, kwargs, False, True)

        arguments = {**make, "hook on": place, "input": args[0], **kwargs}
        reply = self.reply_to(Call(arguments, compute), (make, values, copy, args, kwargs, False, True), {}, "module")
        return self.compared(reply, precision(arguments), "Tensor")


@dataclass
class HookedExercise(ModuleExercise):
    def trial(self, answer, own):
        return HookedTrial(self, answer, own)
