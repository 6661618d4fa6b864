"""Copies of an answer and its arguments that the process which tries answers can open."""

import contextlib
import functools
import io
import pickle
import sys
import sysconfig
import types
from pathlib import Path

import cloudpickle

from utils.judge.result import NotSendable

INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
PACKAGES = {"site-packages", "dist-packages"}  # a user's own and another environment's, too


class _Pickler(cloudpickle.Pickler):
    """Copies an answer with all it uses, except for the course's own answer."""

    def __init__(self, stream, own, name):
        super().__init__(stream)
        self._own, self._name = own, name

    def persistent_id(self, thing):
        return self._name if self._own is not None and thing is self._own else None

    def reducer_override(self, thing):
        if isinstance(thing, types.ModuleType) and thing.__name__.partition(".")[0] == "attention":
            raise pickle.PicklingError(f"the module {thing.__name__}: write `from {thing.__name__} import ...`")
        if type(thing).__name__ == "FunctionMeta" and thing.__module__.partition(".")[0] == "attention":
            return thing.__qualname__  # a torch.autograd.Function has parts in C++: the worker imports it
        return super().reducer_override(thing)


def pack(thing, own=None, name=""):
    """The bytes from which the worker makes its own copy of a thing; `own` arrives there as a closed door.

    What does not come from an installed package travels by value, as it is now: a module that the learner reloads has
    another function under the same name, and to import a whole lecture for one small function takes seconds.
    Raises NotSendable.
    """
    stream = io.BytesIO()
    try:
        with _by_value():
            _Pickler(stream, own, name).dump(thing)
    except Exception as error:  # noqa: BLE001 (anything may refuse to be pickled)
        raise NotSendable(str(error).splitlines()[0] if str(error) else type(error).__name__) from None
    return stream.getvalue()


@contextlib.contextmanager
def _by_value():
    modules = [
        module for name, module in list(sys.modules.items()) if _travels(name, getattr(module, "__file__", None))
    ]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


@functools.lru_cache(maxsize=None)
def _travels(name, file):
    """Whether what a module holds is copied: not where the worker finds the same module itself."""
    first, _, rest = name.partition(".")
    if not file or name == "__main__" or file.startswith(INSTALLED) or PACKAGES & set(Path(file).parts):
        return False
    return first != "utils" or rest.partition(".")[0] == "exercises"
