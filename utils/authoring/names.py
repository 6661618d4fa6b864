"""Names of a notebook that mean one thing when a function is written and another when it is called again."""

import ast
import builtins
import symtable

AT_ONCE = ("listcomp", "setcomp", "dictcomp", "genexpr")  # scopes that run where they stand


def rebound(cells):
    """Return (function's cell, name, later cell) for each name that a function reads and a later cell binds anew.

    `cells` are the sources of a notebook's code cells. Binding is an assignment, a loop, an import, a definition. The
    same import or assignment again is no new binding, and neither is `f = check("1A", f)`.
    """
    bindings = [_bindings(source) for source in cells]
    found = []
    for index, source in enumerate(cells):
        for name in sorted(_read_by_functions(source)):
            what = [(place, bound[name]) for place, bound in enumerate(bindings) if name in bound]
            later = [place for place, value in what if place > index]
            if later and len({value for _, value in what}) > 1:
                found.append((index, name, later[0]))
    return found


def parse(source):
    """The syntax tree of a cell; an empty one where it is no Python alone."""
    try:
        return ast.parse(source)
    except SyntaxError:  # a magic of IPython
        return ast.Module([], [])


def _bindings(source):
    """Return {name: what a cell binds it to at the top of the notebook}, a text that is equal for equal bindings."""
    bound = {}
    tree = parse(source)
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            origin = getattr(node, "module", None)
            for alias in node.names:
                bound[(alias.asname or alias.name).split(".")[0]] = f"import {origin} {alias.name}"
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound[node.name] = ast.dump(node)
        elif isinstance(node, ast.Assign) and _is_check(node.value):
            continue
        elif isinstance(node, ast.Assign):
            targets = [n for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
            bound.update({n.id: ast.dump(node) for n in targets if isinstance(n.ctx, ast.Store)})
        else:
            inside = (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
            scopes = (n for n in ast.walk(node) if isinstance(n, (ast.comprehension, ast.FunctionDef, ast.Lambda)))
            local = {n.id for scope in scopes for n in ast.walk(scope) if isinstance(n, ast.Name)}
            bound.update({n.id: ast.dump(node) for n in inside if n.id not in local})
    return bound


def _is_check(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "check"


def _read_by_functions(source):
    """Return the names that functions of a cell look up in the notebook when they are called."""
    try:
        top = symtable.symtable(source, "cell", "exec")
    except SyntaxError:
        return set()
    names, pending = set(), [(table, False) for table in top.get_children()]
    while pending:
        table, later = pending.pop()
        # A class body and a comprehension run at once, as the cell does; functions inside them do not.
        later |= table.get_type() == "function" and table.get_name() not in AT_ONCE
        pending += [(inner, later) for inner in table.get_children()]
        if later:
            names |= {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()}
    return names - set(dir(builtins))
