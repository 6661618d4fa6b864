"""TEACHING.md: what of it follows from the lectures is written into it: python -m utils.teaching.overview.

Generated parts stand between <!-- made: NAME --> and <!-- end -->; the rest is written by hand. The graph of
prerequisites goes to data/pictures/prerequisites.svg.
"""

import re
import sys

from utils.paths import ROOT
from utils.teaching import graph, taught
from utils.teaching.taught import CLASS, SPARE

PAGE, PICTURE = "TEACHING.md", "data/pictures/prerequisites.svg"
PART = re.compile(r"(<!-- made: (?P<name>[\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
HOURS = 2  # in class, for each lecture
SYLLABI = {  # class hours of 50 minutes: the lectures, in order
    "6 hours": ("01", "02", "06"),
    "12 hours": ("01", "02", "03", "04", "05", "06"),
    "24 hours": tuple(f"{number:02}" for number in range(1, 13)),
    "13 weeks": tuple(f"{number:02}" for number in range(1, 14)),
}


def titles(root=ROOT):
    """{number: title} of all lectures, those that are not here yet included, from README.md."""
    rows = re.findall(r"^\| (\d\d) \| (.+?) \|", (root / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    return dict(rows)


def table(lectures, _names):
    """What each lecture asks for."""
    lines = ["| | lecture | needs | in class | alone | exercises |", "|---|---|---|---|---|---|"]
    for number, lecture in lectures.items():
        needs = ", ".join(lecture.needed_lectures) or "none"
        first = taught.is_first_edition(lecture)
        lines.append(
            f"| {number} | {lecture.title} | {needs} | {HOURS} × {CLASS - SPARE if not first else CLASS} min | "
            f"{alone(lecture)} min | {len(lecture.exercises)} |"
        )
    return "\n".join(lines)


def alone(lecture):
    """The minutes of a lecture's core, exercises included, for a learner alone, from its table of minutes."""
    head, *rows = lecture.minutes
    column = next(index for index, name in enumerate(head) if "minutes" in name.lower())
    return sum(int(row[column]) for row in rows if row[column].isdigit() and "together" not in row[0].lower())


def syllabus(name, lectures, names):
    """One syllabus as a table; a lecture that is not here yet gives its hours to the exercises of one that is."""
    weekly = name.endswith("weeks")
    lines = [f"| {'week' if weekly else 'hours'} | in class | after it |", "|---|---|---|"]
    here = [number for number in SYLLABI[name] if number in lectures]
    spare = iter(here)
    for place, number in enumerate(SYLLABI[name]):
        when = f"{place + 1}" if weekly else f"{HOURS * place + 1} and {HOURS * place + 2}"
        if number in lectures:
            lines.append(f"| {when} | {number} {lectures[number].title} | {after(lectures[number])} |")
        else:
            other = next(spare, None)
            until = f"exercises of {other} in class, then its sections under Going further" if other else "questions"
            lines.append(f"| {when} | {number} {names[number]}: not here yet; until then {until} | |")
    return "\n".join(lines)


def after(lecture):
    """The homework of a lecture, as numbers of exercises."""
    if taught.is_first_edition(lecture):
        return f"see its teacher's notes; {len(lecture.exercises)} exercises"
    for_all = [number for hour in lecture.hours for number in lecture.homework(hour.number)[1]]
    needed = {exercise.number: exercise.minutes for exercise in lecture.exercises}
    return f"{', '.join(for_all)}: {sum(needed.get(number, 0) for number in for_all)} min"


def parts(lectures, names):
    """{name of a generated part: its text}."""
    made = {"lectures": table(lectures, names)}
    made |= {name: syllabus(name, lectures, names) for name in SYLLABI}
    made["graph"] = f"![{graph.described(*graph_of(lectures))}]({PICTURE})"
    return made


def graph_of(lectures):
    """(titles, needs) of the lectures that are here."""
    needs = {number: [n for n in lecture.needed_lectures if n in lectures] for number, lecture in lectures.items()}
    return {number: lecture.title for number, lecture in lectures.items()}, needs


def pages(root=ROOT):
    """{path below the root: text} of what is generated, from the lectures as they are."""
    lectures = {lecture.number: lecture for lecture in taught.chosen([], root)}
    made, text = parts(lectures, titles(root)), (root / PAGE).read_text(encoding="utf-8")
    unknown = sorted(made.keys() ^ {match["name"] for match in PART.finditer(text)})
    if unknown:
        raise ValueError(f"{PAGE} and what is made for it differ in: {', '.join(unknown)}")
    return {
        PAGE: PART.sub(lambda match: f"{match[1]}\n{made[match['name']]}\n\n{match[3]}", text),
        PICTURE: graph.svg(*graph_of(lectures)),
    }


def main(root=ROOT):
    for name, text in pages(root).items():
        path = root / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8", newline="\n")
            print(f"{name}: written", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
