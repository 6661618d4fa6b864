"""Make attention/ from the cells tagged `export`: a module for each lecture, its experiments apart, and the public face.

An export cell names what it uses and imports nothing: its imports are those that stand anywhere in the same source.
"""

import ast
import builtins
import symtable
import sys

from utils.authoring.source import MARKER, SourceError

COURSE_PACKAGES = {"attention", "utils"}  # imported last
WIDTH = 120
EDIT = "by `python course.py build`. Edit that file, not this one."
FACE = '''\
# Generated from the headers of solutions/*.py by `python course.py build`. Edit those, not this file.
"""What the lectures build for one another and for you: `from attention import attention_numpy, KVCache`.

A name's module is imported when the name is asked for, so that nobody pays for lectures that are not used.
"""

import importlib

HOME = {{
{home}
}}
__all__ = list(HOME)


def __getattr__(name):
    if name not in HOME:
        raise AttributeError(f"attention has no public name {{name!r}}")
    # Not kept here: whoever replaces a function in its module is to be met under both names.
    return getattr(importlib.import_module(f"attention.{{HOME[name]}}"), name)


def __dir__():
    return __all__
'''


def texts(lecture):
    """Return {path below attention/: text} of the modules that a lecture's exports make."""
    cells = [cell for cell in lecture.cells if "export" in cell.tags]
    kinds = {"mechanism": [], "experiment": []}
    for cell in cells:
        body, names = _body(lecture, cell)
        inside, outside = (sorted(names & set(listed)) for listed in (lecture.experiments, lecture.public))
        if inside and outside:
            mixed = f"{inside[0]} is an experiment and {outside[0]} is public"
            raise SourceError(lecture.path, cell.line, f"one export cell for two modules: {mixed}")
        kinds["experiment" if inside else "mechanism"].append((cell, body, names))

    defined = {kind: set().union(*(names for _, _, names in parts)) for kind, parts in kinds.items()}
    for given, known in ((lecture.public, defined["mechanism"]), (lecture.experiments, defined["experiment"])):
        for name in given:
            if name not in known:
                raise SourceError(lecture.path, 1, f"the header names {name!r}, which no export cell defines")
    for cell, body, _ in kinds["mechanism"]:
        for name in sorted(_global_names(body) & defined["experiment"]):
            raise SourceError(lecture.path, cell.line, f"an export uses {name!r}, which is an experiment")

    imports = _imports(lecture)
    module = f"{lecture.module}.py"
    made = {module: _text(lecture, kinds["mechanism"], imports, lecture.public, "the finished code")}
    if lecture.experiments:
        own = {name: (f"attention.{lecture.module}", name) for name in defined["mechanism"]}
        made[f"experiments/{module}"] = _text(
            lecture, kinds["experiment"], imports | own, lecture.experiments, "what it trains for itself alone"
        )
    return made


def face(lectures):
    """Return the text of attention/__init__.py: each public name of the lectures, and the module it lives in."""
    homes = {}
    for lecture in lectures:
        for name in lecture.public:
            if name in homes:
                raise SourceError(lecture.path, 1, f"the public name {name!r} is that of {homes[name]}, too")
            homes[name] = lecture.module
    return FACE.format(home="\n".join(f'    "{name}": "{module}",' for name, module in homes.items()))


def _body(lecture, cell):
    """Return an export cell without imports and solution markers, and the names it defines."""
    lines = [line for line in cell.source.splitlines() if not MARKER.match(line)]
    try:
        tree = ast.parse("\n".join(lines))
    except SyntaxError as error:
        raise SourceError(lecture.path, cell.line, f"an export cell that is not plain Python: {error}") from None
    for node in reversed(tree.body):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            if ast.dump(ast.parse(text)) != ast.dump(ast.Module([node], [])):
                raise SourceError(lecture.path, cell.line, "an exported import shares its line with something else")
            del lines[node.lineno - 1 : node.end_lineno]
    body = "\n".join(lines).strip()
    if not ast.parse(body).body:
        raise SourceError(lecture.path, cell.line, "an export cell of imports only: the build finds what exports need")
    table = symtable.symtable(body, cell.source[:20], "exec")
    return body, {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned()}


def _text(lecture, parts, imports, public, what):
    bodies = [body for _, body, _ in parts]
    known = set().union(*(names for _, _, names in parts)) | set(dir(builtins)) | {"__name__", "__file__"}
    needed = {}
    for cell, body, _ in parts:
        for name in sorted(_global_names(body) - known):
            if name not in imports:
                message = f"the export cells use {name!r}, which none of them defines and no cell imports"
                raise SourceError(lecture.path, cell.line, message)
            needed[name] = imports[name]
    head = f'# Generated from solutions/{lecture.path.name} {EDIT}\n"""{lecture.title}: {what}."""'
    listed = f"__all__ = [{', '.join(repr(name) for name in public)}]".replace("'", '"')
    return "\n\n\n".join(["\n\n".join([head, *_import_lines(needed), _wrapped(listed, "[", "]")]), *bodies]) + "\n"


def _global_names(text):
    """Return the names that a piece of code reads from its module, in any of its scopes."""
    found, pending = set(), [symtable.symtable(text, "export", "exec")]
    while pending:
        table = pending.pop()
        pending += table.get_children()
        top = table.get_type() == "module"
        found |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())}
    return found


def _imports(lecture):
    """Return {name: (module, name there or None for the module itself)} of all imports that the cells hold."""
    found = {}
    for cell in (cell for cell in lecture.cells if cell.kind == "code"):
        try:
            nodes = ast.parse(cell.source).body
        except SyntaxError:  # a magic, or an error that shows when the cell is run
            continue
        for node in (node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))):
            for alias in node.names:
                if isinstance(node, ast.ImportFrom):
                    name, origin = alias.asname or alias.name, (node.module, alias.name)
                elif alias.asname:
                    name, origin = alias.asname, (alias.name, None)
                else:
                    name, origin = alias.name.partition(".")[0], (alias.name.partition(".")[0], None)
                if f"attention.{lecture.module}" in (origin[0], f"{origin[0]}.{origin[1]}"):
                    continue
                if found.setdefault(name, origin) != origin:
                    raise SourceError(lecture.path, cell.line, f"{name!r} is imported from two places")
    return found


def _import_lines(needed):
    """Return the groups of import statements: the standard library, third parties, the course."""
    whole = {(module, name) for name, (module, original) in needed.items() if original is None}
    parts = {}
    for name, (module, original) in needed.items():
        if original is not None:
            parts.setdefault(module, set()).add(original if name == original else f"{original} as {name}")
    statements = [(module, False, _import_as(module, name)) for module, name in whole]
    for module, names in parts.items():
        text = f"from {module} import {', '.join(sorted(names))}"
        if len(text) > WIDTH:
            text = _wrapped(f"from {module} import ({', '.join(sorted(names))})", "(", ")")
        statements.append((module, True, text))
    groups = {}
    for module, is_from, text in sorted(statements, key=lambda statement: statement[1::-1]):
        top = module.partition(".")[0]
        group = 0 if top in sys.stdlib_module_names else 2 if top in COURSE_PACKAGES else 1
        groups.setdefault(group, []).append(text)
    return ["\n".join(groups[group]) for group in sorted(groups)]


def _import_as(module, name):
    return f"import {module}" if module == name else f"import {module} as {name}"


def _wrapped(text, opening, closing):
    """Return a bracketed list on one line where it fits, and otherwise an item a line."""
    if len(text) <= WIDTH:
        return text
    head, _, rest = text.partition(opening)
    items = rest.removesuffix(closing).split(", ")
    return "\n".join([head + opening, *(f"    {item}," for item in items), closing])
