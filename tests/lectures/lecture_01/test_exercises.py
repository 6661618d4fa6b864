"""The exercises of lecture 01."""

from tests.lectures import judging
from tests.lectures.lecture_01 import answers


class TestExercises(judging.Exercises):
    lecture, answers = "01", answers
