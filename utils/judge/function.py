"""An exercise whose answer is a function of numbers or arrays, compared with an oracle.

    @exercise("1.1", "fundamentals")
    def softmax(x, axis=-1):                                    # the oracle: float64, not the lecture's way
        ...

    @softmax.property("scores of 1e4 do not overflow")
    def _(ask, rng):
        ask(np.array([[1e4, 0.0, -1e4]]))                       # the learner's result must equal the oracle's

    @softmax.mistake("exp overflows: subtract the largest score first.")
    def _(x, axis=-1):
        ...

A property calls `ask` as if it were the learner's function. `ask` runs it elsewhere, on copies, compares with the
oracle and hands back the result as plain arrays. What more a property wants, it says with `Failed`; `ask.run` compares
with nothing.
"""

from utils.judge.asked import AskedExercise
from utils.judge.trial import FunctionTrial


class FunctionExercise(AskedExercise):
    def trial(self, answer, own):
        return FunctionTrial(self, answer, own)


def exercise(number, module, returns=(), *, formerly="", importance=""):
    """Decorator: make an exercise of its oracle, under the oracle's name."""

    def make(oracle):
        return FunctionExercise(number, oracle.__name__, module, formerly, importance, oracle=oracle, returns=returns)

    return make
