"""An exercise whose answer is a training step: it is run on a copy of a small model, batch after batch.

@step("1F", "fundamentals")
def training_step(model, optimizer, x, y):                  # the oracle; what it returns, the loss, is compared too
    ...

@training_step.property("three steps: the same losses, the same weights")
def _(ask, rng):
    ask(model, [(x1, y1), (x2, y2), (x3, y3)], optimizer=partial(torch.optim.SGD, lr=0.1))
"""

import copy
import inspect

from utils.judge import drivers
from utils.judge.asked import AskedExercise
from utils.judge.trial import Call, Trial, precision


class StepExercise(AskedExercise):
    def trial(self, answer, own):
        return StepTrial(self, answer, own)


class StepTrial(Trial):
    """Stands for a learner's training step."""

    def __call__(self, model, batches, optimizer):
        """What the steps return and the weights after each, {name: array}, after they were found equal to the oracle's.

        model: a torch.nn.Module; batches: tuples of what a step is given after model and optimizer; optimizer: makes
        one of the parameters.
        """
        names = list(inspect.signature(self._exercise.oracle).parameters)[2:]
        first = dict(zip(names, batches[0]))

        def compute(answer):
            return drivers.step(answer, *copy.deepcopy((model, batches)), optimizer)

        reply = self.reply_to(Call(first, compute), (model, batches, optimizer), {}, "step")
        got = self.compared(reply, precision(first), "Tensor")
        return dict(zip(self.calls[-1].names, got))


def step(number, module, *, formerly="", importance=""):
    """Decorator: make an exercise of its oracle, a training step, under the oracle's name."""

    def make(oracle):
        return StepExercise(number, oracle.__name__, module, formerly, importance, oracle=oracle)

    return make
