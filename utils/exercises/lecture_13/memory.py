"""Lecture 13: a memory that takes a gradient step for each token. The oracle asks autograd for the gradient."""

import torch

from utils.exercises.arrays import draw
from utils.judge.function import exercise
from utils.judge.result import Failed

MODULE = "beyond"


@exercise("13E", MODULE, returns=("out", "memory"), importance="useful")
def memory_by_gradient(q, k, v, rate, momentum=0.0, forget=0.0):
    memory = torch.zeros(*k.shape[:-2], k.shape[-1], v.shape[-1], dtype=torch.float64)
    step, out = torch.zeros_like(memory), []
    with torch.enable_grad():
        for i in range(k.shape[-2]):
            model = memory.detach().requires_grad_()
            said = (k[..., i, :, None].double() * model).sum(-2)
            loss = 0.5 * (said - v[..., i, :].double()).square().sum()
            (gradient,) = torch.autograd.grad(loss, model)
            step = momentum * step - rate * gradient
            memory = (1 - forget) * memory + step
            out.append((q[..., i, :, None].double() * memory).sum(-2))
    return torch.stack(out, dim=-2).to(q.dtype), memory.to(q.dtype)


def tensors(rng, n=3, d=3, d_v=2, lead=()):
    return tuple(torch.from_numpy(draw(rng, *lead, n, width)) / 2 for width in (d, d, d_v))


@memory_by_gradient.property(
    "one token: what is written is read at once", hint="What is the gradient at M = 0, and does o see its own step?"
)
def _(ask, rng):
    ask(torch.tensor([[2.0]]), torch.tensor([[1.0]]), torch.tensor([[4.0]]), 0.5)
    ask(*tensors(rng, n=1), 0.5)


@memory_by_gradient.property(
    "several tokens: the gradient is that of the last memory",
    hint="What does the memory say for the key, and what is subtracted from what?",
)
def _(ask, rng):
    ask(torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [8.0]]), 0.5)
    ask(*tensors(rng, n=5), 0.3)
    ask(*tensors(rng, n=4, d=2, d_v=4), 1.0)


@memory_by_gradient.property(
    "momentum: a step carries a part of the last one", hint="Which of the two, S or M, is multiplied by momentum?"
)
def _(ask, rng):
    ask(*tensors(rng, n=5), 0.3, momentum=0.5)


@memory_by_gradient.property(
    "forgetting: the old memory shrinks, the step does not",
    hint="By what is M multiplied before S is added, and from which M does the surprise come?",
)
def _(ask, rng):
    ask(*tensors(rng, n=5), 0.3, forget=0.25)


@memory_by_gradient.property("any axes in front", hint="Which two axes of k are swapped, whatever stands in front?")
def _(ask, rng):
    ask(*tensors(rng, lead=(2,)), 0.5)
    ask(*tensors(rng, lead=(2, 3), n=2), 0.5, momentum=0.5)


@memory_by_gradient.property("the float type of the queries", hint="In which float type are the first M and S made?")
def _(ask, rng):
    parts = ask(*(a.float() for a in tensors(rng)), 0.3)
    for part in parts:
        if part.dtype != "float32":
            raise Failed(f"returned {part.dtype}, expected float32 as the arguments have")


@memory_by_gradient.property(
    "all at once: a batch, one token, float32, momentum and forgetting",
    hint="Which of these have you never tried together?",
)
def _(ask, rng):
    for n in (1, 6):
        given = tensors(rng, n=n, d=4, d_v=3, lead=(2, 1))
        ask(*(a.float() for a in given), 0.4, momentum=0.7, forget=0.1)
        ask(*given, 0.4, momentum=0.7, forget=0.1)


def usual(
    q, k, v, rate, momentum=0.0, forget=0.0, *, error=lambda said, v: said - v, carry=True, sign=-1, late=False,
    forgets=lambda memory, step, forget: (1 - forget) * memory + step, rates=lambda rate: rate, first=False,
    average=False,
):  # fmt: skip
    """The function in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    memory = torch.zeros(*k.shape[:-2], k.shape[-1], v.shape[-1], dtype=k.dtype)
    step, out = torch.zeros_like(memory), []
    for i in range(k.shape[-2]):
        row, value, asked = k[..., i : i + 1, :], v[..., i : i + 1, :], q[..., i : i + 1, :]
        if late:
            out.append(asked @ memory)
        seen = (1 - forget) * memory if first else memory
        surprise = row.mT @ error(row @ seen, value)
        surprise = (1 - momentum) * surprise if average else surprise
        step = (momentum * step if carry else 0 * step) + sign * rates(rate) * surprise
        memory = forgets(memory, step, forget)
        if not late:
            out.append(asked @ memory)
    return torch.cat(out, dim=-2), memory


memory_by_gradient.mistakes_of(
    usual,
    {
        "The step goes up the gradient: subtract rate times the surprise.": {"sign": 1},
        "The surprise is -k v alone: what the memory says already has to be subtracted (this is linear attention).": {
            "error": lambda said, v: -v
        },
        "momentum is not used.": {"carry": False},
        "The new gradient is multiplied by 1 - momentum: it enters S in full.": {"average": True},
        "The new step is forgotten, too: only the old memory shrinks.": {
            "forgets": lambda memory, step, forget: (1 - forget) * (memory + step)
        },
        "The memory is multiplied by forget: it keeps 1 - forget.": {
            "forgets": lambda memory, step, forget: (forget if forget else 1) * memory + step
        },
        "forget is not used.": {"forgets": lambda memory, step, forget: memory + step},
        "The surprise comes from the forgotten memory: it is computed from the old one.": {"first": True},
        "A query reads before its own token is learned: it reads after the step.": {"late": True},
        "The gradient is doubled: the loss is half the square.": {"rates": lambda rate: 2 * rate},
    },
)
