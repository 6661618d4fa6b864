"""The exercises of lecture 13."""

from tests.lectures import judging
from tests.lectures.lecture_13 import answers


class TestExercises(judging.Exercises):
    lecture, answers = "13", answers
