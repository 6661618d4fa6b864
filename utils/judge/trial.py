"""Stands for the learner's answer inside the properties: asks it elsewhere, and compares with the oracle."""

import copy
import inspect
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from utils.judge.compare import TOLERANCE, difference
from utils.judge.diagnose import diagnose
from utils.judge.drivers import Named, named_parts
from utils.judge.faults import failed
from utils.judge.packing import pack
from utils.judge.process import worker
from utils.judge.result import Failed, Stopped, WrongKind
from utils.judge.show import argument, is_large, returned, text, what, where
from utils.judge.stub import stands_before_code

KINDS = {"b": ("b", "booleans"), "i": ("iu", "integers"), "f": ("f", "floats")}  # by the kind of the oracle's dtype
NUMBERS = ("float", "float64", "float32")  # what a type is called that is a number of Python's, or NumPy's
STANDS_BEFORE = "`raise NotImplementedError` still stands before your code: take it out"


class Call(NamedTuple):
    """One call of the answer. `got` is None where nothing came that could be compared; `raised` is (type, message)."""

    arguments: dict
    compute: Callable  # an answer -> what it gives for these arguments: the oracle's turn, and the known mistakes'
    names: list[str] = []  # of the parts, "" where there is only one
    expected: list[np.ndarray] = []
    got: list[np.ndarray] | None = None
    raised: tuple[str, str] | None = None


class Trial:
    """Asks an answer; kinds of exercises add what is asked."""

    takes_arrays = False  # whether an answer could change its arguments

    def __init__(self, exercise, answer, own):
        self._exercise, self._answer = exercise, answer
        self._packed = pack(answer, own, exercise.name)
        self._loaded = False
        self.returned = False  # whether any call came to its end
        self.agreed = False  # whether any result was found equal to the oracle's
        self.calls: list[Call] = []
        self.named = []  # the known mistakes that the first failing call may be
        self.changed = ""  # the sentence about the first argument that was changed in place
        self.printed = ""

    def reply_to(self, call, args, kwargs, driver="", measure=False):
        """The worker's Reply. Raises Failed where the answer raises, and Stopped."""
        self.calls.append(call)
        if not self._loaded:
            loading = worker.load(self._packed, self._exercise.module, self._exercise.name)
            if loading.error:
                raise failed(loading.error)
            self._loaded = True
        reply = worker.ask(args, kwargs, driver, measure)
        self.printed = self.printed or reply.printed
        if reply.changed and not self.changed and not driver:
            names = [key if isinstance(key, str) else list(call.arguments)[key] for key in reply.changed]
            self.changed = f"it changes {' and '.join(f'`{name}`' for name in names)} in place"
        if reply.error:
            self.calls[-1] = call._replace(raised=(reply.error.type_name, reply.error.message))
            if reply.error.type_name == "NotImplementedError" and stands_before_code(self._answer):
                raise Failed(STANDS_BEFORE)
            raise failed(reply.error)
        self.returned = True
        comparable = all(value.array is not None for value in reply.values)
        self.calls[-1] = call._replace(got=[value.array for value in reply.values] if comparable else None)
        return reply

    def compared(self, reply, dtype, array_type="ndarray"):
        """The parts of a reply to the last call, after they were found equal to the oracle's. Raises Failed."""
        call = self.calls[-1]
        expected = call.compute(self._exercise.oracle)
        names = list(expected) if isinstance(expected, Named) else list(self._exercise.returns)
        parts = _parts(expected)
        if isinstance(expected, Named):  # in the oracle's order: a module may declare its parameters in another one
            by_name = {value.name: value for value in reply.values}
            outputs, wanted = ([name for name in given if name.startswith("output")] for given in (by_name, names))
            if len(outputs) != len(wanted):  # a module that returns no tuple, or another one
                self.calls[-1] = call._replace(got=None)
                came = f"a tuple of {len(outputs)}" if len(outputs) != 1 else what(by_name[outputs[0]])
                asked = f"the tuple ({', '.join(self._exercise.returns)})" if len(wanted) > 1 else "one tensor"
                raise WrongKind(f"returned {came}, expected {asked}")
            if missing := [name for name in names if name not in by_name]:
                self.calls[-1] = call._replace(got=None)
                raise WrongKind(f"{len(names)} results are expected, {len(by_name)} came: {missing[0]} is missing")
            reply = reply._replace(values=[by_name[name] for name in names])
        got = [value.array for value in reply.values]
        self.calls[-1] = call = call._replace(
            expected=parts, names=names, got=None if any(array is None for array in got) else got
        )
        if not isinstance(expected, Named) and (reply.is_tuple != bool(names) or len(reply.values) != len(parts)):
            wanted = f"the tuple ({', '.join(names)})" if names else "one array"
            raise WrongKind(f"returned {returned(reply)}, expected {wanted}")
        for name, value, want, scale in zip(names or [""], reply.values, parts, _scales(names, parts)):
            label = "" if not name or name in ("result", "output") else f"{name}: "
            if isinstance(expected, Named) and type(expected[name]) is float and value.type_name not in NUMBERS:
                raise WrongKind(f"{label}returned {what(value)}, expected a number")
            _compare_one(label, value, want, dtype, array_type, scale)
        self.agreed = True
        return call.got

    def example(self):
        """(name, text) for the arguments of the last call, what was expected and what came, where they are small."""
        call = self.calls[-1]
        shown = {name: argument(value) for name, value in call.arguments.items() if value is not None}
        names = call.names or ("",)
        for title, parts in (("expected", call.expected), ("got", call.got or [])):
            if len(parts) > len(names) and not any(map(is_large, parts)):  # a tuple too long: all of it
                shown[title] = f"({', '.join(map(text, parts))})"
                continue
            for name, part in zip(names, parts):
                if not is_large(part) and (len(names) <= 4 or self._differs(name)):
                    shown[f"{title} {name}".rstrip()] = text(part)
        return list(shown.items())

    def _differs(self, name):
        """Whether a part of the last call is the first that differs: of many, only that one is shown."""
        call = self.calls[-1]
        scales = _scales(call.names, call.expected)
        for other, ours, theirs, scale in zip(call.names, call.got or [], call.expected, scales):
            if ours.shape != theirs.shape or _off(ours, theirs, scale) > TOLERANCE[precision(call.arguments)]:
                return other == name
        return False

    def hint(self, prop, failure):
        """What to say about the last call, at which a property failed: above all which known mistake it looks like.

        Where nothing was right yet and the result is of another kind, a property's hint would accuse of something else.
        """
        last = self.calls[-1] if self.calls else None
        if last is None or (last.got is None and last.raised is None):
            alone = isinstance(failure, WrongKind) and not self.agreed
            return prop.hint if last and self.returned and not alone else ""
        dtype = precision(last.arguments)
        if last.raised or not _equal(last.got, last.expected, last.names, dtype):
            looked_at = [last]
            if last.raised:  # many a mistake ends in the same exception
                looked_at = [call for call in self.calls if call.got is not None or call.raised]
            self.named = [m for m in self._exercise.mistakes if all(_agrees(m.answer, call) for call in looked_at)]
            if self.named:
                return self.likeliest()
        if last.raised or (isinstance(failure, WrongKind) and not self.agreed):
            return prop.hint if last.raised and self.agreed else ""
        said = diagnose(last.got, last.expected, TOLERANCE[dtype]) if last.expected else ""
        return said if said and ("nan" in said or "infinity" in said or "digits" in said) else prop.hint or said

    def likeliest(self):
        """The message of that one of `named` which gives what the answer gave in most of all calls so far."""
        return max(self.named, key=lambda mistake: sum(_agrees(mistake.answer, call) for call in self.calls)).message


class FunctionTrial(Trial):
    """Stands for a learner's function."""

    @property
    def takes_arrays(self):
        return any(hasattr(value, "dtype") for call in self.calls for value in call.arguments.values())

    def __call__(self, *args, **kwargs):
        """The learner's result for these arguments, as arrays, after it was found equal to the oracle's.

        Raises Failed where it is not, and Stopped.
        """
        return self._asked(args, kwargs)

    def run(self, *args, **kwargs):
        """The worker's Reply to these arguments, compared with nothing: for a property that judges it in its own way.

        Raises Failed where the answer raises, and Stopped.
        """
        return self.reply_to(self._call(args, kwargs), args, kwargs)

    def largest_exp(self, *args, **kwargs):
        """Elements of the largest array that went through exp, NumPy's or torch's, for a result that is right."""
        reply = self.reply_to(self._call(args, kwargs), args, kwargs, measure=True)
        arguments = self.calls[-1].arguments
        self.compared(reply, precision(arguments), _array_type(arguments))
        return reply.largest

    def memory(self, *args, **kwargs):
        """The most bytes that NumPy took at once (torch's are not seen), for a result that is right."""
        plain = self._call(args, kwargs).compute
        call = Call(self._bound(args, kwargs), lambda answer: Named(named_parts(plain(answer))))
        reply = self.reply_to(call, (args, kwargs), {}, "memory")
        self.compared(reply, precision(call.arguments), _array_type(call.arguments))
        return int(next(value.array for value in reply.values if value.name == "peak"))

    def gradients(self, *args, **kwargs):
        """The result for tensors and the gradients of those with floats, after they were found equal to the oracle's."""
        arguments = self._bound(args, kwargs)
        names, values = list(arguments), list(arguments.values())
        call = Call(arguments, lambda answer: _driven("gradients", answer, names, values))
        reply = self.reply_to(call, (names, values), {}, "gradients")
        return self.compared(reply, precision(arguments), "Tensor")

    def again(self):
        """Ask the first question once more, which a function answers as before. Raises Failed."""
        first = next((call for call in self.calls if call.got is not None and call.expected), None)
        if first is None or not hasattr(first.compute, "asked"):
            return
        args, kwargs = first.compute.asked
        reply = self.reply_to(first, args, kwargs)
        try:
            self.compared(reply, precision(first.arguments), _array_type(first.arguments))
        except Stopped:
            raise
        except Failed as failure:
            raise Failed(f"the second time: {failure}", failure.details) from None

    def _asked(self, args, kwargs):
        call = self._call(args, kwargs)
        reply = self.reply_to(call, args, kwargs)
        got = self.compared(reply, precision(call.arguments), _array_type(call.arguments))
        return got if self._exercise.returns else got[0]

    def _bound(self, args, kwargs):
        return dict(inspect.signature(self._exercise.oracle).bind(*args, **kwargs).arguments)

    def _call(self, args, kwargs):
        args, kwargs = copy.deepcopy((args, kwargs))  # as they are now: a property may change its arrays later

        def compute(answer):
            again, by_name = copy.deepcopy((args, kwargs))
            return answer(*again, **by_name)

        compute.asked = args, kwargs
        return Call(self._bound(args, kwargs), compute)


def _driven(driver, answer, *args):
    from utils.judge import drivers

    return getattr(drivers, driver)(answer, *copy.deepcopy(args))


def _compare_one(label, value, want, dtype, array_type, scale):
    if value.array is None or (value.type_name != array_type and want.ndim):
        wanted = f"a {'tensor' if array_type == 'Tensor' else 'NumPy array'} of shape {want.shape}"
        raise WrongKind(f"{label}returned {what(value)}, expected {wanted}")
    if value.array.shape != want.shape:
        raise Failed(f"{label}returned the shape {value.array.shape}, expected {want.shape}")
    kinds, called = KINDS[want.dtype.kind]
    if value.array.dtype.kind not in kinds:
        raise Failed(f"{label}returned an array of {value.array.dtype}, expected {called}")
    if _off(value.array, want, scale) > (TOLERANCE[dtype] if kinds == "f" else 0.0):
        raise Failed(label + where(value.array, want))


def _parts(result):
    parts = result.values() if isinstance(result, Named) else result if isinstance(result, tuple) else (result,)
    return [part.detach().numpy() if hasattr(part, "detach") else np.asarray(part) for part in parts]


def _array_type(arguments):
    return "Tensor" if any(hasattr(a, "detach") for a in arguments.values()) else "ndarray"


def precision(arguments):
    """The coarsest float dtype among the arguments; float64 where there is none."""
    names = [str(a.dtype).removeprefix("torch.") for a in arguments.values() if hasattr(a, "dtype")]
    return max((name for name in names if name in TOLERANCE), key=TOLERANCE.get, default="float64")


def _agrees(mistake, call):
    """Whether a known mistake gives or raises, for the arguments of a call, what the learner's answer did."""
    if call.got is None and call.raised is None:
        return False
    try:
        with np.errstate(all="ignore"):
            result = call.compute(mistake)
            if isinstance(result, Named):  # paired by name, as the answer's are
                result = Named((name, result[name]) for name in call.names)
            parts = _parts(result)
    except Exception as error:  # noqa: BLE001 (a mistake need not survive every input)
        return call.raised == (type(error).__name__, str(error))
    return call.got is not None and _equal(call.got, parts, call.names, precision(call.arguments))


def _equal(got, parts, names, dtype):
    return [(a.shape, a.dtype.kind) for a in got] == [(a.shape, a.dtype.kind) for a in parts] and all(
        _off(a, b, scale) <= TOLERANCE[dtype] for a, b, scale in zip(got, parts, _scales(names, parts))
    )


def _off(got, want, scale):
    """How far two arrays are apart, relative to a scale; None stands for the largest number that is wanted."""
    apart = difference(got, want)
    return apart * (_largest(want) or 1.0) / scale if scale else apart


def _scales(names, parts):
    """For each part the number that differences are relative to. Gradients, and weights after steps, share one: some
    are 0 but for rounding."""
    shared = [next((kind for kind in ("gradient of", "after step") if kind in name), "") for name in names]
    largest = {kind: max((_largest(p) for k, p in zip(shared, parts) if k == kind), default=0) for kind in set(shared)}
    return [largest[kind] if kind else None for kind in shared] or [None] * len(parts)


def _largest(array):
    array = np.abs(array[np.isfinite(array)]) if array.dtype.kind == "f" else np.zeros(0)
    return float(array.max()) if array.size else 0.0
