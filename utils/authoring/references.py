"""What a lecture's text refers to: numbers of sections, exercises and lectures, and the minutes in its table."""

import re

LECTURES = range(1, 14)
UNNUMBERED = ("Part ", "Going further", "Behind the scenes", "What you can do now", "Exercises left", "Glossary")
UNNUMBERED += ("Quiz", "Sources", "Summary", "Traps")
# A section of a paper is cited as "§ 5.1" or has three numbers; "section 5.1" is one of the course.
SECTION = re.compile(r"\bsections? ((?:\d+\.\d+(?!\.?\d)(?:,? and |,? or |, | to )?)+)", re.IGNORECASE)
EXERCISE = re.compile(r"\bexercises? ((?:(?:\d+\.\d+|\d+[A-Z])(?!\w|\.\d)(?:,? and |,? or |, | to )?)+)", re.IGNORECASE)
LECTURE = re.compile(r"\blectures? (\d+)(?: (?:to|and) (\d+))?\b(?!\.\d)", re.IGNORECASE)


def unnumbered(view):
    """Yield the headings of sections that have no number, a number of another lecture, or one that does not rise."""
    last = (0, 0)
    for level, text, cell in view.headings:
        if text.startswith("Behind the scenes"):
            return
        if level not in (2, 3) or text.startswith(UNNUMBERED) or re.match(r"Exercise \d", text):
            continue
        where = f"cell {cell.place}, line {cell.line}"
        number = re.match(r"(\d+)\.(\d+)\b", text)
        if not number or int(number[1]) != int(view.number):
            yield f"{where}: the heading {text!r} has no number {int(view.number)}.N"
            continue
        found = int(number[1]), int(number[2])
        if found <= last:
            yield f"{where}: section {number[0]} comes after section {last[0]}.{last[1]}"
        last = found


def dangling(view, views):
    """Yield the references to sections, exercises and lectures that no lecture has."""
    sections = set().union(*(other.sections for other in views))
    exercises = {match["number"] for other in views for match, _ in other.exercises}
    for cell in view.cells:
        where = f"cell {cell.place}, line {cell.line}"
        text = re.sub(r"\s*\n(?:[#>] ?)?\s*", " ", cell.source)
        for kind, pattern, known in (("section", SECTION, sections), ("exercise", EXERCISE, exercises)):
            for found in pattern.finditer(text):
                for number in re.findall(r"\d+\.\d+|\d+[A-Z]", found[1]):
                    if number not in known:
                        yield f"{where}: there is no {kind} {number}"
        for found in LECTURE.finditer(text):
            for number in filter(None, found.groups()):
                if int(number) not in LECTURES:
                    yield f"{where}: there is no lecture {number}"


# ---- Minutes ------------------------------------------------------------------------------------------------------


def minutes(view):
    """Yield what does not add up in the table of minutes, against its last row, the sections and the exercises."""
    table = next(filter(None, map(_table, view.texts)), None)
    if table is None:
        yield "no table of minutes: | part | core minutes | more minutes |, its last row **together**"
        return
    heads, *rows, total = table
    timed = [column for column, head in enumerate(heads) if "minutes" in head.lower()]
    if "together" not in total[0].lower():
        yield "the table of minutes has no last row **together**"
        return
    for column in timed:
        listed, said = sum(_number(row[column]) for row in rows), _number(total[column])
        if listed != said:
            yield f"the column {heads[column]!r} adds up to {listed} minutes, and its last row says {said}"
    needed = {match["number"]: int(match["minutes"]) for match, _ in view.exercises}
    named = set()
    for row in rows:
        text, available = row[0], sum(_number(row[column]) for column in timed)
        exercises = _exercises_in(text, needed)
        named |= set(exercises)
        unknown = [number for number in exercises if number not in needed]
        unknown += [number for number in re.findall(r"\b\d+\.\d+\b", text) if number not in view.sections]
        if unknown:
            yield f"the table of minutes names {', '.join(unknown)}, which the lecture does not have"
        elif (alone := sum(needed[number] for number in exercises)) > available:
            yield f"the exercises of {text!r} take {alone} minutes, and the row has {available}"
    for number in sorted(set(needed) - named):
        yield f"the table of minutes does not name exercise {number}"
    headings = {found[0] for _, text, _ in view.headings if (found := re.match(r"Part \d+", text))}
    for part in sorted(headings ^ {found[0] for row in rows if (found := re.match(r"Part \d+", row[0]))}):
        yield f"{part} is {'not in the table of minutes' if part in headings else 'in the table of minutes, and no heading says so'}"


def minutes_of_core(view):
    """Return the minutes of a lecture's core, its exercises included, as its table states them; 0 without a table."""
    head, *rows = next(filter(None, map(_table, view.texts)), [[]])
    core = [column for column, name in enumerate(head) if "core" in name.lower()]
    return sum(_number(row[column]) for row in rows[:-1] for column in core)


def essential_beyond_core(view):
    """Yield the exercises called essential whose row of the table of minutes has none in the core."""
    head, *rows = next(filter(None, map(_table, view.texts)), [[]])
    core = [column for column, name in enumerate(head) if "core" in name.lower()]
    essential = {match["number"]: 0 for match, _ in view.exercises if match["importance"] == "essential"}
    for row in rows[:-1]:
        if not any(_number(row[column]) for column in core):
            yield from (number for number in _exercises_in(row[0], essential) if number in essential)


def _table(cell):
    """Return the rows of the first Markdown table in a cell whose head speaks of minutes, as lists of texts."""
    rows = [line.strip().strip("|") for line in cell.source.splitlines() if line.lstrip().startswith("|")]
    rows = [[part.strip().strip("*") for part in row.split("|")] for row in rows]
    rows = [row for row in rows if not all(re.fullmatch(r":?-+:?", part) for part in row)]
    return rows if len(rows) > 2 and any("minutes" in part.lower() for part in rows[0]) else None


def _number(text):
    return int(text) if text.isdigit() else 0


def _exercises_in(text, known):
    """Return the exercises that a row names: 1A, 1B to 1D."""
    found = re.findall(r"\b\d+[A-Z]\b", text)
    for first, last in re.findall(r"\b(\d+[A-Z]) to (\d+[A-Z])\b", text):
        found += [number for number in known if first < number < last]
    return found
