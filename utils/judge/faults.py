"""What went wrong in an answer, in words: an exception, or what a kernel did."""

import linecache
import os
import re
import sysconfig
import textwrap

from utils.judge.result import Failed
from utils.paths import ROOT


class Fault(Failed):
    """A fault of a kernel, in the words of the CUDA runner.

    `kind` is the runner's word for it ("race"), "" where there is no report; None where the source does not compile.
    """

    def __init__(self, why, details, kind):
        super().__init__(why, details)
        self.kind = kind


def failed(error):
    """An exception in the answer, with the learner's own line: in a notebook, its number within the cell."""
    message = re.sub(r"0x[0-9a-fA-F]+", "0x...", error.message.strip().split("\n")[0])
    if error.type_name == "CoursesOwn":
        return Failed(message)
    said = f"{error.type_name}: {message}" if message else error.type_name
    for file, line in reversed(error.frames):
        source = linecache.getline(file, line).strip()
        if source and not _installed(file):
            return Failed(f"{error.type_name} in line {line}", f"line {line}: {source}\n{in_full(said)}")
    return Failed(_in_short(said), "" if _in_short(said) == said else in_full(said))


def fault(error):
    """An exception of the CUDA runner: the kernel does not compile, or does something wrong."""
    kind = None
    if hasattr(error, "report"):
        found = [*error.report.problems, *error.report.warnings] if error.report else []
        kind = found[0].kind if found else ""
    return Fault(_in_short(str(error)), "" if _in_short(str(error)) == str(error) else in_full(str(error)), kind)


def in_full(message):
    """A message with its long lines wrapped."""
    return "\n".join(line if len(line) <= 110 else textwrap.fill(line, 110) for line in message.split("\n"))


def _in_short(message):
    return textwrap.shorten(message.split("\n")[0], 70, placeholder=" ...")


def _installed(file):
    """Whether a file belongs to Python, to an installed package or to the course: its lines are not the learner's."""
    paths = sysconfig.get_paths()
    ours = (f"{(ROOT / folder).resolve()}{os.sep}" for folder in ("utils", "attention"))
    folders = paths["stdlib"], paths["purelib"], paths["platlib"], *ours
    names = file, os.path.realpath(file)  # a notebook's path to the course goes through ".."
    return any(name.startswith(folder) for name in names for folder in folders)
