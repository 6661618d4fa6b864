"""A handout to print: the formulas, the worked example, the predictions with room for a pencil, and their answers.

What the worked example asks is answered on the page of answers: a learner who does it with a pencil does not see it first.
"""

import ast
import html
import re

from utils.teaching import page
from utils.teaching.taught import PREDICT, lines_printed

FORMULA = re.compile(r"\$\$.+?\$\$", re.DOTALL)


def page_of(lecture):
    """The handout of a lecture as a page."""
    parts = [f"<h1>{page.inline(f'Lecture {lecture.number} · {lecture.title}')}</h1>"]
    parts += [page.markdown(f"**{lecture.question}** Name: ______________________")]
    parts += _formulas(lecture)
    asked, outcome = _worked_example(lecture)
    parts += [*asked, *_predictions(lecture), *outcome]
    return page.document(f"Handout, lecture {lecture.number}", "\n".join(parts))


def _formulas(lecture):
    rows = [
        (lecture.sections[cell.place], formula)
        for cell in lecture.view.core
        if cell.kind == "markdown"
        for formula in FORMULA.findall(cell.source)
    ]
    if rows:
        yield "<h2>Formulas</h2>"
    for section, formula in rows:
        yield page.markdown(f"{section} {lecture.headings.get(section, '')}\n\n{formula}")


def worked_example(lecture):
    """The cells of the section whose heading names a worked example, as (kind, text, cell); [] where there is none."""
    found, inside = [], False
    for cell in lecture.view.core:
        if cell.kind == "code":
            found += [("code", cell.source, cell)] if inside else []
            continue
        for part in re.split(r"(?m)^(?=##+ )", cell.source):
            if re.match(r"##+ ", part):
                inside = "worked example" in part.splitlines()[0].lower() or (inside and part.startswith("####"))
            if inside and part.strip():
                found.append(("text", part, cell))
    return found


def without_pictures(code):
    """Code less its calls of `plotting`, whose titles and captions say what comes out."""
    lines = code.splitlines()
    for part in reversed(ast.parse(code).body):
        if ast.unparse(part).startswith("plotting."):
            del lines[part.lineno - 1 : part.end_lineno]
    return "\n".join(lines).rstrip()


def _worked_example(lecture):
    """(HTML up to what is asked, HTML of what comes out), the second for the page of answers; all in the first where
    nothing is asked."""
    asked, outcome = [], []
    for kind, text, cell in worked_example(lecture):
        if kind == "text":
            (outcome or asked).append(page.markdown(re.sub(r"^###+ [\d.]+ ", "## ", text)))
            if PREDICT.search(text):
                outcome.append("<h3>The worked example</h3>")
            continue
        asked.append(f"<pre><code>{html.escape(without_pictures(text))}</code></pre>")
        found = outcome or asked
        if printed := lines_printed(cell):
            found.append(f"<pre>{html.escape(chr(10).join(printed))}</pre>")
        found += map(page.image, cell.figures)
    return asked, outcome


def _predictions(lecture):
    yield '<h2 class="new-page">Predict before you run</h2>'
    for number, prediction in enumerate(lecture.predictions, 1):
        yield page.markdown(f"**{number}.** ({prediction.section or 'beginning'}) {prediction.question}")
        yield '<div class="room"></div>'
    yield '<h2 class="new-page">What came out</h2>'
    lines = [f"**{number}.** {prediction.answer}" for number, prediction in enumerate(lecture.predictions, 1)]
    yield page.markdown("\n\n".join(lines))
