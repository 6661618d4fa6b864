"""Find every CUDA kernel in Python sources without running them: the strings that hold `__global__`, the calls
`cuda.compile(source, name, template=...)`, and the template arguments that those calls name.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from utils.cuda.source import find_kernels as kernels_in
from utils.cuda.text import blank

# Template arguments for a kernel whose calls only decide them at run time.
TYPICAL = {"bool": "true", "typename": "float", "class": "float"}
TYPICAL_NUMBER = "64"
# Left out, so that a part of a kernel is the same text in a lecture and in the module that it exports.
SOLUTION_MARK = re.compile(r"^[ \t]*(?://|#) (?:BEGIN|END) SOLUTION\n", re.MULTILINE)


@dataclass(frozen=True)
class Found:
    """One kernel to compile: where it stands, its whole source, its name, its template arguments as C++ text."""

    where: str
    source: str
    name: str
    template: tuple[str, ...]

    @property
    def instance(self):
        """The C++ name: flash<64, true>."""
        return self.name + (f"<{', '.join(self.template)}>" if self.template else "")

    def __str__(self):
        return f"{self.where}:{self.instance}"


def in_files(paths):
    """All kernels of some Python and .cu files, each (source, name, template) once."""
    return in_texts({path.name: SOLUTION_MARK.sub("", path.read_text(encoding="utf-8")) for path in sorted(paths)})


def in_texts(texts):
    """The same for {file name: text}.

    A string that no call compiles stands for itself, unless it is part of a source that a call does compile.
    """
    compiled, alone = [], []
    for where, text in texts.items():
        if where.endswith(".cu"):
            alone.append((where, text))
        else:
            calls, strings = _in_python(where, text, texts)
            compiled += calls
            alone += strings
    sources = [source for _, source, _ in compiled]
    compiled += [(where, text, []) for where, text in alone if not any(text in source for source in sources)]
    found = {}
    for where, source, templates in compiled:
        for kernel in _in_cuda(where, source, templates):
            found.setdefault((kernel.source, kernel.name, kernel.template), kernel)
    return list(found.values())


def _in_python(where, text, texts):
    """([(where, source, template arguments)] of the calls, [(where, string)] of every string that holds a kernel)."""
    tree = ast.parse(text)
    values, calls, compilers = _values(tree, texts), [], _compilers(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and any(
            "__global__" in str(getattr(part, "value", "")) for part in node.values
        ):
            raise ValueError(
                f"{where}, line {node.lineno}: a kernel in an f-string cannot be checked; use a plain string"
            )
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"cuda.compile", *compilers} and node.args:
            calls.append(node)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    compiled = [
        (where, source, _templates(call, values)) for call in calls for source in _strings(call.args[0], values)
    ]
    strings = [(where, node.value) for node in ast.walk(tree)
               if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
               and "__global__" in node.value and kernels_in(node.value)]  # fmt: skip
    return compiled, strings


def _compilers(tree):
    """The names of the functions that compile their first argument."""
    return {
        function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.args.args
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "cuda.compile" and node.args
        and ast.unparse(node.args[0]) == function.args.args[0].arg
    }  # fmt: skip


def _values(tree, texts):
    """{name: the expressions assigned to it}; what comes `from attention.topic` is looked up in the text of topic.py."""
    values = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values.setdefault(node.targets[0].id, []).append(node.value)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("attention."):
            module = texts.get(node.module.removeprefix("attention.") + ".py")
            theirs = _values(ast.parse(module), texts) if module else {}
            for name in node.names:
                found = [text for value in theirs.get(name.name, []) for text in _strings(value, theirs)]
                values.setdefault(name.asname or name.name, []).extend(ast.Constant(text) for text in found)
    return values


def _in_cuda(where, text, templates):
    found = []
    for kernel in kernels_in(text):
        if not kernel.is_template:
            found.append(Found(where, text, kernel.name, ()))
            continue
        head = re.search(rf"template\s*<([^;{{}}()]*)>[^;{{}}]*?\b{kernel.name}\s*\(", blank(text))
        parameters = [parameter.split("=")[0].split() for parameter in head[1].split(",")]
        fitting = [template for template in templates if len(template) == len(parameters)]
        typical = tuple(TYPICAL.get(words[0], TYPICAL_NUMBER) for words in parameters)
        found += [Found(where, text, kernel.name, template) for template in dict.fromkeys(fitting or [typical])]
    return found


def _strings(node, values, resolving=()):
    """The texts that an expression can stand for, as far as it is made of strings, names, +, .replace() and .lstrip()."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.Name) and node.id not in resolving:
        return [text for value in values.get(node.id, []) for text in _strings(value, values, (*resolving, node.id))]
    if isinstance(node, ast.IfExp):
        return [text for branch in (node.body, node.orelse) for text in _strings(branch, values, resolving)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        right = _strings(node.right, values, resolving)
        return [a + b for a in _strings(node.left, values, resolving) for b in right]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "replace":
        old, new = (_strings(argument, values, resolving) for argument in node.args[:2])
        texts = _strings(node.func.value, values, resolving)
        return [text.replace(a, b) for text in texts for a in old for b in new]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "lstrip":
        return [text.lstrip("\n") for text in _strings(node.func.value, values, resolving)]
    return []


def _templates(call, values):
    """The template arguments of one call, as C++ text: those that are literals or names of literals."""
    given = [keyword.value for keyword in call.keywords if keyword.arg == "template"] + call.args[2:3]
    if not given or not isinstance(given[0], ast.Tuple):
        return []
    choices = [()]
    for element in given[0].elts:
        options = values.get(element.id, []) if isinstance(element, ast.Name) else [element]
        words = [str(option.value) for option in options if isinstance(option, ast.Constant)]
        choices = [(*start, word.lower() if word in ("True", "False") else word) for start in choices for word in words]
    return choices


def course_files(root):
    """The files of the course that can hold kernels."""
    patterns = (
        "solutions/*.py",
        "attention/*.py",
        "attention/kernels/*.cu",
        "tests/kernels/*.py",
        "tests/kernels/*.cu",
    )
    return [path for pattern in patterns for path in Path(root).glob(pattern)]
