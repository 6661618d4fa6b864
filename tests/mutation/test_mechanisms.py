"""Mutants of attention/: which there are, how one is put in place, and a few of them, the same in every run."""

import os
import subprocess
import sys
import types

import pytest

from tests.mutation import kept_mechanisms, mechanisms, survey, transplant, warm
from tests.mutation.same import SAME
from utils.paths import ROOT


def test_what_is_said_and_not_done_is_not_changed():
    """Docstrings, decorators and what an error says are left alone; the condition of an error is not."""
    softmax = next(d for d in mechanisms.definitions("fundamentals") if d.name == "causal_mask")
    changed = {softmax.text.split("\n")[line - 1].strip() for line in softmax.lines}
    assert "if n_queries < 0 or n_keys < 0:" in changed
    assert not any("Boolean" in line or "raise" in line or "must not be negative" in line for line in changed)


def test_a_module_has_functions_classes_and_kernels_and_no_name_twice():
    for module in mechanisms.MODULES:
        names = [d.name for d in mechanisms.definitions(module)]
        assert len(names) == len(set(names)), module
    kernels = [d.name for d in mechanisms.definitions("fundamentals") if d.is_kernel]
    assert "ATTENTION_TILED" in kernels and "softmax" not in kernels


def test_an_unknown_definition_is_refused():
    assert mechanisms.named(["attention.flash.online_softmax"]) == {"flash": {"online_softmax"}}
    assert set(mechanisms.named(["attention"])) == set(mechanisms.MODULES)
    for word in ("attention.flush", "attention.flash.offline_softmax"):
        with pytest.raises(ValueError, match="no such module or definition"):
            mechanisms.named([word])


def test_a_mutant_is_met_by_whoever_holds_what_it_was_made_from():
    room, other = {}, {}
    source = """
import functools

def wrapped(function):
    @functools.wraps(function)
    def inside(x):
        return function(x) + 100
    return inside

@wrapped
def f(x, by=1):
    return x + by

class C:
    factor = 2
    def times(self, x, more=0):
        return super().__init__() or self.factor * x + more
    @property
    def half(self):
        return self.factor / 2
"""
    exec(source, room)
    held, made = room["f"], room["C"]()
    wrong = source.replace("x + by", "x - by").replace("factor = 2", "factor = 6").replace("more=0", "more=1")
    exec(wrong.replace("/ 2", "/ 3"), other)
    for name in ("f", "C"):
        transplant._pair(room[name], other[name])
    assert (held(1), made.times(1), made.half) == (100, 7, 2)


def test_the_text_of_a_kernel_is_changed_wherever_it_was_copied_to(monkeypatch):
    first, second = types.ModuleType("attention.first"), types.ModuleType("tests.second")
    first.KERNEL, second.BOTH, second.OTHER = "x = 1;", "int x = 1;\nint y;", "x = 10;"
    for module in (first, second):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    transplant._swap_text("x = 1;", "x = 2;")
    assert (first.KERNEL, second.BOTH, second.OTHER) == ("x = 2;", "int x = 2;\nint y;", "x = 10;")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a mutant is tried in a fork")
def test_of_a_sample_none_survives():
    """Ten mutants of the triples, each under the contract's rows for it, in a process that has everything loaded."""
    command = [sys.executable, "-m", "tests.mutation", "attention", "--sample", "10"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"10 {warm.KILLED}" in done.stdout


@pytest.mark.slow
def test_what_was_counted_and_what_is_listed_as_equivalent_is_still_there():
    """A reason for a line that has changed would excuse something else; counts of older mutants would be no counts."""
    for name, kept in kept_mechanisms.read().items():
        module, definition = name.split(".", 1)
        there = [
            c.mutant.name for c in mechanisms.changes(module, {definition.split()[0]}) if c.definition == definition
        ]
        counted = sum(count for word, count in kept.items() if word != "left")
        assert counted == len(there), f"python -m tests.mutation attention.{module}.{definition} --keep"
        assert set(kept.get("left", ())) <= set(there)
        assert len(kept.get("left", ())) == sum(kept.get(word, 0) for word in survey.LEFT)
    for module, kept in kept_mechanisms.read(kept_mechanisms.DRAWN).items():
        assert set(kept.get("left", ())) <= {change.name for change in mechanisms.changes(module)}, module
    for module, reasons in SAME.items():
        there = {change.name for change in mechanisms.changes(module)}
        assert [name for name in reasons if name not in there] == [], module
