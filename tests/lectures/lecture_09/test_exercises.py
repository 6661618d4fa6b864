"""The exercises of lecture 09."""

from tests.lectures import judging
from tests.lectures.lecture_09 import answers


class TestExercises(judging.Exercises):
    lecture, answers = "09", answers
