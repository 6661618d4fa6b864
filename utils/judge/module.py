"""An exercise whose answer is a PyTorch module: its parameters, and with copied weights its outputs and gradients.

    @module("1E", "fundamentals", make={"d_model": 4})
    class SelfAttention(torch.nn.Module):                       # the oracle: the same parameters, its own way to compute
        ...

    @SelfAttention.property("the parameters of the contract")
    def _(ask, rng):
        ask.parameters()

    @SelfAttention.property("the same output with the same weights")
    def _(ask, rng):
        ask(torch.from_numpy(draw(rng, 2, 3, 4)))

The names of the parameters are part of the contract, as they are for a checkpoint: weights are copied by name. Where
they shall be free, `copy(learners, values)` puts the values ({name: tensor}) into the learner's module.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from utils.judge import drivers
from utils.judge.asked import AskedExercise
from utils.judge.result import Failed
from utils.judge.trial import Call, Trial, precision


@dataclass
class ModuleExercise(AskedExercise):
    """make: the keyword arguments with which the module is made, where a property does not say otherwise."""

    make: dict = field(default_factory=dict)
    copy: Callable = drivers.by_name

    wanted = "a class, a torch.nn.Module"

    def accepts(self, answer):
        return inspect.isclass(answer)

    def trial(self, answer, own):
        return ModuleTrial(self, answer, own)


class ModuleTrial(Trial):
    """Stands for a learner's module: makes one, gives it weights, and calls it."""

    def parameters(self, **make):
        """Raise Failed unless the module has the oracle's parameters: names and shapes."""
        make = {**self._exercise.make, **make}
        expected = {name: tuple(p.shape) for name, p in drivers.parameters(self._exercise.oracle, make).items()}
        call = Call(make, lambda answer: drivers.parameters(answer, make))
        reply = self.reply_to(call, (make,), {}, "parameters")
        self.calls[-1] = call  # their values mean nothing: no known mistake is looked for among them
        got = {value.name: value.array.shape for value in reply.values}
        for name, shape in expected.items():
            if name not in got:
                raise Failed(
                    f"the parameter {name} {shape} is missing", f"it has {_listed(got)}\nexpected {_listed(expected)}"
                )
            if got[name] != shape:
                raise Failed(f"{name} has the shape {got[name]}, expected {shape}")
        if more := [name for name in got if name not in expected]:
            raise Failed(f"there is a parameter too many: {more[0]}", f"expected {_listed(expected)}")

    def begins(self, size, **make):
        """Raise Failed unless the numbers of each matrix begin at random, and of about this size: within a factor of 5."""
        make = {**self._exercise.make, **make}
        call = Call(make, lambda answer: drivers.parameters(answer, make))
        for value in self.reply_to(call, (make,), {}, "parameters").values:
            found = float(value.array.std()) if value.array.ndim > 1 else size
            if not size / 5 < found < 5 * size:
                raise Failed(f"{value.name} begins with numbers of size {found:.1g}, expected about {size:.1g}")
        self.calls[-1] = call  # as above

    def __call__(self, *args, make=None, **kwargs):
        """The module's output, or the list of its outputs, as arrays, after they were found equal to the oracle's."""
        got = self._ask(args, kwargs, make or {}, with_gradients=False)
        return got if len(got) > 1 else got[0]

    def after(self, earlier, *args, make=None, **kwargs):
        """The same as a call, of a module that was called with the tuple `earlier` before: it must not remember that."""
        got = self._ask(args, kwargs, make or {}, with_gradients=False, earlier=earlier)
        return got if len(got) > 1 else got[0]

    def gradients(self, *args, make=None, **kwargs):
        """The same for the outputs and the gradients of all inputs with floats and all parameters, paired by name.

        Where names are free, only the gradients of the inputs are compared.
        """
        return self._ask(args, kwargs, make or {}, with_gradients=True)

    def work(self, *args, **make):
        """The floating-point operations of the module's products, of matrices and of numbers, for these inputs."""
        make, values, copy = self._given(make)
        call = Call(make, lambda answer: drivers.work(answer, make, values, copy, args))
        counted = int(self.reply_to(call, (make, values, copy, args), {}, "work").values[0].array)
        self.calls[-1] = Call(make, call.compute)  # a count is not compared: no known mistake is looked for in it
        return counted

    def _given(self, make):
        """What a module is made with, and the values and the way in which they are put into it."""
        make = {**self._exercise.make, **make}
        if self._exercise.copy is drivers.by_name:
            self.parameters(**make)
        return make, weights(drivers.parameters(self._exercise.oracle, make)), self._exercise.copy

    def _ask(self, args, kwargs, make, with_gradients, earlier=()):
        make, values, copy = self._given(make)
        named = copy is drivers.by_name

        def compute(answer):
            own = drivers.by_name if answer is self._exercise.oracle else copy
            return drivers.module(answer, make, values, own, args, kwargs, with_gradients, named, earlier)

        arguments = {**make, **{f"input {i}" if len(args) > 1 else "input": a for i, a in enumerate(args)}, **kwargs}
        reply = self.reply_to(
            Call(arguments, compute),
            (make, values, copy, args, kwargs, with_gradients, named, earlier),
            {},
            "module",
        )
        return self.compared(reply, precision(arguments), "Tensor")


def weights(parameters):
    """Values for parameters, {name: tensor in double}: random, such that outputs have about the size of the inputs."""
    import torch

    rng = np.random.default_rng(0)
    drawn = {
        name: rng.normal(size=tuple(p.shape)) * max(1, p[0].numel() if p.ndim > 1 else 1) ** -0.5
        for name, p in parameters.items()
    }
    return {name: torch.from_numpy(np.asarray(value)) for name, value in drawn.items()}


def _listed(shapes):
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "no parameters"


def module(number, name, *, make=None, returns=(), copy=drivers.by_name, formerly="", importance=""):
    """Decorator: make an exercise of an oracle, a torch.nn.Module, under its name; `name` is the lecture's module."""

    def declare(oracle):
        return ModuleExercise(
            number,
            oracle.__name__,
            name,
            formerly,
            importance,
            oracle=oracle,
            returns=returns,
            make=make or {},
            copy=copy,
        )

    return declare
