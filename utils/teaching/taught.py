"""What a teacher needs to know of a lecture, read from its one source: objectives, hours, questions, homework, traps.

A lecture says all of it in its title cell, in its cell tagged `teacher` and in its predictions, traps and exercises; what
one does not say, lacking() names in one sentence.
"""

import dataclasses
import re
from functools import cached_property

from utils.authoring import references, seen
from utils.authoring import source as lecture_source
from utils.paths import ROOT

SPARE = 10  # minutes that a plan leaves free
CLASS = 50  # minutes of an hour in class
LABEL = re.compile(
    r"\*(Hour \d \(\d+\)|At home after hour \d|Board|Always works|Checkpoint \d|Questions that come|Skip first)\.\*"
)
NEEDED = ("Hour 1", "Hour 2", "At home after hour 1", "At home after hour 2", "Board", "Always works")
NEEDED += ("Checkpoint 1", "Checkpoint 2", "Questions that come", "Skip first")
PREDICT = re.compile(r"(?<!\*)\*{1,2}Predict\.\*{1,2}\s+")
SENTENCE = re.compile(r"(?<=[.?!])\s+(?=[A-Z\"*$`])")
ANSWER_WORDS = 45
ENDS = re.compile(rf"{PREDICT.pattern}|\*\*Trap\.\*\*")  # what an answer does not reach into
PRINTED = 4  # lines of an experiment that answer a question
TRAP = re.compile(r"\*\*Trap\.\*\* \*\"(?P<claim>.+?)\"\*(?P<truth>.*)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Step:
    """One item of an hour: what is done, in how many minutes, and the sections that it names."""

    text: str
    minutes: int
    sections: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Hour:
    number: int
    minutes: int  # as the source states them
    steps: tuple[Step, ...]

    @property
    def sections(self):
        return [section for step in self.steps for section in step.sections]


@dataclasses.dataclass(frozen=True)
class Exercise:
    number: str
    goal: str
    difficulty: str
    importance: str
    minutes: int
    section: str


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A question before an experiment, in the cell `place`; the answer is the first text after the experiment."""

    section: str
    question: str
    answer: str
    place: int


@dataclasses.dataclass(frozen=True)
class Taught:
    """A lecture as a teacher sees it."""

    view: seen.View

    @property
    def lecture(self):
        return self.view.lecture

    @property
    def number(self):
        return self.view.number

    @property
    def title(self):
        return self.lecture.title.split("·", 1)[-1].strip()

    @cached_property
    def head(self):
        """The text of the title cell, less its heading."""
        return self.view.cells[0].source.partition("\n")[2].strip()

    def said(self, opening, closing=r"\*\*[A-Z]|\n\n|$"):
        """What the title cell says after a bold opening, on one line; "" if it does not say it."""
        found = re.search(rf"\*\*{opening}\.?\*\*(.+?)(?={closing})", self.head, re.DOTALL)
        return one_line(found[1]) if found else ""

    @property
    def question(self):
        return self.said("The question")

    @property
    def objectives(self):
        """What a learner will be able to do: "write attention in NumPy (1A to 1C)", ..."""
        text = re.sub(
            r"(\*\w+\*) and (\*\w+\*)", r"\1 and\0\2", self.said("You will be able to")
        )  # two verbs, one object
        parts = [part.replace("\0", " ") for part in re.split(r"(?<!\0)(?=\*\w+\*)", text)]
        return [re.sub(r"[,.; ]+$", "", re.sub(r" and$", "", part.strip())) for part in parts if part.strip()]

    @property
    def needs(self):
        return self.said("You need")

    @cached_property
    def needed_lectures(self):
        """The numbers of the earlier lectures that it builds on, those that `needs` names: ["01", "06"]."""
        return sorted({number for number in numbers_in(self.needs) if number < self.number})

    @cached_property
    def minutes(self):
        """The rows of the table of minutes, as lists of texts, its head first."""
        return next(filter(None, map(references._table, self.view.texts)), [])

    @cached_property
    def notes(self):
        """{label: text} of the cells tagged `teacher`."""
        text = "\n".join(cell.source for cell in self.lecture.cells if "teacher" in cell.tags)
        _, *parts = LABEL.split(re.sub(r"^- (?=\*)", "", text, flags=re.MULTILINE))
        return {label: one_line(body) for label, body in zip(parts[::2], parts[1::2])}

    def note(self, label):
        return next((text for name, text in self.notes.items() if name.startswith(label)), "")

    @cached_property
    def hours(self):
        found = []
        for label, text in self.notes.items():
            if match := re.fullmatch(r"Hour (\d) \((\d+)\)", label):
                steps = [Step(*_minutes(item), sections_in(item, self.number)) for item in text.split(" · ")]
                found.append(Hour(int(match[1]), int(match[2]), tuple(steps)))
        return sorted(found, key=lambda hour: hour.number)

    def homework(self, hour):
        """(text, numbers of the exercises for all, numbers for volunteers) after an hour."""
        text = self.note(f"At home after hour {hour}")
        for_all, _, volunteers = text.partition("For volunteers")
        return text, re.findall(r"\b\d+[A-Z]\b", for_all), re.findall(r"\b\d+[A-Z]\b", volunteers)

    def checkpoint(self, hour):
        """(question, expected answer) at the end of an hour."""
        found = re.match(r"(.+?\?) \((.+)\)$", self.note(f"Checkpoint {hour}"))
        return (found[1], found[2]) if found else (self.note(f"Checkpoint {hour}"), "")

    @property
    def questions(self):
        """[(question, answer)] that a class asks."""
        found = []
        for sentence in SENTENCE.split(self.note("Questions that come")):
            if sentence.endswith("?"):
                found.append((sentence, ""))
            elif found:
                found[-1] = found[-1][0], f"{found[-1][1]} {sentence}".strip()
        return found

    @cached_property
    def sections(self):
        """{place of a cell: number of the section in which it ends}, for the cells of the core."""
        found, current = {}, ""
        for cell in self.view.core:
            if cell.kind == "markdown":
                for number in re.findall(r"^##+ (\d+\.\d+) ", cell.source, re.MULTILINE):
                    current = number
            found[cell.place] = current
        return found

    @cached_property
    def headings(self):
        """{number of a section: its heading without the number}."""
        pairs = (re.match(r"(\d+\.\d+) (.+)", text) for level, text, _ in self.view.headings if level in (2, 3))
        return {pair[1]: pair[2] for pair in pairs if pair}

    @cached_property
    def exercises(self):
        return [
            Exercise(
                match["number"],
                re.search(r": (.+?) +\(difficulty", match[0])[1],
                re.search(r"difficulty (\d) of 5", match[0])[1],
                match["importance"] or "",
                int(match["minutes"]),
                self.sections.get(cell.place, ""),
            )
            for match, cell in self.view.exercises
        ]

    @cached_property
    def predictions(self):
        found, cells = [], self.view.core
        for index, cell in enumerate(cells):
            parts = PREDICT.split(cell.source) if cell.kind == "markdown" else []
            if len(parts) > 1:
                question = one_line(parts[-1])
                found.append(Prediction(self.sections[cell.place], question, answer_after(cells, index), cell.place))
        return found

    @cached_property
    def traps(self):
        """[(wrong claim, what is true)] of the lecture's traps."""
        found = []
        for cell in self.view.texts:
            for part in re.split(r"(?=\*\*Trap\.\*\*)", cell.source):
                if match := TRAP.match(part):
                    truth = match["truth"].split("\n\n")[0]
                    if not truth.strip(" .\n") or "*Predict" in part:  # an experiment answers
                        later = next((c for c in self.view.cells[cell.place :] if c.kind == "markdown"), None)
                        truth = first_words(later.source if later else "")
                    found.append((match["claim"], one_line(truth)))
        return found


def _minutes(item):
    """(text, minutes) of "1.9: masks (9)"."""
    match = re.fullmatch(r"(.+?) \((\d+)\)\.?", item.strip(), re.DOTALL)
    return (match[1], int(match[2])) if match else (item.strip(), 0)


def sections_in(text, number):
    """The sections of the lecture with this number that a text names; 0.68 is none."""
    return tuple(dict.fromkeys(re.findall(rf"\b{int(number)}\.\d{{1,2}}\b", text)))


def one_line(text):
    return " ".join(text.split())


def first_words(text, most=ANSWER_WORDS):
    """The first sentences of a cell that begins with a paragraph, `most` words at most, up to a prediction or a trap; ""
    under a heading."""
    paragraph = ENDS.split(text.strip().split("\n\n")[0], maxsplit=1)[0]
    if paragraph.startswith(("#", "|", "<", "$$")):
        return ""
    kept = []
    for sentence in SENTENCE.split(one_line(paragraph)):
        if kept and (len(" ".join([*kept, sentence]).split()) > most or sentence.rstrip('*"').endswith(("?", ":"))):
            break  # a question or a colon leads on to what comes next
        kept.append(sentence)
    return " ".join(kept)


def answer_after(cells, index):
    """What answers the question that the cell cells[index] ends with: the text after the experiment, or else what the
    experiment prints, in few lines, or draws."""
    shown = []
    for cell in cells[index + 1 :]:
        if cell.kind == "markdown":
            if text := first_words(cell.source):
                return text
            break
        shown.append(cell)
    printed = [line.strip() for cell in shown for line in lines_printed(cell)]
    if printed:
        return " · ".join(f"`{one_line(line)}`" for line in printed[:PRINTED])
    drawn = [output.metadata["image/png"]["alt"] for cell in shown for output in cell.figures]
    return one_line(drawn[0]) if drawn else ""


def lines_printed(cell):
    """The lines that a code cell prints, without the words that stand for a picture, a caption or a view."""
    texts = [output["text"] for output in cell.outputs if output.get("text")]
    shown = [output.get("data", {}) for output in cell.outputs]
    texts += [data["text/plain"] for data in shown if set(data) == {"text/plain"}]
    return [line for text in texts for line in text.splitlines() if line.strip()]


def numbers_in(text):
    """The two-digit numbers of the lectures that a text names: lecture 01, lectures 01 and 02, lectures 02 to 04."""
    found = []
    for first, joint, second in re.findall(
        r"\blectures? (\d\d)(?:(?:,| (and|to)) (\d\d))?\b(?!\.\d)", text, re.IGNORECASE
    ):
        last = int(second) if second else int(first)
        found += range(int(first), last + 1) if joint == "to" else [int(first), last]
    return [f"{number:02}" for number in found]


def lacking(taught):
    """One sentence that says what a lecture lacks for being taught from here; "" for nothing."""
    missing = [label for label in NEEDED if not taught.note(label)]
    missing += [what for what, found in (("The question", taught.question), ("You need", taught.needs)) if not found]
    missing += [] if taught.objectives else ["You will be able to"]
    if missing:
        return f"Lecture {taught.number} does not say in its title and teacher cells: {', '.join(missing)}."
    return ""


def read(number, root=ROOT):
    """The Taught of the lecture with this number, "01". Raises ValueError where there is none."""
    paths = sorted((root / "solutions").glob(f"{number}_*.py"))
    if not paths:
        known = ", ".join(path.name[:2] for path in sources(root))
        raise ValueError(f"There is no lecture {number}; there are {known or 'none'}.")
    lecture = lecture_source.read(paths[0])
    return Taught(seen.view(lecture, root / "lectures" / f"{lecture.name}.ipynb"))


def sources(root=ROOT):
    """The sources of all lectures."""
    return sorted((root / "solutions").glob("[0-9][0-9]_*.py"))


def chosen(numbers, root=ROOT):
    """The lectures with these numbers, or all."""
    return [read(number.zfill(2), root) for number in numbers or [path.name[:2] for path in sources(root)]]
