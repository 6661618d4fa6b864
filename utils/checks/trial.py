"""Trying one answer: every property is asked, every result compared with the oracle's."""

import copy
import inspect
import time
import zlib
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from utils.checks import Failed, process
from utils.checks.compare import TOLERANCE, difference
from utils.checks.faults import Fault, failed, fault
from utils.checks.process import Stopped, worker
from utils.checks.show import returned, what, where

UNCHANGED = "leaves its arguments as they were"
CUDA_STUB = "// your code here"
KINDS = {"b": ("b", "booleans"), "i": ("iu", "integers"), "f": ("f", "floats")}  # by the kind of the oracle's dtype


class NotAttempted(Exception):
    """The answer is still the stub."""


class Call(NamedTuple):
    """One call of the answer. `got` is None where nothing came that could be compared; `raised` is (type, message)."""

    arguments: dict
    args: tuple
    kwargs: dict
    expected: list[np.ndarray]
    got: list[np.ndarray] | None
    raised: tuple[str, str] | None = None


class Row(NamedTuple):
    """What became of one property: True, False, or None where it was not tried."""

    name: str
    holds: bool | None
    why: str = ""


@dataclass
class Result:
    rows: list[Row] = field(default_factory=list)
    example: Call | None = None  # the call at which the first failing property failed
    details: str = ""  # what else the first failure had to say, over several lines
    hint: str = ""
    printed: str = ""

    @property
    def passed(self):
        return all(row.holds for row in self.rows)


def try_answer(exercise, answer, own=None):
    """Judge an answer: Result. Raises NotAttempted for a stub, and NotSendable.

    `own` is the course's own answer, which the learner's must not call.
    """
    result = Result()
    if exercise.oracle is None:
        if CUDA_STUB in answer:
            raise NotAttempted
        ask, trial = answer, None
    else:
        ask = trial = Trial(exercise, process.pack(answer, own, exercise.name))

    stopped = False
    for prop in exercise.properties:
        failure = None if stopped else _failure(prop, ask)
        if failure and result.passed:
            result.details = failure.details
            result.hint = trial.hint(prop) if trial else _kernel_hint(exercise, prop, failure)
            result.example = trial.calls[-1] if trial else None
        result.rows.append(Row(prop.name, None if stopped else failure is None, str(failure or "")))
        stopped = stopped or isinstance(failure, Stopped)
    if trial:
        result.printed = trial.printed
        if result.passed and trial.changed:
            result.hint = "Work on a copy: whoever called the function still needs what they passed."
        if trial.takes_arrays:
            result.rows.append(Row(UNCHANGED, not trial.changed if trial.returned else None, trial.changed))
    return result


def _kernel_hint(exercise, prop, failure):
    kind = failure.kind if isinstance(failure, Fault) else ""
    return "" if kind is None else exercise.fault_hints.get(kind, prop.hint)


def _failure(prop, ask):
    """What a property has to say against an answer; None where it holds."""
    try:
        prop.holds(ask, np.random.default_rng(zlib.crc32(prop.name.encode())))
    except Failed as failed:
        return failed
    except Exception as error:
        if isinstance(ask, Trial):  # the stub; or the oracle or the property is wrong, not the answer
            raise
        return fault(error)
    return None


class Trial:
    """Stands for the learner's function inside the properties."""

    def __init__(self, exercise, packed):
        self._exercise, self._packed = exercise, packed
        self._deadline = None
        self._started = False
        self._measure = False
        self.returned = False  # whether any call came to its end
        self.calls: list[Call] = []
        self.changed = ""  # the sentence about the first argument that was changed in place
        self.printed = ""

    def __call__(self, *args, **kwargs):
        """The learner's result for these arguments, as arrays, after it was found equal to the oracle's.

        Raises Failed where it is not, NotAttempted where the answer is the stub, and Stopped.
        """
        reply = self.run(*args, **kwargs)
        expected = _parts(self._exercise.oracle(*args, **kwargs))
        self.calls[-1] = self.calls[-1]._replace(expected=expected)
        self._compare(reply, expected, self.calls[-1].arguments)
        return self.calls[-1].got if self._exercise.returns else self.calls[-1].got[0]

    def run(self, *args, **kwargs):
        """The worker's Reply to these arguments, compared with nothing: for a property that judges it in its own way.

        Raises Failed where the answer raises, NotAttempted where it is the stub, and Stopped.
        """
        exercise = self._exercise
        request = process.request(self._packed, args, kwargs, exercise.module, exercise.name, self._measure)
        arguments = dict(inspect.signature(exercise.oracle).bind(*args, **kwargs).arguments)
        try:
            worker.get_ready(request)
            self._deadline = self._deadline or time.monotonic() + process.TIME_LIMIT
            reply = worker.call(request, self._deadline)
        except Stopped:
            self.calls.append(Call(arguments, args, kwargs, [], None))
            raise
        if reply.error and reply.error.type_name == "NotImplementedError" and not self._started:
            raise NotAttempted
        self._started = True
        self.printed = self.printed or reply.printed
        if reply.changed and not self.changed:
            names = [key if isinstance(key, str) else list(arguments)[key] for key in reply.changed]
            self.changed = f"it changes {' and '.join(f'`{name}`' for name in names)} in place"

        self.returned = self.returned or not reply.error
        comparable = not reply.error and all(value.array is not None for value in reply.values)
        got = [value.array for value in reply.values] if comparable else None
        raised = (reply.error.type_name, reply.error.message) if reply.error else None
        self.calls.append(Call(arguments, args, kwargs, [], got, raised))
        if reply.error:
            raise failed(reply.error)
        return reply

    def peak(self, *args, **kwargs):
        """Bytes that the answer allocates at most for these arguments; raises as `run` does."""
        self._measure = True
        try:
            return self.run(*args, **kwargs).peak
        finally:
            self._measure = False

    def _compare(self, reply, expected, arguments):
        names, dtype = self._exercise.returns, _dtype(arguments)
        array_type = "Tensor" if any(hasattr(a, "detach") for a in arguments.values()) else "ndarray"
        if reply.is_tuple != bool(names) or len(reply.values) != len(expected):
            wanted = f"the tuple ({', '.join(names)})" if names else "one array"
            raise Failed(f"returned {returned(reply)}, expected {wanted}")
        for name, value, want in zip(names or [""], reply.values, expected):
            label = f"{name}: " if name else ""
            if value.array is None or (value.type_name != array_type and want.ndim):
                wanted = f"a {'tensor' if array_type == 'Tensor' else 'NumPy array'} of shape {want.shape}"
                raise Failed(f"{label}returned {what(value)}, expected {wanted}")
            if value.array.shape != want.shape:
                raise Failed(f"{label}returned the shape {value.array.shape}, expected {want.shape}")
            kinds, called = KINDS[want.dtype.kind]
            if value.array.dtype.kind not in kinds:
                raise Failed(f"{label}returned an array of {value.array.dtype}, expected {called}")
            if difference(value.array, want) > (TOLERANCE[dtype] if kinds == "f" else 0.0):
                raise Failed(label + where(value.array, want))

    @property
    def takes_arrays(self):
        return any(hasattr(value, "dtype") for call in self.calls for value in call.arguments.values())

    def hint(self, prop):
        """What to say about the last call, at which a property failed: above all which known mistake it looks like."""
        last = self.calls[-1]
        if last.got is None and last.raised is None:
            return ""
        matches = {}
        for mistake in self._exercise.mistakes:
            agrees = [_agrees(mistake.answer, call) for call in self.calls]
            if agrees[-1]:
                matches.setdefault(sum(agrees), mistake.message)
        if matches and (last.raised or not _equal(last.got, last.expected, _dtype(last.arguments))):
            return matches[max(matches)]
        if last.raised:
            return ""
        if last.expected and any(np.isnan(part).any() for part in last.got):
            return "There is a nan: look for 0/0, and for infinities that are subtracted or multiplied by 0."
        return prop.hint


def _parts(result):
    return [np.asarray(part) for part in (result if isinstance(result, tuple) else (result,))]


def _dtype(arguments):
    """The coarsest float dtype among the arguments; float64 where there is none."""
    names = [str(a.dtype).removeprefix("torch.") for a in arguments.values() if hasattr(a, "dtype")]
    return max((name for name in names if name in TOLERANCE), key=TOLERANCE.get, default="float64")


def _agrees(mistake, call):
    """Whether a known mistake gives or raises, for the arguments of a call, what the learner's function did."""
    if call.got is None and call.raised is None:
        return False
    args, kwargs = copy.deepcopy((call.args, call.kwargs))
    try:
        with np.errstate(all="ignore"):
            parts = _parts(mistake(*args, **kwargs))
    except Exception as error:  # noqa: BLE001 (a mistake need not survive every input)
        return call.raised == (type(error).__name__, str(error))
    return call.got is not None and _equal(call.got, parts, _dtype(call.arguments))


def _equal(got, parts, dtype):
    return [(a.shape, a.dtype.kind) for a in got] == [(a.shape, a.dtype.kind) for a in parts] and all(
        difference(a, b) <= TOLERANCE[dtype] for a, b in zip(got, parts)
    )
