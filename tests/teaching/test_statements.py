"""Which statements of a notebook an answer needs."""

import pytest

from utils.teaching import statements


def needs(name, *cells, stop=()):
    chosen, missing = statements.closure(statements.statements(cells)[0], {name}, frozenset(stop))
    return [s.text for s in chosen], missing


@pytest.mark.parametrize(
    "cells, wanted",
    [
        (
            ["import numpy as np", "def f(x):\n    return np.exp(x)"],
            ["import numpy as np", "def f(x):\n    return np.exp(x)"],
        ),
        (["a = 1\nprint(a)", "def f(x):\n    return x + a"], ["a = 1", "def f(x):\n    return x + a"]),
        (
            ["def f(x):\n    return g(x)", "def g(x):\n    return x"],
            ["def f(x):\n    return g(x)", "def g(x):\n    return x"],
        ),
        (
            ["t = {}", "t['a'] = 1\nwhile True: pass", "def f(x):\n    return t[x]"],
            ["t = {}", "t['a'] = 1", "def f(x):\n    return t[x]"],
        ),
        (["t = []", "t.append(2)", "def f(x):\n    return t"], ["t = []", "t.append(2)", "def f(x):\n    return t"]),
        (["K = 'a'", "K += 'b'", "f = K"], ["K = 'a'", "K += 'b'", "f = K"]),
        (
            ["@mark\ndef f(x):\n    return x", "def mark(g):\n    return g"],
            ["@mark\ndef f(x):\n    return x", "def mark(g):\n    return g"],
        ),
        (
            ["import numpy as np\nnp.testing.assert_equal(1, 1)", "def f(x):\n    return np"],
            ["import numpy as np", "def f(x):\n    return np"],
        ),
        (["def f(x):\n    return x", "f = check('1A', f)"], ["def f(x):\n    return x"]),
        (["def f(n):\n    return [i for i in range(n)]", "i = 3"], ["def f(n):\n    return [i for i in range(n)]"]),
    ],
)
def test_what_is_read_is_found_wherever_it_stands(cells, wanted):
    assert needs("f", *cells) == (wanted, set())


def test_what_nothing_binds_is_named():
    assert needs("f", "def f(x):\n    return helper(x) + len(x)")[1] == {"helper"}


def test_a_name_that_comes_from_elsewhere_is_not_looked_for():
    assert needs("f", "def g(x): pass", "def f(x):\n    return g(x)", stop={"g"})[0] == ["def f(x):\n    return g(x)"]


def test_lines_of_ipython_are_left_out_and_broken_cells_are_told():
    found, broken = statements.statements(["%time x\n!ls\na = 1", "b = (", "c = 3"])
    assert [(s.text, s.first) for s in found] == [("a = 1", 3), ("c = 3", 1)]
    assert list(broken) == [1] and "line 1" in broken[1]


def test_lines_keep_their_numbers():
    cells = ["a = 1\nb = 2\n\ndef f():\n    return b"]
    chosen, _ = statements.closure(statements.statements(cells)[0], {"f"})
    assert statements.parts(cells, chosen) == [(0, "\nb = 2\n\ndef f():\n    return b")]
