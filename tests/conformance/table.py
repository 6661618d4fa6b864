"""What the course was held against: mechanism, independent implementation, cases, largest difference. One table.

    python -m tests.conformance            # prints it

A row is registered by the module that measures it; `table()` measures all. Everything is computed in single precision,
with copied weights and drawn inputs, and differences are relative to the largest number of a result, at least 1.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

LARGEST = 5e-6  # the largest difference allowed
_registered = {}


class Measured(NamedTuple):
    """A line of the table. cases: compared results; largest: the largest of their differences."""

    mechanism: str
    oracle: str
    cases: int
    largest: float


@dataclass(frozen=True)
class Row:
    """A mechanism of the course beside an independent implementation of it.

    run(factor, **case) returns [ours, ...] and theirs, arrays or tensors of one shape; factor is multiplied with our
    queries. cases: {name: what run is given}.
    """

    mechanism: str
    oracle: str
    run: Callable
    cases: dict = field(default_factory=dict)

    def differences(self, name, factor=1.0):
        """The differences of one case, one for each result of ours."""
        with torch.no_grad():
            ours, theirs = self.run(factor, **self.cases[name])
        return [difference(mine, theirs) for mine in ours]

    def measure(self):
        found = [one for name in self.cases for one in self.differences(name)]
        return Measured(self.mechanism, self.oracle, len(found), max(found))


def row(mechanism, oracle, cases):
    """Register run(factor, **case) as a row of the table."""

    def register(run):
        _registered[mechanism, oracle] = Row(mechanism, oracle, run, cases)
        return run

    return register


def as_array(result):
    if isinstance(result, torch.Tensor):
        result = result.detach().cpu().numpy()
    return np.asarray(result, np.float64)


def difference(ours, theirs):
    """The largest difference of two results, relative to the largest number of theirs if that is above 1."""
    ours, theirs = as_array(ours), as_array(theirs)
    if ours.shape != theirs.shape:
        raise ValueError(f"results of one shape are compared, got {ours.shape} and {theirs.shape}")
    return float(np.abs(ours - theirs).max(initial=0.0) / max(1.0, np.abs(theirs).max(initial=0.0)))


def rows():
    """All rows; the modules with_*.py beside this one register them."""
    for path in sorted(Path(__file__).parent.glob("with_*.py")):
        importlib.import_module(f"tests.conformance.{path.stem}")
    return list(_registered.values())


def table():
    """[Measured, ...], one for each row."""
    return [one.measure() for one in rows()]


def markdown(measured):
    """The table as Markdown, differences rounded up to one digit."""
    lines = ["| mechanism | against | cases | largest difference |", "|---|---|---|---|"]
    for line in measured:
        lines.append(f"| {line.mechanism} | {line.oracle} | {line.cases} | {up(line.largest)} |")
    return "\n".join(lines)


def up(number):
    """A positive number rounded up to one digit, as text; 0 stays 0."""
    if number == 0:
        return "0"
    exponent = int(np.floor(np.log10(number)))
    digit = int(np.ceil(number / 10.0**exponent - 1e-9))
    return f"{digit if digit < 10 else 1}e{exponent if digit < 10 else exponent + 1}"
