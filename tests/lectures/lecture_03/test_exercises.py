"""The exercises of lecture 03."""

from tests.lectures import judging
from tests.lectures.lecture_03 import answers


class TestExercises(judging.Exercises):
    lecture, answers = "03", answers
