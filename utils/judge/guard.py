"""Doors that are closed to an answer: the course's own solution of its exercise, and the oracles of all exercises."""

import importlib.abc
import importlib.machinery
import sys

from utils.judge.exercise import PACKAGE


class CoursesOwn(Exception):
    """An answer called the course's own solution of the exercise."""


def closed(name):
    def door(*args, **kwargs):
        raise CoursesOwn(f"it calls the course's own {name}: write yours")

    return door


class Guard(importlib.abc.MetaPathFinder):
    """Closes `attention.<module>.<name>` while its exercise is checked, also when the answer imports it itself."""

    module = name = original = None

    def close(self, module, name):
        if self.original is not None:
            setattr(sys.modules[self.module], self.name, self.original)
        self.module, self.name, self.original = f"attention.{module}", name, None
        if self.module in sys.modules:
            self._replace(sys.modules[self.module])

    def _replace(self, module):
        self.original = getattr(module, self.name, None)
        setattr(module, self.name, closed(self.name))

    def find_spec(self, fullname, path, target=None):
        if fullname == PACKAGE or fullname.startswith(f"{PACKAGE}."):
            raise CoursesOwn("it imports the exercises themselves: write your own")
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if fullname == self.module else None
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_close(module):
                execute(module)
                self._replace(module)

            spec.loader.exec_module = execute_and_close
        return spec
