"""The exercises of lecture 10."""

from tests.lectures import judging
from tests.lectures.lecture_10 import answers


class TestExercises(judging.Exercises):
    lecture, answers = "10", answers
