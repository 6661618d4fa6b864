"""The exercises of lecture 06."""

from tests.lectures import judging
from tests.lectures.lecture_06 import answers


class TestExercises(judging.Exercises):
    lecture, answers = "06", answers
