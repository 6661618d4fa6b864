"""In CI a few mutants of each lecture, the same in every run: none may survive. `course.py test --mutation` tries all."""

import pytest

from tests.mutation.answers import answers
from tests.mutation.equivalent import EQUIVALENT
from tests.mutation.judge import SURVIVED, run, sample
from tests.mutation.kept import counts
from utils.judge.exercise import exercises, lectures

EACH = 5  # mutants of a lecture
COUNTED = [n for n in lectures() if any(exercise.number in counts() for exercise in exercises(n))]


@pytest.mark.slow
@pytest.mark.parametrize("number", COUNTED)
def test_of_a_sample_none_survives(number):
    """A lecture's own seed: what is drawn does not depend on the other lectures."""
    drawn = sample(list(answers(number)), EACH, seed=int(number))
    found = run(drawn)
    assert [answer.name for answer, word in zip(drawn, found) if word == SURVIVED] == []


@pytest.mark.parametrize("number", lectures())
def test_what_is_listed_as_equivalent_and_what_was_counted_is_still_there(number):
    """A reason for a line that has changed would excuse something else; counts of older mutants would be no counts."""
    mutants = {exercise.number: set() for exercise in exercises(number)}
    everyone = {exercise.number: 0 for exercise in exercises(number)}
    for scale in (False, True):
        for answer in answers(number, scale):
            mutants[answer.exercise.number].add(answer.mutant.name)
            everyone[answer.exercise.number] += not scale
    stale = [name for n, found in mutants.items() for name in EQUIVALENT.get(n, {}) if name not in found]
    assert stale == []
    if number not in COUNTED:
        pytest.skip(f"nobody has tried them all yet: python -m tests.mutation {number} --keep")
    kept = {n: sum(words.values()) for n, words in counts().items() if n in everyone}
    assert kept == {n: count for n, count in everyone.items() if count}, f"python -m tests.mutation {number} --keep"
    assert not any(words[SURVIVED] for n, words in counts().items() if n in everyone)
