"""What became of the mutants of attention/, when they were last judged: counts in a file, one line a definition."""

import json
from collections import Counter

from tests.mutation.mechanisms import MODULES
from utils.paths import ROOT

WORDS = "killed", "equivalent", "survived", "no test", "only asked by an exercise", "cannot be defined"  # warm, survey
FILE = ROOT / "tests" / "mutation" / "kept_mechanisms.json"
DRAWN = ROOT / "tests" / "mutation" / "kept_drawn.json"  # of definitions that were not tried as a whole


def read(file=FILE):
    """{"module.definition": {word: mutants, "left": the names of those that survived}}, in the order of the modules."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def keep(found, file=FILE):
    """Write what was `found`, (Change, word, test) each, of all mutants of some definitions; what the file has of others stays."""
    groups = {}
    for change, word, _ in found:
        groups.setdefault(f"{change.module}.{change.definition}", []).append((change.mutant.name, word))
    _write(groups, file)


def keep_drawn(found, file=DRAWN):
    """The same for mutants that were drawn, under the names of their modules."""
    groups = {}
    for change, word, _ in found:
        groups.setdefault(change.module, []).append((change.name, word))
    _write(groups, file)


def _write(groups, file):
    kept = read(file)
    for name, pairs in groups.items():
        left = [mutant for mutant, word in pairs if word in ("survived", "no test")]
        kept[name] = dict(Counter(word for _, word in pairs)) | ({"left": left} if left else {})
    order = sorted(kept, key=lambda name: (MODULES.index(name.split(".")[0]), name))
    lines = [f'"{name}": {json.dumps(kept[name], ensure_ascii=False)}' for name in order]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
