"""The exercises of lecture 02."""

from tests.lectures import judging
from tests.lectures.lecture_02 import answers


class TestExercises(judging.Exercises):
    lecture, answers = "02", answers
