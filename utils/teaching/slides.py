"""A deck, a handout and a quiz sheet of each lecture: python -m utils.teaching.slides [NN ...].

Written to build/teaching/ as pages that need no network: reveal.js and MathJax are copied beside them from the pinned
packages, pictures and views stand in the page. Outputs are the kept ones of lectures/; nothing is executed.
"""

import html
import sys
from pathlib import Path

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from utils.teaching import deck, handout, page, quiz, taught
from utils.teaching.taught import PREDICT

HERE = Path(__file__).parent
FORMATTER = HtmlFormatter(nowrap=True, noclasses=True, style="default")


def deck_page(lecture, slides):
    """The HTML of a deck."""
    sections = "\n".join(map(section, slides))
    loads = "".join(
        f'<script src="assets/{Path(name).name}"></script>\n' for name in page.REVEAL_FILES if name.endswith(".js")
    )
    styles = "".join(
        f'<link rel="stylesheet" href="assets/{Path(name).name}">\n'
        for name in page.REVEAL_FILES
        if name.endswith(".css")
    )
    body = f'{styles}<style>{_read("deck.css")}</style>\n<div class="reveal"><div class="slides">\n{sections}\n</div></div>'
    scripts = f"{loads}<script>{_read('deck.js')}</script>\n"
    return page.document(f"Slides, lecture {lecture.number}: {lecture.title}", body, style="", scripts=scripts)


def _read(name):
    return (HERE / name).read_text(encoding="utf-8")


def section(slide):
    """The HTML of one slide: what is seen first, and what each step adds."""
    step = " fragment" if slide.predicts else ""
    before, asked = (*PREDICT.split(slide.text, maxsplit=1), "")[:2]
    parts = [f"<h2>{page.inline(slide.heading)}</h2>"]
    parts += [_box("said", page.markdown(before))] if before.strip() else []
    parts += [_box("predict", page.markdown(f"**Predict.** {asked}"))] if asked else []
    parts += [f"<pre><code>{highlight(slide.code, PythonLexer(), FORMATTER)}</code></pre>"] if slide.code else []
    if slide.printed and not slide.figures:
        parts.append(f'<pre class="printed{step}">{html.escape(slide.printed)}</pre>')
    if slide.figures:
        parts.append(_box("figures" + step, "".join(map(page.image, slide.figures))))
    parts += [_box("view" + step, slide.view)] if slide.view else []
    parts += [_box("answer fragment", page.markdown(slide.answer))] if slide.answer else []
    parts.append(f'<aside class="notes">{page.markdown((chr(10) * 2).join(slide.notes))}</aside>')
    return f'<section class="kind-{slide.kind}">' + "\n".join(parts) + "</section>"


def _box(classes, inner):
    return f'<div class="{classes}">{inner}</div>'


def write(lecture, folder=page.BUILD):
    """Write the pages of a lecture, with what they load. Returns (their paths, what the lecture lacks, in a sentence each, or "")."""
    made = deck.slides(lecture)
    page.copy(page.REVEAL, folder / "assets", page.REVEAL_FILES)
    pages = {"slides": deck_page(lecture, made), "handout": handout.page_of(lecture)}
    pages |= {"quiz": quiz.page_of(lecture)} if quiz.questions(lecture) else {}
    paths = [page.write(f"{name}-{lecture.number}.html", text, folder) for name, text in pages.items()]
    return paths, " ".join(filter(None, [deck.lacking(lecture, made), quiz.lacking(lecture)]))


def main(numbers):
    """Write the pages of these lectures, or of all. Returns the exit status."""
    status = 0
    for lecture in taught.chosen(numbers):
        paths, lacks = write(lecture)
        for path in paths:
            print(f"{path.relative_to(page.ROOT).as_posix()}: written", flush=True)
        if lacks:
            print(lacks, flush=True)
            status |= bool(numbers)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, page.Missing) as problem:
        sys.exit(str(problem))
