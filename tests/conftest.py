"""What tests of several rooms share."""

import signal

import pytest


@pytest.fixture
def ctrl_c():
    """The programs that a test starts heed Ctrl-C, also in a suite that was started with it ignored (`... &`)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
