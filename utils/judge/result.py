"""What judging an answer ends with: rows, an example, a hint; and the exceptions on the way there."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple


class Failed(Exception):
    """Raised by a property that does not hold: a sentence that says where, and more lines if there is more to say."""

    def __init__(self, why, details=""):
        super().__init__(why)
        self.details = details


class WrongKind(Failed):
    """What was returned is of another kind than what is asked for: a list, a tuple, a tensor in place of an array."""


class Stopped(Failed):
    """The answer was ended, or ended its process; the text says why."""


class NotAttempted(Exception):
    """The answer is still the stub."""


class NotSendable(Exception):
    """The answer holds something that cannot be copied to another process; the text names it."""


class Property(NamedTuple):
    name: str
    holds: Callable  # (ask, rng) -> None, raises Failed; for a kernel (source, rng)
    hint: str


class Mistake(NamedTuple):
    message: str
    answer: Callable  # the wrong answer itself, with the exercise's signature


class Row(NamedTuple):
    """What became of one property: True, False, or None where it was not tried."""

    name: str
    holds: bool | None
    why: str = ""


@dataclass
class Result:
    rows: list[Row] = field(default_factory=list)
    example: list[tuple[str, str]] = field(default_factory=list)  # (name, text) of the call where the first one failed
    details: str = ""  # what else the first failure had to say, over several lines
    hint: str = ""
    printed: str = ""

    @property
    def passed(self):
        return all(row.holds for row in self.rows)
