"""The exercises of lecture 03."""

import torch

from tests.lectures import judging
from tests.lectures.lecture_03 import answers
from utils.exercises.lecture_03.layer import Cache
from utils.judge.show import argument


class TestExercises(judging.Exercises):
    lecture, answers = "03", answers


def test_a_cache_is_shown_in_words():
    shown = argument(Cache(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)))
    assert shown == "a cache that holds 3 tokens"
