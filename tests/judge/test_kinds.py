"""The kinds of exercises: what is right passes, what is wrong is named; and how exercises are numbered and found."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.judge import specimens
from tests.judge.test_hostile import report
from utils.check import progress
from utils.judge import exercise as registry
from utils.judge import progress as kept
from utils.judge.exercise import find, order
from utils.judge.function import exercise
from utils.judge.module import module
from utils.judge.result import Mistake, Property

# --- functions of tensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x, times=2: x**2, "That is the square."),
        (lambda x, times=2: times * x.numpy(), "returned a NumPy array, expected a tensor of shape (2, 3)"),
        (lambda x, times=2: x.mul_(times), "it changes `x` in place"),
        (lambda x, times=2: times * x.detach(), "gradient of x"),
        (lambda x, times=2: x + x, "Stay in torch"),
        (lambda x, times=2: (times * x).float(), "was something computed in single precision"),
    ],
    ids=["square", "numpy", "in place", "no gradient", "factor", "single"],
)
def test_a_wrong_function_of_tensors_is_named(answer, words):
    result, text = report(specimens.double, answer)
    assert not result.passed and words in text


def test_a_right_function_of_tensors_passes():
    assert report(specimens.double, lambda x, times=2: sum([x] * times))[0].passed


# --- modules ---------------------------------------------------------------------------------------------------------


class Right(torch.nn.Module):
    def __init__(self, d):
        super().__init__()
        self.second = torch.nn.Linear(d, d, bias=False)
        self.first = torch.nn.Linear(d, d)

    def forward(self, x):
        return self.first(x) / (1 + torch.exp(-self.second(x)))


def with_forward(forward):
    return type("Wrong", (Right,), {"forward": forward})


class Renamed(torch.nn.Module):
    def __init__(self, d):
        super().__init__()
        self.one, self.two = torch.nn.Linear(d, d), torch.nn.Linear(d, d, bias=False)

    def forward(self, x):
        return self.one(x) * torch.sigmoid(self.two(x))


class TooMany(Right):
    def __init__(self, d):
        super().__init__(d)
        self.third = torch.nn.Linear(d, d)


class Fixed(Right):
    def __init__(self, d):
        super().__init__(3)


def test_a_right_module_passes_whatever_the_order_of_its_parameters():
    result, text = report(specimens.Mix, Right)
    assert result.passed, text


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Renamed, "the parameter first.weight (3, 3) is missing"),
        (TooMany, "there is a parameter too many: third.weight"),
        (Fixed, "first.weight has the shape (3, 3), expected (5, 5)"),
        (with_forward(lambda self, x: self.first(x) + 0 * self.second(x)), "The gate is missing."),
        (with_forward(lambda self, x: self.first(x) * self.second(x).sigmoid().detach()), "gradient of"),
        (
            with_forward(lambda self, x: specimens.Mix.oracle.forward(self, x).detach()),
            "gradient of input 0: returned nothing",
        ),
        (with_forward(lambda self, x: self.first(x)[..., :2]), "returned the shape (2, 2), expected (2, 3)"),
        (with_forward(lambda self, x: None), "returned nothing (None), expected a tensor of shape (2, 3)"),
        (torch.nn.Linear, "TypeError"),
        (dict, "a torch.nn.Module is expected, dict was made"),
    ],
    ids=[
        "renamed",
        "too many",
        "fixed size",
        "mistake",
        "detached gate",
        "detached",
        "shape",
        "None",
        "signature",
        "dict",
    ],
)
def test_a_wrong_module_is_named(answer, words):
    result, text = report(specimens.Mix, answer)
    assert not result.passed and words in text


def test_a_mistake_that_declares_its_parameters_in_another_order_is_recognised_by_their_names():
    halved = with_forward(lambda self, x: self.first(x) * torch.sigmoid(self.second(x)) / 2)
    mistaken = dataclasses.replace(
        specimens.Mix, mistakes=[Mistake("Half of it is missing.", halved)], properties=specimens.Mix.properties[2:]
    )
    registry._declared.pop("90D")

    class AnotherOrder(specimens.Mix.oracle):
        def forward(self, x):
            return super().forward(x) * 0.5

    assert [n for n, _ in AnotherOrder(2).named_parameters()] != [n for n, _ in halved(2).named_parameters()]
    assert report(mistaken, AnotherOrder)[1].endswith("Half of it is missing.")


def test_a_module_may_not_remember_the_call_before():
    def holds(ask, rng):
        earlier, x = (torch.from_numpy(rng.normal(size=(2, 3))).float() for _ in range(2))
        ask.after((earlier,), x)

    once_more = dataclasses.replace(specimens.Mix, properties=[Property("as if nothing had come before", holds, "")])
    registry._declared.pop("90D")

    def remembers(self, x):
        before, self.seen = getattr(self, "seen", 0.0), x
        return specimens.Mix.oracle.forward(self, x) + 0 * x + before

    assert report(once_more, Right)[0].passed
    assert report(specimens.Mix, with_forward(remembers))[0].passed
    assert not report(once_more, with_forward(remembers))[0].passed


def test_a_way_to_copy_sets_the_names_free():
    def copy(learners, values):
        with torch.no_grad():
            for mine, theirs in (
                ("one.weight", "first.weight"),
                ("one.bias", "first.bias"),
                ("two.weight", "second.weight"),
            ):
                learners.get_parameter(mine).copy_(values[theirs])

    free = dataclasses.replace(specimens.Mix, copy=copy, properties=specimens.Mix.properties[1:])
    registry._declared.pop("90D")
    assert report(free, Renamed)[0].passed
    assert not report(free, with_forward(lambda self, x: x))[0].passed


# --- steps -----------------------------------------------------------------------------------------------------------


def zeroes_at_the_end(model, optimizer, x, y):
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def never_steps(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    return loss


def returns_nothing(model, optimizer, x, y):
    zeroes_at_the_end(model, optimizer, x, y)


def test_a_right_step_passes_wherever_it_clears_the_gradients():
    result, text = report(specimens.training_step, zeroes_at_the_end)
    assert result.passed, text


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (specimens.training_step.mistakes[0].answer, "Gradients of the step before are still there."),
        (never_steps, "weight after step 1"),
        (returns_nothing, "what step 1 returns: returned nothing (None)"),
    ],
    ids=["accumulates", "never steps", "returns nothing"],
)
def test_a_wrong_step_is_named(answer, words):
    result, text = report(specimens.training_step, answer)
    assert not result.passed and words in text


def test_a_tensor_is_no_number_where_a_number_is_asked_for():
    def returns_a_number(model, optimizer, x, y):
        return specimens.training_step.oracle(model, optimizer, x, y).item()

    asks_for_a_number = dataclasses.replace(specimens.training_step, oracle=returns_a_number)
    registry._declared.pop("90E")
    assert report(asks_for_a_number, zeroes_at_the_end)[0].passed
    result, text = report(asks_for_a_number, specimens.training_step.oracle)
    assert not result.passed and "what step 1 returns: returned a Tensor, expected a number" in text


def test_a_wrong_container_is_not_told_what_a_property_asks():
    along = dataclasses.replace(specimens.shares, properties=specimens.shares.properties[1:])  # its hint is of the axis
    registry._declared.pop("90A")
    result, text = report(along, lambda x, axis=-1: (x / x.sum(axis, keepdims=True)).tolist())
    assert "returned a list, expected a NumPy array of shape (2, 3)" in text and result.hint == ""
    result, text = report(along, lambda x, axis=-1: torch.from_numpy(x / x.sum(axis, keepdims=True)))
    assert "returned a Tensor" in text and result.hint == ""
    assert report(along, lambda x, axis=-1: x)[1].endswith("Sum along the axis.")


# --- tests that find the bug -----------------------------------------------------------------------------------------


def only_squares(triangle):
    assert np.array_equal(triangle(3, 3), np.tri(3, dtype=bool))


def refuses_everything(triangle):
    raise AssertionError


def returns_false(triangle):
    return np.array_equal(triangle(2, 4), np.tri(2, 4, 2, dtype=bool))


def asks_for_more(triangle):
    assert triangle(3, 3).flags.owndata and not triangle(3, 3).all() and triangle(2, 2).strides == (2, 1)
    assert False if triangle(1, 3)[0, 2] == np.False_ else True
    assert type(triangle(2, 2)[0, 0]) is bool


def flips_a_coin(triangle, tried=[]):  # noqa: B006
    tried.append(1)
    assert len(tried) % 2


def test_a_test_that_finds_every_bug_passes():
    result, text = report(specimens.test_triangle, specimens.test_triangle.oracle)
    assert result.passed and text.endswith("7 of 7 properties hold.")


def test_the_report_says_which_mutant_survived():
    result, text = report(specimens.test_triangle, only_squares)
    assert {row.name for row in result.rows if row.holds is False} == {
        "finds: starts at the top left",
        "finds: the wrong corner",
        "finds: never moves down",
    }
    assert "it survived" in text and text.endswith("Try fewer rows than columns.")


@pytest.mark.parametrize("answer", [refuses_everything, asks_for_more, flips_a_coin], ids=lambda a: a.__name__)
def test_a_test_that_refuses_the_right_code_fails_and_says_so(answer):
    result, text = report(specimens.test_triangle, answer)
    assert result.rows[0].holds is False and "refused: AssertionError" in text
    assert {row.holds for row in result.rows[2:]} == {None}


def test_a_test_that_only_returns_false_is_told_to_raise():
    assert "A test says no with an exception" in report(specimens.test_triangle, returns_false)[1]


def test_a_hunt_needs_five_mutants():
    few = dataclasses.replace(specimens.test_triangle, mutants=specimens.test_triangle.mutants[:4])
    registry._declared.pop("90F")
    with pytest.raises(ValueError, match="at least 5 mutants"):
        few.judge(only_squares)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def declared(monkeypatch):
    """Lecture 1 as it may look in a second edition."""
    monkeypatch.setattr(registry, "_declared", {})
    monkeypatch.setattr(
        registry, "exercises", lambda lecture: sorted(registry._declared.values(), key=lambda e: order(e.number))
    )
    monkeypatch.setattr(registry, "lectures", lambda: ["01"])
    monkeypatch.setattr(kept, "lectures", lambda: ["01"])
    monkeypatch.setattr(kept, "exercises", lambda lecture: registry.exercises(lecture))
    for number, formerly, importance in (("1B", "1.2", "extra"), ("1A", "1.1", "essential"), ("1C", "", "useful")):
        exercise(number, "none", formerly=formerly, importance=importance)(lambda x: x)
    return registry._declared


@pytest.mark.parametrize("number", ["1A", "1a", " 1A", "1.1", 1.1])
def test_an_exercise_is_found_by_its_letter_its_old_number_or_a_float(declared, number):
    assert find(number) is declared["1A"]


@pytest.mark.parametrize("number", ["1D", "1.3", 1.3, 1, True, None, ["1A"], "A1", ""])
def test_an_unknown_number_gets_a_sentence(declared, number):
    with pytest.raises(LookupError, match="There is no exercise"):
        find(number)


def test_a_float_that_could_be_two_is_asked_for_in_quotes(declared):
    exercise("1D", "none", formerly="1.10")(lambda x: x)
    with pytest.raises(LookupError, match="put the number in quotes"):
        find(1.1)


def test_numbers_are_in_order():
    assert sorted(["1.10", "1.2", "2A", "1B", "1A", "10A"], key=order) == ["1A", "1B", "1.2", "1.10", "2A", "10A"]


def test_progress_under_an_old_number_is_carried_over(declared, monkeypatch, capsys):
    monkeypatch.setattr(kept, "_now", {"1.1": "passed", "1.2": "tried", "1B": "passed"})
    progress()
    assert capsys.readouterr().out.split("\n")[:5] == [
        "Lecture 01",
        "  1A    <lambda>  essential  passed",
        "  1B    <lambda>  extra      passed",
        "  1C    <lambda>  useful     not attempted",
        "2 of 3 exercises passed.",
    ]


@pytest.mark.parametrize(("number", "importance"), [("1", ""), ("A1", ""), ("1A", "vital")])
def test_a_declaration_with_a_wrong_number_or_importance_is_refused(declared, number, importance):
    with pytest.raises(ValueError, match="expected one"):
        module(number, "none", importance=importance)(torch.nn.Identity)
