"""What must hold for every committed notebook, without running it: it is what its source makes, complete and clean."""

import re

import nbformat
import pytest

from utils.authoring import build
from utils.authoring import module as lecture_module
from utils.authoring import outputs as notebook_outputs
from utils.authoring import source as lecture_source
from utils.paths import ROOT

SOURCES = sorted((ROOT / "solutions").glob("[0-9][0-9]_*.py"))
NOTEBOOKS = [ROOT / folder / f"{source.stem}.ipynb" for source in SOURCES for folder in ("lectures", "solutions")]
PRIVATE_PATH = re.compile(r"(?:/home/|/Users/|/root/|/tmp/|/var/folders/|[A-Z]:\\+Users|site-packages)[^\s\"']*")
MOST_LINES = 52  # of a cell; whole kernels reach it: 50 lines, as in the gates, between their quotes
MOST_UNCOMPARED = 5
MOST_BYTES = 1_500_000

every_lecture = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.stem}")


def read(path):
    assert path.exists(), f"{path.name} is missing: run `python course.py build {path.name[:2]}`"
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def outputs(path):
    return [output for cell in code_cells(path) for output in cell.outputs]


def test_there_is_a_lecture_and_nothing_that_has_no_source():
    assert SOURCES
    built = {path for folder in ("lectures", "solutions") for path in (ROOT / folder).glob("*.ipynb")}
    assert built <= set(NOTEBOOKS)
    modules = {name for source in SOURCES for name in lecture_module.texts(lecture_source.read(source))}
    there = {path.relative_to(ROOT / "attention").as_posix() for path in (ROOT / "attention").rglob("*.py")}
    assert there == modules | {"__init__.py", "experiments/__init__.py"}


@every_lecture
def test_notebooks_hold_the_cells_that_the_source_makes(source):
    for folder, (draft, _) in lecture_source.drafts(lecture_source.read(source)).items():
        kept = read(ROOT / folder / f"{source.stem}.ipynb")
        assert build.sources(kept) == build.sources(draft), f"{folder} is out of date: run `python course.py build`"
        assert kept.metadata == draft.metadata


@every_lecture
def test_the_modules_are_what_the_source_exports(source):
    for name, text in lecture_module.texts(lecture_source.read(source)).items():
        kept = (ROOT / "attention" / name).read_text(encoding="utf-8")
        assert kept == text, f"{name} is out of date: run `python course.py build`"


def test_the_public_face_is_what_the_headers_name():
    text = lecture_module.face(map(lecture_source.read, SOURCES))
    assert (ROOT / "attention" / "__init__.py").read_text(encoding="utf-8") == text, "run `python course.py build`"


@every_lecture
def test_no_solution_survives_in_the_lecture(source):
    lecture = lecture_source.read(source)
    assert lecture.exercises
    assert lecture_source.leaks(lecture, read(ROOT / "lectures" / f"{source.stem}.ipynb")) == []
    assert "SOLUTION" not in (ROOT / "lectures" / f"{source.stem}.ipynb").read_text(encoding="utf-8")


@every_lecture
def test_every_exercise_is_open_in_the_lecture_and_solved_in_the_solution(source):
    for exercise in lecture_source.read(source).exercises:
        call = f'check("{exercise.number}"'
        for folder, verdict in (("lectures", "not attempted yet"), ("solutions", "properties hold")):
            cell = next(cell for cell in code_cells(ROOT / folder / f"{source.stem}.ipynb") if call in cell.source)
            assert verdict in "".join(output.get("text", "") for output in cell.outputs), (folder, exercise.number)


@every_lecture
def test_the_lecture_says_below_its_title_how_to_run_it_and_in_its_metadata_what_it_is_made_from(source):
    lecture = read(ROOT / "lectures" / f"{source.stem}.ipynb")
    paragraphs = lecture.cells[0].source.split("\n\n")
    assert paragraphs[0].startswith("# ") and paragraphs[1] == lecture_source.HOW_TO_RUN
    assert lecture.metadata.course.generated_from == f"solutions/{source.name}"


@every_notebook
def test_every_code_cell_has_been_executed_in_order(path):
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))


@every_notebook
def test_no_error_nothing_on_stderr_and_no_address(path):
    assert [output.ename for output in outputs(path) if output.output_type == "error"] == []
    assert [reason for reason in map(notebook_outputs.unfit, outputs(path)) if reason] == []


@every_notebook
def test_no_private_path(path):
    texts = [
        str(text)
        for output in outputs(path)
        for kind, text in [("text", output.get("text", "")), *output.get("data", {}).items()]
        if kind != "image/png"
    ]
    texts += [cell.source for cell in read(path).cells]
    assert [found[0] for text in texts for found in [PRIVATE_PATH.search(text)] if found] == []


@every_notebook
def test_every_picture_has_a_description_and_a_caption(path):
    for cell in code_cells(path):
        for index, output in enumerate(cell.outputs):
            if "image/png" in output.get("data", {}):
                description = output.metadata.get("image/png", {}).get("alt", "")
                assert len(description) > 20, cell.source
                assert output.data["text/plain"].strip("'") == description
                caption = cell.outputs[index + 1].data["text/markdown"]
                assert description.split()[0] in caption, cell.source


@every_notebook
def test_outputs_are_stored_as_the_build_cleans_them(path):
    kept = [cell.outputs for cell in code_cells(path)]
    assert kept == [notebook_outputs.clean(cell_outputs) for cell_outputs in kept]


@every_notebook
def test_cells_are_short(path):
    shown = [cell for cell in read(path).cells if cell.source and "plumbing" not in cell.metadata.get("tags", [])]
    sources = [[line for line in cell.source.splitlines() if line.strip()] for cell in shown]
    sizes = [(len(lines), lines[0]) for lines in sources]
    assert [size for size in sizes if size[0] > MOST_LINES] == []


@every_notebook
def test_few_outputs_go_uncompared(path):
    uncompared = [
        cell.source
        for cell in code_cells(path)
        if "nbval-ignore-output" in cell.metadata.get("tags", ()) or "NBVAL_" in cell.source
    ]
    assert len(uncompared) <= MOST_UNCOMPARED, uncompared


@every_notebook
def test_the_file_is_small_and_asks_for_the_kernel_that_everybody_has(path):
    assert path.stat().st_size < MOST_BYTES
    assert read(path).metadata.kernelspec.name == "python3"
