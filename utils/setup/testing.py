"""What `course.py test` runs: everything, one lecture or several, or what is quick."""

import itertools
import re

from utils.setup.environment import Stop

# Tests over all lectures, of which one lecture selects its part: the gates, the outline, the contract of its triples.
GATES = (
    "tests/authoring/test_notebooks.py",
    "tests/authoring/test_gates.py",
    "tests/lectures/test_outline.py",
    "tests/contract/test_triples.py",
)
TRIPLE = re.compile(r"^#     - (\w+)_numpy$", re.MULTILINE)  # a public name in a lecture's header
QUICK = ["tests", "lectures", "-m", "not slow", "--skip-passed"]  # one folder of notebooks
NOTHING = 5  # pytest's status when it has found no test


def selection(root, rest, quick):
    """The arguments for pytest: `rest` may begin with lectures' numbers, `quick` leaves out what takes long.

    Raises Stop for a lecture that is not there, and for both at once.
    """
    numbers = list(itertools.takewhile(lambda word: re.fullmatch(r"\d{1,2}", word), rest))
    rest = rest[len(numbers) :]
    if quick:
        if numbers:
            raise Stop(f"test takes --quick or lectures ({' '.join(numbers)}), not both.")
        return [*QUICK, *rest]
    return [*lectures(root, [number.zfill(2) for number in numbers]), *rest] if numbers else rest


def lectures(root, numbers):
    """The files to test for some lectures, and the expression that selects their part of the gates."""
    names = {path.name[:2]: path.stem for path in sorted((root / "solutions").glob("[0-9][0-9]_*.py"))}
    for number in numbers:
        if number not in names:
            raise Stop(f"There is no lecture {number}; there are {', '.join(names) or 'none'}.")
    paths, wanted = [path for path in GATES if (root / path).exists()], []
    for number in numbers:
        name = names[number]
        own = f"tests/lectures/lecture_{number}", *(f"{folder}/{name}.ipynb" for folder in ("lectures", "solutions"))
        paths += [path for path in own if (root / path).exists()]
        triples = TRIPLE.findall((root / "solutions" / f"{name}.py").read_text(encoding="utf-8"))
        wanted += [f"lecture_{number}", name, *(f"[{triple}{end}" for triple in triples for end in "-]")]
    return [*paths, "-k", " or ".join(wanted)]
