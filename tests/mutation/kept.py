"""What became of all mutants of an exercise, when they were last judged: counts in a file, one line an exercise."""

import json
from collections import Counter

from tests.mutation.judge import BROKEN, REFUSED, SAME, SURVIVED
from utils.judge.exercise import order
from utils.paths import ROOT

FILE = ROOT / "tests" / "mutation" / "kept.json"
WORDS = REFUSED, SAME, BROKEN, SURVIVED


def counts(file=FILE):
    """{number of an exercise: {word: mutants}}, in the order of the exercises."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def keep(answers, found, file=FILE):
    """Write what was `found` of all `answers` of some exercises, a word each; what the file has of others stays."""
    kept = counts(file)
    for number in dict.fromkeys(answer.exercise.number for answer in answers):
        words = Counter(word for answer, word in zip(answers, found) if answer.exercise.number == number)
        kept[number] = {word: words[word] for word in WORDS}
    lines = [f'"{number}": {json.dumps(kept[number])}' for number in sorted(kept, key=order)]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
