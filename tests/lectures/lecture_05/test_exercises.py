"""The exercises of lecture 05."""

from tests.lectures import judging
from tests.lectures.lecture_05 import answers


class TestExercises(judging.Exercises):
    lecture, answers = "05", answers
