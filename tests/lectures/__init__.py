import pytest

pytest.register_assert_rewrite("tests.lectures.judging")  # it asserts, and pytest rewrites only test_*.py by itself
