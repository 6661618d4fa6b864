"""The exercises of lecture 04."""

from tests.lectures import judging
from tests.lectures.lecture_04 import answers


class TestExercises(judging.Exercises):
    lecture, answers = "04", answers
