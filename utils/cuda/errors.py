"""What is raised for a learner's kernel, on a CPU and on a GPU."""


class CompileError(Exception):
    """The source cannot be compiled. The text points at the line of the source; `.lines` are all lines with an error,
    `.missing` the name of a function that has no body."""

    def __init__(self, message, lines=(), missing=None):
        super().__init__(message)
        self.lines, self.missing = tuple(lines), missing


class KernelError(Exception):
    """The kernel did something wrong. `.report` is what is known, None if it crashed or did not end."""

    def __init__(self, message, report=None):
        super().__init__(message)
        self.report = report
