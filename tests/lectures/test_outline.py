"""Every bullet of the outline has a section in its notebook that shows something, and every neighbouring topic is named."""

import re

import nbformat
import pytest

from tests.lectures.neighbours import ROWS
from tests.lectures.outline import BULLETS, LECTURES, TOPICS
from utils.paths import ROOT

HEADING = re.compile(r"^(#{1,6}) +(.+)$", re.MULTILINE)


def named(number):
    return f"{number:02d}_{LECTURES[number]}"


def of_lecture(number):
    return {bullet: entry for bullet, entry in BULLETS.items() if int(bullet.split(".")[0]) == number}


def cells(number):
    """The cells of a lecture; skips the test, naming what is missing, while there is no such lecture."""
    path = ROOT / "lectures" / f"{named(number)}.ipynb"
    if not path.exists():
        missing = "; ".join(f"{bullet} {title}" for bullet, (title, _) in of_lecture(number).items()) or "its topics"
        pytest.skip(f"lecture {number:02d} is planned; missing: {missing}")
    return nbformat.read(path, as_version=4).cells


def sections(notebook):
    """Headings of the third level, and whether a code cell with an output stands below each: {heading: bool}."""
    found, heading = {}, None
    for cell in notebook:
        if cell.cell_type == "code":
            found[heading] = found.get(heading, False) or bool(cell.outputs)
            continue
        for level, title in HEADING.findall(cell.source):
            if len(level) <= 3:
                heading = title
                found.setdefault(heading, False)
    return found


def texts(notebook):
    """All text and code below each numbered heading of the third level, its heading included: {"2.1": text}."""
    found, number = {}, None
    for cell in notebook:
        for line in cell.source.splitlines() if cell.cell_type == "markdown" else [cell.source]:
            level, _, title = line.partition(" ") if cell.cell_type == "markdown" else ("", "", "")
            if re.fullmatch("#{1,3}", level):
                number = next(iter(re.findall(r"^\d+\.\d+(?= )", title)), None)
            if number:
                found[number] = f"{found.get(number, '')}{line}\n"
    return found


def dangling(rows, found):
    """The rows whose section is missing or does not hold their words; found: as `texts` gives it."""
    return [row for row, number, words in rows if not re.search(words, found.get(number, ""), re.IGNORECASE)]


def section_of(bullet, found):
    """The headings that begin with a bullet's number."""
    return [heading for heading in found if heading is not None and heading.startswith(f"{bullet} ")]


def test_the_outline_has_74_bullets_in_twelve_lectures():
    assert len(BULLETS) == 74
    assert {int(bullet.split(".")[0]) for bullet in BULLETS} == set(range(1, 13))
    for number in range(1, 13):
        assert [int(bullet.split(".")[1]) for bullet in of_lecture(number)] == list(
            range(1, len(of_lecture(number)) + 1)
        )


@pytest.mark.parametrize("number", range(1, 13), ids=named)
def test_each_bullet_has_one_section_that_shows_something(number):
    found = sections(cells(number))
    for bullet, (title, words) in of_lecture(number).items():
        headings = section_of(bullet, found)
        assert len(headings) == 1, f"{bullet} {title}: headings {headings}"
        assert re.search(words, headings[0], re.IGNORECASE), f"{bullet} {title}: the heading is {headings[0]!r}"
        assert found[headings[0]], f"{bullet} {title}: no cell of its section has an output"


@pytest.mark.parametrize("number", ROWS, ids=named)
def test_each_neighbouring_row_has_a_section_that_speaks_of_it(number):
    notebook = cells(number)
    assert dangling(ROWS[number], texts(notebook)) == []
    assert any(cell.source.startswith("## Glossary") or "\n## Glossary" in cell.source for cell in notebook)


@pytest.mark.parametrize("number", TOPICS, ids=named)
def test_each_neighbouring_topic_can_be_found(number):
    text = "\n".join(cell.source for cell in cells(number))
    missing = [topic for topic in TOPICS[number] if not re.search(topic, text, re.IGNORECASE)]
    assert not missing


def test_a_missing_an_empty_and_a_misnamed_section_are_noticed():
    def notebook(*sources):
        return [
            nbformat.v4.new_markdown_cell(sources[0]),
            *(nbformat.v4.new_code_cell(s, outputs=o) for s, o in sources[1:]),
        ]

    shown = [nbformat.v4.new_output("stream", text="1")]
    full, empty = (
        sections(notebook("### 2.1 One head", ("1", shown))),
        sections(notebook("### 2.1 One head", ("1", []))),
    )
    assert full["2.1 One head"] and not empty["2.1 One head"]
    assert section_of("2.1", full) == ["2.1 One head"] and section_of("2.2", full) == [] and section_of("2", full) == []


def test_a_row_that_points_nowhere_is_noticed():
    notebook = [
        nbformat.v4.new_markdown_cell("### 2.1 One head\n\nIt **copies**."),
        nbformat.v4.new_code_cell("copied = 1"),
        nbformat.v4.new_markdown_cell("## Glossary\n\nscore"),
    ]
    found = texts(notebook)
    assert list(found) == ["2.1"] and "copied = 1" in found["2.1"] and "score" not in found["2.1"]
    rows = [("there", "2.1", "copies"), ("no section", "2.2", "copies"), ("elsewhere", "2.1", "score")]
    assert dangling(rows, found) == ["no section", "elsewhere"]
