"""One exercise of each kind, for the tests of the judge: they stand in no lecture."""

from functools import partial

import numpy as np
import torch

from utils.judge import exercise as registry
from utils.judge.bug import bug
from utils.judge.function import exercise
from utils.judge.kernel import KernelExercise, compiled, launch, must_be
from utils.judge.module import module
from utils.judge.step import step

_before = dict(registry._declared)


@exercise("90A", "none")
def shares(x, axis=-1):
    return x / x.sum(axis, keepdims=True)


@shares.property("each row sums to 1")
def _(ask, rng):
    ask(rng.integers(1, 5, size=(2, 3)).astype(float))


@shares.property("any axis", hint="Sum along the axis.")
def _(ask, rng):
    ask(rng.integers(1, 5, size=(2, 3)).astype(float), axis=0)


@shares.mistake("The sum runs over the whole array.")
def _(x, axis=-1):
    return x / x.sum()


@exercise("90B", "none", returns=("low", "high"))
def extremes(x):
    return x.min(-1), x.max(-1)


@extremes.property("the smallest and the largest of each row")
def _(ask, rng):
    ask(rng.integers(9, size=(2, 3)).astype(float))


@exercise("90C", "none")
def double(x, times=2):
    return times * x if isinstance(x, torch.Tensor) else times * np.asarray(x)


@double.property("doubles")
def _(ask, rng):
    ask(torch.from_numpy(rng.normal(size=(2, 3))))
    ask(torch.ones(2, dtype=torch.float32))


@double.property("the gradient is the factor", hint="Stay in torch: detach and numpy() cut the gradient.")
def _(ask, rng):
    ask.gradients(torch.from_numpy(rng.normal(size=(2, 3))), times=3)


@double.mistake("That is the square.")
def _(x, times=2):
    return x * x


@module("90D", "none", make={"d": 3})
class Mix(torch.nn.Module):
    def __init__(self, d):
        super().__init__()
        self.first, self.second = torch.nn.Linear(d, d), torch.nn.Linear(d, d, bias=False)

    def forward(self, x):
        return self.first(x) * torch.sigmoid(self.second(x))


@Mix.property("the parameters of the contract")
def _(ask, rng):
    ask.parameters()
    ask.parameters(d=5)


@Mix.property("the same output with the same weights")
def _(ask, rng):
    ask(torch.from_numpy(rng.normal(size=(2, 3))).float())


@Mix.property("gradients reach everything")
def _(ask, rng):
    ask.gradients(torch.from_numpy(rng.normal(size=(2, 3))).float())


@Mix.mistake("The gate is missing.")
class _(Mix.oracle):
    def forward(self, x):
        return self.first(x) + 0 * self.second(x)


@step("90E", "none")
def training_step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    return loss


@training_step.property("three steps: the same losses, the same weights")
def _(ask, rng):
    torch.manual_seed(0)
    batches = [tuple(torch.from_numpy(rng.normal(size=(4, n))).float() for n in (2, 1)) for _ in range(3)]
    ask(torch.nn.Linear(2, 1), batches, optimizer=partial(torch.optim.SGD, lr=0.1))


@training_step.mistake("Gradients of the step before are still there.")
def _(model, optimizer, x, y):
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    return loss


@bug("90F", "none", subject="triangle")
def test_triangle(triangle):
    for n, m in ((1, 1), (3, 3), (2, 4), (4, 2)):
        assert np.array_equal(triangle(n, m), np.tri(n, m, m - n, dtype=bool))


test_triangle.oracle.__test__ = False  # not one of pytest's


@test_triangle.right
def _(n, m):
    return np.arange(m) <= np.arange(n)[:, None] + m - n


@test_triangle.right
def _(n, m):
    return np.tril(np.ones((n, m), bool), m - n)


for what, shift, hint in (
    ("starts at the top left", lambda n, m: 0, "Try fewer rows than columns."),
    ("one too far", lambda n, m: m - n + 1, "Look at the diagonal."),
    ("one too short", lambda n, m: m - n - 1, "Look at the diagonal."),
    ("the wrong corner", lambda n, m: n - m, "Try fewer rows than columns."),
    ("never moves down", lambda n, m: max(0, m - n), "Try more rows than columns."),
):
    test_triangle.mutant(what, hint)(lambda n, m, shift=shift: np.tri(n, m, shift(n, m), dtype=bool))


scale = KernelExercise("90G", "SCALE", "none", fault_hints={"out of bounds": "Compare i with n."})
RIGHT_KERNEL = """
__global__ void scale(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = 2 * x[i];
}"""


@scale.property("every element, and nothing beyond the last", hint="Two times each.")
def _(source, rng):
    x, y = np.arange(40, dtype=np.float32), np.zeros(40, dtype=np.float32)
    launch(compiled(source, "scale"), 2, 32, 0, x, y, 40)
    must_be(y, 2 * x)


registry._declared.clear()
registry._declared.update(_before)
