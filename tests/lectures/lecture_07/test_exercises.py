"""The exercises of lecture 07."""

from tests.lectures import judging
from tests.lectures.lecture_07 import answers


class TestExercises(judging.Exercises):
    lecture, answers = "07", answers
