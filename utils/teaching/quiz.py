"""The quiz of a lecture, from its cells tagged `quiz`: a question with letters, and the cell that computes the answer."""

import dataclasses
import re

from utils.teaching import page

QUESTIONS = 5
OPTION = re.compile(r"^- ([a-d])\) (.+)$", re.MULTILINE)
ANSWER = re.compile(r"(?P<letter>[a-d])\) (?P<found>.+?)\. (?P<why>.+)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question in Markdown with its options, the letter that its cell computed (kept output; "" if there is none), and
    why."""

    text: str
    options: tuple[tuple[str, str], ...]
    letter: str
    why: str


def questions(lecture):
    """The Questions of a Taught lecture, in order."""
    tagged = [cell for cell in lecture.view.cells if "quiz" in cell.tags]
    pairs = [
        (asked, cell) for asked, cell in zip(tagged, tagged[1:]) if (asked.kind, cell.kind) == ("markdown", "code")
    ]
    return [_question(asked, cell) for asked, cell in pairs]


def _question(asked, cell):
    said = "\n".join(output.get("data", {}).get("text/plain", "") for output in cell.outputs)
    match = ANSWER.search(said)
    text = OPTION.split(asked.source)[0].strip()
    return Question(
        text, tuple(OPTION.findall(asked.source)), match["letter"] if match else "", match["why"] if match else ""
    )


def lacking(lecture):
    """One sentence that says what a lecture's quiz lacks; "" for nothing."""
    found = questions(lecture)
    if len(found) != QUESTIONS:
        return f"Lecture {lecture.number} has {len(found)} questions tagged `quiz`; {QUESTIONS}."
    unanswered = [str(number) for number, question in enumerate(found, 1) if not question.letter]
    return (
        f"Lecture {lecture.number} has no kept answer to question {', '.join(unanswered)}: build it."
        if unanswered
        else ""
    )


def page_of(lecture):
    """The quiz as a sheet to print, its answers on a page of their own."""
    found = questions(lecture)
    parts = [f"# Quiz · Lecture {lecture.number} · {lecture.title}", "Name: ______________________"]
    for question in found:
        parts += [question.text, "\n".join(f"- ☐ {letter}) {option}" for letter, option in question.options)]
    body = page.markdown("\n\n".join(parts))
    answers = [f"**{number}.** {question.letter}) {question.why}" for number, question in enumerate(found, 1)]
    body += f'<h2 class="new-page">Answers</h2>\n{page.markdown((chr(10) * 2).join(answers))}'
    return page.document(f"Quiz, lecture {lecture.number}", body)
