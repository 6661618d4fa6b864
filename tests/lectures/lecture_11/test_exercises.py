"""The exercises of lecture 11."""

from tests.lectures import judging
from tests.lectures.lecture_11 import answers


class TestExercises(judging.Exercises):
    lecture, answers = "11", answers
