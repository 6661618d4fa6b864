"""The language model for the tests of this folder, which are skipped where it is not installed."""

import pytest

from utils import language_model


@pytest.fixture(scope="session")
def smollm():
    problem = language_model.problem()
    if problem:
        pytest.skip(problem)
    return language_model.load()
