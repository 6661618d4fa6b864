"""The exercises of lecture 12."""

from tests.lectures import judging
from tests.lectures.lecture_12 import answers


class TestExercises(judging.Exercises):
    lecture, answers = "12", answers
