"""One-step errors of CUDA source, by its text."""

import re

from tests.mutation.syntax import SCALE, Mutant

COMMENT = re.compile(r"//.*")
NEW = (  # a pattern of what stands there, and what takes its place
    (r"(?<![<>=!])<(?![<=])", "<="), (r"<=", "<"), (r"(?<![->=])>(?![>=])", ">="), (r">=", ">"), (r"==", "!="),
    (r"!=", "=="), (r"&&", "||"), (r"\|\|", "&&"), (r"(?<=[\w\])]) \+ (?=[\w(])", " - "), (r"(?<=[\w\])]) - (?=[\w(])", " + "),
    (r"(?<=[\w\])]) \* (?=[\w(])", " + "), (r"(?<=[\w\])]) / (?=[\w(])", " * "), (r" % ", " / "), (r"\+=", "="), (r"\*=", "="),
    (r"\bfmaxf\b", "fminf"), (r"\bfminf\b", "fmaxf"), (r"\browmax\b", "rowmin"), (r"-INFINITY", "0.0f"),
    (r"\bthreadIdx\.x\b", "0"), (r"\bthreadIdx\.y\b", "0"), (r"\bblockIdx\.x\b", "0"), (r"\bblockIdx\.y\b", "0"),
    (r"\bsinf?\(", "cosf("), (r"\bmin\(", "max("), (r"\bmax\(", "min("), (r"\(size_t\)", ""), (r"\+\+(?=\w)", "--"),
    (r"__sync(threads|warp)\(\);", ""),
)  # fmt: skip
NUMBER = re.compile(r"(?<![\w.\"])(\d+)(?![\w.])")
TERNARY = re.compile(r"([\w\[\]. ]+(?:[<>=!]=?|&&)[^?;=]+)\?([^:;]+):([^;,)]+)")
EXP = re.compile(r"\bexp2?f?\(")
STORED = re.compile(r"(?<![=<>!+*/-])= (?!=)([^;,=]+?);")


def mutants(source, lines, scale=False):
    """Every Mutant of a CUDA source in one of the lines, numbered from 1; scale: those with a factor wrong by 5 %."""
    found, text = {}, source.split("\n")
    for number in sorted(lines):
        line = text[number - 1]
        end = COMMENT.search(line)
        code = line[: end.start()] if end else line
        for column, what, new in _scales(code) if scale else _changes(code):
            changed = "\n".join([*text[: number - 1], new, *text[number:]])
            found.setdefault(changed, Mutant(number, column, f"{code.strip()[:60]}: {what}", changed))
    found.pop(source, None)
    return list(found.values())


def _changes(code):
    for pattern, new in NEW:
        for match in re.finditer(pattern, code):
            what = f"{match[0].strip()} becomes {new.strip() or 'nothing'}"
            yield match.start(), what, code[: match.start()] + new + code[match.end() :]
    for match in NUMBER.finditer(code):
        for value in (int(match[1]) + 1, int(match[1]) - 1):
            yield match.start(), f"{match[1]} becomes {value}", code[: match.start()] + str(value) + code[match.end() :]
    for match in TERNARY.finditer(code):
        for i in (2, 3):
            yield match.start(), f"{match[0].strip()[:40]} becomes {match[i].strip()}", code.replace(match[0], match[i])
    if re.fullmatch(r"\s*[\w\[\]. +*/]+ [+*]?= [^;]+;\s*", code):
        yield 0, "left out", ""


def _scales(code):
    for match in EXP.finditer(code):
        yield (
            match.start(),
            f"what is exponentiated, times {SCALE}",
            f"{code[: match.end()]}{SCALE}f * {code[match.end() :]}",
        )
    for match in STORED.finditer(code):
        if match[1] != "0.0f" and ("[" in code[: match.start()] or "sum" in code[: match.start()]):
            yield (
                match.start(),
                f"{match[1][:40]} times {SCALE}",
                f"{code[: match.start()]}= {SCALE}f * ({match[1]});{code[match.end() :]}",
            )
