"""The slides of a lecture, from its cells tagged `slide`, as data: what each slide shows and what the teacher says.

A text cell gives its first section; what it asks is answered there too, where the experiment has no slide of its own. A
code cell gives its picture, its view or its code and numbers; the prediction before it is asked first, and the text
after it is the answer, shown last.
"""

import dataclasses
import itertools
import re

from utils.teaching.taught import PREDICT, first_words, lines_printed, one_line

SLIDES = 12, 20  # of a lecture
WORDS = 75  # of running text on a slide; what is more goes to the notes
CONTEXT = 45  # words before a prediction that are shown with it
CODE_LINES = 14  # that a slide shows; longer cells show their numbers only
PRINTED_LINES = 12
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
HINT = re.compile(r"<details>.*?</details>", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Slide:
    """One slide: its heading, Markdown that is seen at once, what the experiment shows, the answer, and notes."""

    kind: str  # "title", "text", "exercise", "picture", "view" or "number"
    heading: str
    text: str = ""
    code: str = ""
    printed: str = ""
    figures: tuple = ()  # outputs with a picture
    view: str = ""  # HTML of an interactive view
    answer: str = ""
    predicts: bool = False
    notes: tuple[str, ...] = ()


def slides(lecture):
    """The slides of a Taught lecture, in order."""
    made, cells = [], lecture.view.core
    for index, cell in enumerate(cells):
        if "slide" not in cell.tags:
            continue
        if cell.place == 1:
            made.append(_title(lecture))
        elif cell.kind == "markdown":
            made.append(_text(lecture, cells, index))
        else:
            made.append(_experiment(lecture, cells, index))
    return made


def lacking(lecture, made):
    """One sentence that says what a lecture's tags lack for a deck; "" for nothing."""
    if not SLIDES[0] <= len(made) <= SLIDES[1]:
        return f"Lecture {lecture.number} has {len(made)} slides; {SLIDES[0]} to {SLIDES[1]}: tag other cells `slide`."
    kinds = {slide.kind for slide in made}
    missing = [kind for kind in ("picture", "number", "exercise") if kind not in kinds]
    missing += [] if any("$$" in slide.text for slide in made) else ["formula"]
    missing += [] if any(slide.predicts for slide in made) else ["prediction"]
    return f"Lecture {lecture.number} has no slide with: {', '.join(missing)}." if missing else ""


def _title(lecture):
    able = "\n".join(f"- {objective}" for objective in lecture.objectives)
    text = f"**{lecture.question}**\n\nYou will be able to\n\n{able}\n\nYou need {lecture.needs}"
    whole = [cell.source for cell in lecture.lecture.cells if "teacher" in cell.tags]
    return Slide("title", lecture.lecture.title, text, notes=tuple(whole))


def _text(lecture, cells, index):
    cell = cells[index]
    heading, body = first_section(cell.source)
    exercise = heading.startswith("Exercise ")
    heading = re.sub(r" +\(difficulty.*?(\d+) minutes.*", r" (\1 minutes)", heading)
    shown, rest = shortened(HINT.sub("", body))
    notes = [*_steps(lecture, cell), *([rest] if rest else [])]
    kind, predicts = "exercise" if exercise else "text", bool(PREDICT.search(shown))
    printed, answer = _unseen(cells, index) if predicts else ("", "")
    heading = heading or _heading_above(lecture, cell)
    return Slide(kind, heading, shown, printed=printed, answer=answer, predicts=predicts, notes=tuple(notes))


def _unseen(cells, index):
    """(what the experiment after a question prints, the answer), where no slide shows that experiment; else two ""."""
    after = cells[index + 1 :]
    experiment = list(itertools.takewhile(lambda cell: cell.kind == "code", after))
    if any("slide" in cell.tags for cell in experiment):
        return "", ""
    printed = [line for cell in experiment for line in lines_printed(cell)][:PRINTED_LINES]
    later = after[len(experiment)].source if len(after) > len(experiment) else ""
    return "\n".join(printed), first_words(later)


def first_section(text):
    """(heading, what stands under it up to the next heading) of a text cell; the heading is "" where none comes first."""
    found = list(HEADING.finditer(text))
    if not found or text[: found[0].start()].strip():
        return "", text[: found[0].start() if found else None].strip()
    first = next((i for i, f in enumerate(found) if text[f.end() : _start(found, i + 1, text)].strip()), 0)
    return found[first][1], text[found[first].end() : _start(found, first + 1, text)].strip()


def _start(found, index, text):
    return found[index].start() if index < len(found) else len(text)


def shortened(text):
    """(what a slide shows of a text, what is left for the notes): formulas, tables and predictions stay, and prose as far
    as it is short. The first paragraph, the question, always stays."""
    parts = [part for part in re.split(r"\n\n+", text) if part.strip()]
    words, shown, rest = 0, [], []
    for index, part in enumerate(parts):
        if not part.startswith(("|", "$$")):
            words += len(part.split())
            if index and words > WORDS and not PREDICT.match(part):
                rest.append(part)
                continue
        shown.append(part)
    return "\n\n".join(shown), "\n\n".join(rest)


def _experiment(lecture, cells, index):
    cell = cells[index]
    asked = _prediction(cells[index - 1]) if index else ""
    later = cells[index + 1].source if index + 1 < len(cells) and cells[index + 1].kind == "markdown" else ""
    views = [output["data"]["text/html"] for output in cell.outputs if "data-head-viewer" in _html(output)]
    printed = "\n".join(lines_printed(cell)[:PRINTED_LINES])
    code = cell.source if len(cell.lines) <= CODE_LINES and not cell.figures else ""
    asked = asked or ("\n".join(_alternatives(cell.figures)) if views else "")
    kind = "view" if views else "picture" if cell.figures else "number"
    figures = () if views else tuple(cell.figures)
    notes = [
        *_steps(lecture, cell),
        *_alternatives(cell.figures),
        *filter(None, [re.split(r"(?m)^#", later)[0].strip()]),
    ]
    return Slide(
        kind,
        _heading_above(lecture, cell),
        asked,
        code,
        "" if views else printed,
        figures,
        "".join(views),
        first_words(later),
        bool(PREDICT.search(asked)),
        tuple(notes),
    )


def _html(output):
    return output.get("data", {}).get("text/html", "")


def _alternatives(figures):
    return [output.metadata["image/png"]["alt"] for output in figures]


def _prediction(cell):
    """The prediction that a text cell ends with, after the short paragraph before it; "" if there is none, or if the cell
    has a slide of its own that asks it."""
    parts = PREDICT.split(cell.source) if cell.kind == "markdown" and "slide" not in cell.tags else []
    if len(parts) < 2:
        return ""
    before = [part for part in re.split(r"\n\n+", parts[-2]) if part.strip()]
    context = before[-1] if before and len(before[-1].split()) <= CONTEXT and not before[-1].startswith("#") else ""
    context = context[context.rfind("**", 0, context.find("?**")) :] if "?**" in context else context
    return f"{context}\n\n*Predict.* {one_line(parts[-1])}".strip()


def _heading_above(lecture, cell):
    """The last heading at or before a cell, exercises left out."""
    texts = [text for level, text, other in lecture.view.headings if other.place <= cell.place and level < 5]
    return next(text for text in reversed(texts) if not text.startswith("Exercise "))


def _steps(lecture, cell):
    """What the teacher's notes say about the section of a cell, with its minutes."""
    section = lecture.sections[cell.place]
    found = [(hour, step) for hour in lecture.hours for step in hour.steps if section and section in step.sections]
    return [f"Hour {hour.number}, {step.minutes} minutes: {step.text}" for hour, step in found]
