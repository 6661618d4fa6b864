"""The course as pages that open from a file system, without a server and without a network: python -m utils.teaching.site.

Sphinx with myst-nb and the PyData theme reads the notebooks of lectures/ with the outputs that they keep; nothing is
executed. Around them: what needs what, one glossary, all papers, a search. Written to build/site/index.html.
"""

import re
import shutil
import sys
from pathlib import Path

import nbformat
from sphinx.cmd.build import build_main

from utils.authoring import source as lecture_source
from utils.teaching import graph, overview, page, taught

SOURCE, SITE = page.ROOT / "build" / "site-source", page.ROOT / "build" / "site"
STYLE = Path(__file__).parent / "site.css"
HOW_TO_READ = (
    "*You read the outputs that the course keeps. To run the cells and do the exercises: `python course.py lab`.*"
)
SCRIPT = re.compile(r"<script>.*?</script>", re.DOTALL)
ARXIV = re.compile(r"\b((?:0[7-9]|1\d|2[0-9])(?:0[1-9]|1[0-2])\.\d{4,5})\b")
NAMED = re.compile(
    r"((?:[A-Z][\w'-]+,? (?:(?:and|et al\.|&) )?){1,6}(?:\d{4})?(?:, [\w -]{3,30})?) ?\((?:arXiv )?([\d., ]+)"
)
CONF = '''"""Made by utils/teaching/site.py."""

project = "Attention, from first principles to CUDA kernels"
html_title = project
language = "en"
extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
mathjax_path = "tex-svg-full.js"
mathjax3_config = {"options": {"enableMenu": False}, "svg": {"fontCache": "local"}}
suppress_warnings = ["myst.header", "mystnb.mime_priority", "misc.highlighting_failure"]
html_theme = "pydata_sphinx_theme"
html_theme_options = {
    "logo": {"text": "Attention"},
    "navbar_end": [],
    "navbar_align": "left",
    "header_links_before_dropdown": 2,
    "footer_start": [],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "pygments_light_style": "a11y-high-contrast-light",
    "show_toc_level": 2,
}
html_sidebars = {"**": []}
html_context = {"default_mode": "light"}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_search_summary = False  # the summaries would be fetched, which a browser refuses for files
'''


def lecture_page(lecture, notebook):
    """A lecture's notebook as the site shows it: kept outputs, alternative texts, plumbing closed."""
    cells = [cell for cell in notebook.cells if lecture_source.ONLY_IN_LECTURES not in cell.metadata.get("tags", [])]
    for cell in cells:
        if cell.cell_type == "markdown":
            cell.source = _headings_in_order(cell.source.replace(lecture_source.HOW_TO_RUN, HOW_TO_READ))
            continue
        if "plumbing" in cell.metadata.get("tags", []):
            cell.metadata.tags = [*cell.metadata.tags, "hide-input"]
        for output in cell.outputs:
            data = output.get("data", {})
            if "text/markdown" in data:
                data["text/markdown"] = SCRIPT.sub("", data["text/markdown"])
            if "image/png" in data:
                cell.metadata["mystnb"] = {"image": {"alt": output.metadata["image/png"]["alt"]}}
    metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def _headings_in_order(text):
    """A heading of the fourth level is made one of the third: what a contents list shows is sections and exercises."""
    return re.sub(r"(?m)^#### ", "### ", text)


def index(lectures, names):
    rows = [f"- [Lecture {number}]({path.stem}.ipynb): {lecture.title}" for number, (lecture, path) in lectures.items()]
    rows += [f"- Lecture {number}: {title} (not here yet)" for number, title in names.items() if number not in lectures]
    hidden = "\n".join(path.stem for _, path in lectures.values())
    return f"""# Attention, from first principles to CUDA kernels

Each lecture builds its mechanism three times with one signature: in NumPy to understand it, in PyTorch to train it, in tiled CUDA C++ to see where its
bytes go. These pages show the lectures with their outputs. To run them and do the exercises: `python course.py lab`.

{chr(10).join(rows)}

[What needs what](prerequisites.md), [words](glossary.md), [papers](papers.md).

```{{toctree}}
:hidden:
:caption: Lectures

{hidden}
```

```{{toctree}}
:hidden:
:caption: Around them

prerequisites
glossary
papers
```
"""


def prerequisites(lectures):
    found = {number: lecture for number, (lecture, _) in lectures.items()}
    titles, needs = overview.graph_of(found)
    lines = [
        f"| [{n}]({lectures[n][1].stem}.ipynb) | {titles[n]} | {found[n].needs or ', '.join(needs[n])} |" for n in found
    ]
    return f"""# What needs what

An arrow goes from a lecture to one that needs it; arrows that others imply are left out.

<div class="scrolls" tabindex="0" role="region" aria-label="Which lecture needs which">
{graph.svg(titles, needs)}</div>

| | lecture | you need |
|---|---|---|
{chr(10).join(lines)}
"""


def terms(lecture):
    """[(term, what it is)] of a lecture's glossary, where it is a table."""
    found = []
    for cell in lecture.view.texts:
        for text in re.findall(r"(?m)^## Glossary$(.*?)(?=^## |\Z)", cell.source, re.DOTALL | re.MULTILINE):
            rows = re.findall(r"(?m)^\|(.+)\|$", text)[2:]
            found += [tuple(part.strip() for part in re.split(r"(?<!\\)\|", row, maxsplit=1)) for row in rows]
    return [row for row in found if len(row) == 2]


def glossary(lectures):
    rows = [(term, meaning, number) for number, (lecture, _) in lectures.items() for term, meaning in terms(lecture)]
    rows.sort(key=lambda row: page.plain(row[0]).lower())
    lines = [f"| {term} | {meaning} | [{n}]({lectures[n][1].stem}.ipynb) |" for term, meaning, n in rows]
    return (
        "# Words\n\nFrom the glossaries of the lectures.\n\n| term | what it is | lecture |\n|---|---|---|\n"
        + "\n".join(lines)
        + "\n"
    )


def papers_of(lecture):
    """{arXiv number: authors and year, or ""} of the papers that a lecture names."""
    text = "\n\n".join(re.sub(r"\s+", " ", cell.source) for cell in lecture.view.texts)
    found = dict.fromkeys(ARXIV.findall(text), "")
    for name, numbers in NAMED.findall(text):
        (first, *others) = ARXIV.findall(numbers) or [""]
        if first and not others and not found.get(first):  # whose of two numbers a name is, is not known
            found[first] = name.strip()
    return found


def papers(lectures):
    named, where = {}, {}
    for number, (lecture, path) in lectures.items():
        for paper, name in papers_of(lecture).items():
            named[paper] = named.get(paper) or name
            where.setdefault(paper, []).append(f"[{number}]({path.stem}.ipynb)")
    lines = [f"| {named[p]} | [{p}](https://arxiv.org/abs/{p}) | {', '.join(where[p])} |" for p in sorted(where)]
    head = "# Papers\n\nThose with a number at arXiv, by that number, and the lectures that name them. The links are the only ones that need a network.\n\n"
    return head + "| paper | arXiv | lectures |\n|---|---|---|\n" + "\n".join(lines) + "\n"


def write_source(folder, root=page.ROOT):
    """Write what Sphinx reads. Returns the lectures, {number: (Taught, path of the notebook)}."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "_static").mkdir(parents=True)
    page.copy(page.MATHJAX, folder / "_static")
    shutil.copyfile(STYLE, folder / "_static" / "site.css")
    found = taught.chosen([], root)
    lectures = {lecture.number: (lecture, root / "lectures" / f"{lecture.lecture.name}.ipynb") for lecture in found}
    for lecture, path in lectures.values():
        nbformat.write(lecture_page(lecture, nbformat.read(path, as_version=4)), folder / path.name)
    texts = {
        "conf.py": CONF,
        "index.md": index(lectures, overview.titles(root)),
        "prerequisites.md": prerequisites(lectures),
        "glossary.md": glossary(lectures),
        "papers.md": papers(lectures),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return lectures


def build(source=SOURCE, site=SITE):
    """Write the site. Returns Sphinx's status: warnings are errors."""
    write_source(source)
    shutil.rmtree(site, ignore_errors=True)
    return build_main(["-q", "-W", "--keep-going", "-E", "-d", str(source / "_doctrees"), str(source), str(site)])


def main():
    status = build()
    if not status:
        print(f"{(SITE / 'index.html').relative_to(page.ROOT).as_posix()}: written", flush=True)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except page.Missing as problem:
        sys.exit(str(problem))
