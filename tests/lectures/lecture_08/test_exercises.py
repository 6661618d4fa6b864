"""The exercises of lecture 08."""

from tests.lectures import judging
from tests.lectures.lecture_08 import answers


class TestExercises(judging.Exercises):
    lecture, answers = "08", answers
