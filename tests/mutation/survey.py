"""The mutants of attention/ against the tests that run the changed line: killed, survived, equivalent, or run by no test.

A first run of the tests notes for each which lines of attention/ it runs, and which kernels; what is noted is kept in
build/, until a module or the test changes. A mutant then meets the tests of its line, the shortest first, up to the first that fails.
"""

import ast
import functools
import hashlib
import inspect
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from tests.mutation import kept_mechanisms, warm
from tests.mutation.mechanisms import MODULES, changes, definitions, named, names_of, path_of
from tests.mutation.same import reason
from utils.cuda.cpu import cache
from utils.judge.exercise import exercises, lectures
from utils.paths import ROOT

NOTED = ROOT / "build" / "mutants" / "lines.json"
JUDGED = ROOT / "build" / "mutants" / "judged.json"
BUILT = ROOT / "build" / "mutants" / "kernels"
ASKED = "only asked by an exercise"
LEFT = warm.SURVIVED, warm.UNSEEN
WAYS = "_numpy", "_torch", "_cuda"
PORTION = 200  # tests that are run and noted at once
MINUTES = 60  # of processor time for tests whose seconds are not known, in seconds
SHARED = "tests/contract", "tests/conformance/test_table.py"


def lecture_of(module):
    """The number of the lecture that a module is made from, from its first line."""
    return path_of(module).read_text(encoding="utf-8").split("solutions/", 1)[1][:2]


def files_of(modules):
    """The test files that concern some modules."""
    own = [
        path
        for module in modules
        for path in sorted((ROOT / "tests" / "lectures" / f"lecture_{lecture_of(module)}").glob("test_*.py"))
        if path.name != "test_exercises.py"
    ]
    return [*(ROOT / path for path in SHARED), *own]


@functools.cache
def _modules():
    return b"".join(path_of(module).read_bytes() for module in MODULES)


def _digest(item):
    """What a note depends on. Of a test whose table has changed the note may be old: then a mutant may meet other tests,
    and survive, but none is killed by a test that does not run it."""
    own = inspect.getsource(item.function).encode()
    return hashlib.sha256(_modules() + own).hexdigest()[:16]


def _wanted(item, modules):
    """Of the third parties only those that a module's own rows meet, once."""
    if "conformance" not in item.nodeid:
        return True
    if "test_the_course_gives" not in item.nodeid:
        return False
    text = Path(sys.modules[item.callspec.params["row"].run.__module__].__file__).read_text(encoding="utf-8")
    return any(module in text for module in modules)


def _read(file):
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _write(file, new):
    """Add to a file of JSON; several processes may do so, and what two of them write at once is found again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(_read(file) | new), encoding="utf-8")
    scratch.replace(file)


class Notes:
    """What is known of the tests: seconds, lines that they run, kernels that they launch."""

    def __init__(self, tests, modules, only_known=False):
        self.tests = tests
        kept = _read(NOTED)
        self.of = {}
        missing = []
        for name, item in tests.items.items():
            if not _wanted(item, modules):
                continue
            digest = _digest(item)
            if kept.get(name, {}).get("digest") == digest:
                self.of[name] = kept[name]
            else:
                missing.append((name, digest))
        if only_known:
            return
        for i in range(0, len(missing), PORTION):
            print(f"running tests to see what they run: {i} of {len(missing)}", flush=True)
            part = missing[i : i + PORTION]
            found = tests.trace([name for name, _ in part])
            new = {name: {"digest": digest} | self._note(*found.get(name, (0, {}, []))) for name, digest in part}
            self.of |= new
            _write(NOTED, new)

    @staticmethod
    def _note(seconds, lines, sources):
        kernels = [
            f"{module}.{d.name}"
            for module in MODULES
            for d in definitions(module)
            if d.is_kernel and any(d.text in source for source in sources)
        ]
        return {"seconds": seconds, "lines": lines, "kernels": kernels}

    @functools.cached_property
    def lines(self):
        """{(module, line): names of the tests that run it, shortest first}"""
        found = {}
        for name, note in sorted(self.of.items(), key=lambda pair: pair[1]["seconds"]):
            for module, lines in note["lines"].items():
                for line in lines:
                    found.setdefault((module, line), []).append(name)
        return found

    def tests_of(self, change):
        """(names of the tests that run what is changed, their seconds), those of the changed line if it can be told."""
        if change.kernel is not None:
            key = f"{change.module}.{change.definition}"
            names = [name for name, note in self.of.items() if key in note["kernels"]]
        else:
            names = self.lines.get((change.module, change.line)) or self._inside(change)
        chosen, total = [], 0.0
        most = warm.LONGEST * (1 if change.kernel is None else 4)  # a kernel's tests compile it first
        for name in sorted(names, key=lambda name: self.of[name]["seconds"]):
            total += self.of[name]["seconds"]
            if chosen and total > most:
                break
            chosen.append(name)
        return chosen, sum(self.of[name]["seconds"] for name in chosen)

    def _inside(self, change):
        """The tests of the smallest function around the line, else of the definition."""
        for first, last in spans(change.module, change.line):
            names = {name for line in range(first, last + 1) for name in self.lines.get((change.module, line), ())}
            if names:
                return names
        return []


@functools.cache
def _functions(module):
    tree = ast.parse(path_of(module).read_text(encoding="utf-8"))
    kinds = ast.FunctionDef, ast.ClassDef, ast.Lambda
    return [(node.lineno, node.end_lineno) for node in ast.walk(tree) if isinstance(node, kinds)]


def spans(module, line):
    """(first, last line) of the functions and classes around a line, the smallest first."""
    around = [(first, last) for first, last in _functions(module) if first <= line <= last]
    return sorted(around, key=lambda span: span[1] - span[0])


def judge(change, notes):
    """(word, the test that killed it) of one Change."""
    if reason(change):
        return warm.SAME, ""
    names, seconds = notes.tests_of(change)
    if not names:
        return (ASKED if change.definition.split()[0] in _answers() else warm.UNSEEN), ""
    return notes.tests.verdict(change, names, seconds)


@functools.cache
def _answers():
    """The names of what exercises ask for: where no test runs them, their checks are mutated by `tests.mutation NN`."""
    return {exercise.name for number in lectures() for exercise in exercises(number)}


def sample(every, count, seed):
    """`count` of the Changes, drawn with a fixed seed, in their order."""
    drawn = random.Random(seed).sample(range(len(every)), min(count, len(every)))
    return [every[i] for i in sorted(drawn)]


def drawn(every, count):
    """`count` Changes of each module, of definitions that were not tried as a whole."""
    kept = kept_mechanisms.read()
    waiting = [change for change in every if f"{change.module}.{change.definition}" not in kept]
    return [
        change for module in MODULES for change in sample([c for c in waiting if c.module == module], count, seed=1)
    ]


def run(every, say=print, only_known=False):
    """[(Change, word, the test that killed it)] of some Changes. What is killed by a test that is still there stays so.

    only_known: by the tests of which it is noted already what they run.
    """
    found, modules = [], sorted({change.module for change in every})
    known, new = _read(JUDGED), {}

    def work(tests):
        notes, before = Notes(tests, modules, only_known), time.monotonic()
        built = set(os.listdir(BUILT))
        for i, change in enumerate(every):
            key = hashlib.sha256(f"{change.module} {change.name} {change.mutant.source}".encode()).hexdigest()[:20]
            word, test = known.get(key, ("", ""))
            if word != warm.KILLED or test not in notes.of or reason(change):
                word, test = judge(change, notes)
            new[key] = word, test
            found.append((change, word, test))
            if word in LEFT:
                say(f"{word}: attention.{change.module} {change.name}", flush=True)
            if change.kernel is not None:
                for name in set(os.listdir(BUILT)) - built:
                    (BUILT / name).unlink(missing_ok=True)
            if i % 100 == 99:
                _write(JUDGED, new)
                say(f"{i + 1} of {len(every)} after {time.monotonic() - before:.0f} s", flush=True)
        _write(JUDGED, new)

    if not BUILT.exists():
        BUILT.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(cache.folder(), BUILT, copy_function=shutil.copy)
        BUILT.chmod(0o700)
    os.environ["CUDA_COURSE_CACHE"] = str(BUILT)
    status = warm.session(files_of(modules), work)
    if status:
        raise SystemExit(f"pytest could not run: status {int(status)}")
    return found


class Rows:
    """In the place of Notes, for a few mutants of what is built three times: a triple meets its own rows of the contract."""

    def __init__(self, tests, lecture=False):
        self.tests, self.lecture = tests, lecture

    def tests_of(self, change):
        if self.lecture:
            own = f"lecture_{lecture_of(change.module)}"
            return [name for name in self.tests.items if own in name], MINUTES
        mechanism, way = change.definition.rsplit("_", 1)
        return [name for name, item in self.tests.items.items() if _is_row(item, mechanism, way)], MINUTES


def _is_row(item, mechanism, way):
    given = item.callspec.params if hasattr(item, "callspec") else {}
    return "row" in given and given["row"].name == mechanism and given.get("way", way).startswith(way)


def try_sample(count, seed, say=print):
    """[(Change, word, test)] of some mutants of the triples' Python, drawn among those that were killed when all were tried:
    with the contract's rows alone, and what outlives them with the tests of its lecture."""
    kept = kept_mechanisms.read()
    every = [
        change
        for module in MODULES
        for change in changes(module, _triples(module) or {""})
        if not reason(change) and change.mutant.name not in kept[f"{module}.{change.definition}"].get("left", ())
    ]
    found = []

    def work(tests):
        found.extend((change, *judge(change, Rows(tests))) for change in sample(every, count, seed))

    def once_more(tests):
        for i, (change, word, _) in enumerate(found):
            if word in LEFT:
                found[i] = change, *judge(change, Rows(tests, lecture=True))

    warm.session(["tests/contract/test_triples.py"], work)
    left = sorted({change.module for change, word, _ in found if word in LEFT})
    if left:
        warm.session([path for path in files_of(left) if "lecture_" in str(path)], once_more)
    for change, word, test in found:
        say(f"{word}: attention.{change.module} {change.name} {test}", flush=True)
    return found


def _triples(module):
    """The names of a module's triples whose mutants were all tried, as far as they have a row in the contract."""
    rows = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "contract").glob("*.py"))
    kept = kept_mechanisms.read()
    names = [name for name in names_of(module) if f"{module}.{name}" in kept and name.endswith(WAYS[:2])]
    return {name for name in names if f"{module}.{name}," in rows}


def main(words, arguments):
    """The command `python -m tests.mutation attention...`; returns its status."""
    if arguments.sample and words == ["attention"]:
        found = try_sample(arguments.sample, seed=1)
    else:
        wanted = named(words)
        if arguments.triples:
            wanted = {module: {name for name in names if name.endswith(WAYS)} for module, names in wanted.items()}
        every = [change for module, names in wanted.items() if names for change in changes(module, names)]
        if arguments.only:
            every = [change for change in every if (change.kernel is None) == (arguments.only == "python")]
        if arguments.sample:
            every = drawn(every, arguments.sample)
        found = run(every, only_known=arguments.known)
    counts = Counter(word for _, word, _ in found)
    print(", ".join(f"{counts[word]} {word}" for word in counts) or "no mutants")
    if arguments.keep and arguments.sample:
        kept_mechanisms.keep_drawn(found)
    elif arguments.keep:
        kept_mechanisms.keep(found)
    return 1 if any(counts[word] for word in LEFT) else 0
