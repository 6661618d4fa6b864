"""Put a mutant in the place of what it was made from, in a process that has everything loaded. No file is written."""

import builtins
import functools
import importlib
import inspect
import sys
import types

from utils.cuda import Kernel

LOADED = "attention", "tests", "utils.exercises"  # whose names may hold the text of a kernel


class CannotBePut(Exception):
    """The mutant is defined, and is not of the same build: it has other closures, say."""


def put(change):
    """Make the change in this process. Raises what the mutant raises where it is defined."""
    if change.kernel is not None:
        _swap_text(change.kernel, change.mutant.source)
        return
    module = importlib.import_module(f"attention.{change.module}")
    room = dict(vars(module), __builtins__=builtins)
    exec(compile(change.mutant.source, f"<{change.name}>", "exec", dont_inherit=True), room)
    _pair(vars(module)[change.definition], room[change.definition])


def _pair(old, new):
    """Let the old object, whoever holds it, do what the new one does."""
    if isinstance(old, type):
        for name, value in vars(new).items():
            if name in ("__dict__", "__weakref__", "__doc__", "__module__"):
                continue
            before = vars(old).get(name)
            if _inner(before) is not None and _inner(value) is not None:
                _pair(before, value)
            elif isinstance(before, property) and isinstance(value, property):
                for get in ("fget", "fset"):
                    if getattr(before, get):
                        _pair(getattr(before, get), getattr(value, get))
            elif isinstance(before, type) and isinstance(value, type) and before.__qualname__ == value.__qualname__:
                _pair(before, value)
            else:
                try:
                    setattr(old, name, value)
                except (AttributeError, TypeError):
                    pass
        return
    old, new = _inner(old), _inner(new)
    if old.__code__.co_freevars != new.__code__.co_freevars:
        raise CannotBePut(old.__qualname__)
    for name, mine, its in zip(old.__code__.co_freevars, old.__closure__ or (), new.__closure__ or ()):
        if name != "__class__":
            mine.cell_contents = its.cell_contents
    old.__code__, old.__defaults__, old.__kwdefaults__ = new.__code__, new.__defaults__, new.__kwdefaults__


def _inner(value):
    """The plain function inside of wrappers; None where there is none."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    value = inspect.unwrap(value) if callable(value) and not isinstance(value, type) else value
    return value if isinstance(value, types.FunctionType) else None


def _swap_text(old, new):
    for name, module in list(sys.modules.items()):
        if not name.startswith(LOADED):
            continue
        for key, value in list(vars(module).items()):
            if isinstance(value, str) and old in value:
                setattr(module, key, value.replace(old, new))
            elif isinstance(value, Kernel) and old in value.source:
                value.source = value.source.replace(old, new)


def forget_results():
    """Empty the caches of functions in attention/: what was computed while modules were loaded is computed again."""
    for name, module in list(sys.modules.items()):
        if name.startswith("attention"):
            for value in list(vars(module).values()):
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()
