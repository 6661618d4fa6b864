"""Lectures in a real browser: JupyterLab, started as `course.py lab` starts it, opens a copy and runs every cell.

Screenshots go to build/screenshots/. Needs Chromium (Debian: apt install chromium); skipped without it.
By default only lecture 01 is opened, because nbval runs the others; COURSE_BROWSER=all opens every lecture.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections import namedtuple
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest
from playwright.sync_api import sync_playwright

import course
from utils.authoring import source as lecture_source
from utils.paths import ROOT
from utils.setup import doctor

SCREENSHOTS = ROOT / "build" / "screenshots"
LECTURES = [path.stem for path in sorted((ROOT / "lectures").glob("*.ipynb"))]
OPENED = LECTURES if os.environ.get("COURSE_BROWSER") == "all" else LECTURES[:1]
CHROMIUM = next(filter(None, map(shutil.which, doctor.CHROMIUMS)), None)
CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
]
HERE = ("127.0.0.1", "localhost")
START, RUN = 120_000, 600_000  # milliseconds: for JupyterLab and its kernel to be ready, for all cells to have run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: apt install chromium)"),
]

Visit = namedtuple("Visit", "cells errors images broken_images outside script_errors")

SCRIPT = "<p id='view'></p><script>document.getElementById('view').textContent = 'alive';</script>"
GOOD = [
    "print('hello')",
    "import matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()",
    "import utils.check",
    f"from IPython.display import HTML\nHTML({SCRIPT!r})",
]
FIGURE = [
    "from utils import plotting\nplotting.curves({'a': [1, 2]}, title='T')\nplotting.show('A line that rises: 2 * 2.')"
]
BAD = ["from IPython.display import HTML\nHTML('<img src=\"https://example.invalid/figure.png\">')", "1 / 0", "2"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the course with two notebooks of the test's own, and the workbook that a learner would get."""
    root = tmp_path_factory.mktemp("course")
    for folder in ("attention", "data", "lectures", "utils"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    write_notebook(root / "lectures" / "good.ipynb", GOOD)
    write_notebook(root / "lectures" / "bad.ipynb", BAD)
    write_folded(root / "lectures" / "folded.ipynb")
    write_notebook(root / "lectures" / "figure.ipynb", FIGURE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(course, "ROOT", root)
        patch.setenv("JUPYTER_DATA_DIR", str(root / "jupyter_data_dir"))
        course.update_workbook(sys.executable)
    (root / "workbook" / "text.py").write_text("# %% [markdown]\n# # A title\n\n# %%\nprint(1)\n")
    return root


def write_notebook(path, sources):
    """Write a notebook that puts the course on its path, as a lecture does."""
    cells = [nbformat.v4.new_code_cell(source) for source in ["import sys; sys.path.insert(0, '..')", *sources]]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": spec}), path)


def write_folded(path):
    """Write a notebook with a section that is not read first and one that is plumbing, as the build makes them."""
    cells = [
        lecture_source.Cell("markdown", "# Title", 1),
        lecture_source.Cell("code", "x = 1", 1),
        lecture_source.Cell("markdown", "## Going further", 1),
        lecture_source.Cell("markdown", "### A section", 1),
        lecture_source.Cell("code", "x = x + 1", 1),
        lecture_source.Cell("markdown", "## Behind the scenes", 1),
        lecture_source.Cell("code", "print(x + 40)", 1, ("plumbing",)),
        lecture_source.Cell("markdown", "## Glossary", 1),
        lecture_source.Cell("code", "print(x + 1)", 1),
    ]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(lecture_source.notebook(cells, {"kernelspec": spec}), path)


@pytest.fixture(scope="module")
def address(project):
    """JupyterLab serving the project, with settings, signatures and open tabs of the test's own."""
    settings = project / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    keep_all_cells = {"windowingMode": "none"}  # otherwise cells off the screen are not in the page
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps(keep_all_cells))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*course.lab_command(sys.executable, project, port, browser=False), "--IdentityProvider.token="]
    own = ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")
    folders = {name: str(project / name.lower()) for name in own}
    env = {**course.lab_environment(project), **folders, "JUPYTERLAB_SETTINGS_DIR": str(project / "settings")}
    with (project / "server.log").open("w") as log:
        server = subprocess.Popen([str(part) for part in command], env=env, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/api/status", server, project / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=20)
        server.kill()


def wait_for(url, server, log):
    """Return once the server answers; fail with its log if it ends or takes too long."""
    deadline = time.monotonic() + START / 1000
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.3)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()}")


@pytest.fixture
def page():
    """A page in a fresh Chromium; `page.outside` and `page.script_errors` fill up with what should not happen."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.outside, page.script_errors = [], []
        page.on("request", lambda request: note_outside(request.url, page.outside))
        page.on("websocket", lambda websocket: note_outside(websocket.url, page.outside))
        page.on("pageerror", lambda error: page.script_errors.append(str(error)))
        yield page
        browser.close()


def note_outside(url, outside):
    """Remember an address that is not on this machine."""
    parts = urlsplit(url)
    if parts.scheme in ("http", "https", "ws", "wss") and parts.hostname not in HERE:
        outside.append(url)


def open_notebook(page, address, file):
    """Open a file of the workbook in a workspace of its own and wait until its notebook can be used."""
    page.goto(f"{address}/lab/workspaces/{Path(file).stem}/tree/{file}")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=START)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", timeout=START)
    page.wait_for_timeout(4000)  # the kernel is idle for a moment before its session is the notebook's


def choose(page, menu, item):
    """Choose an item of the main menu."""
    page.click(f".lm-MenuBar-itemLabel:text-is('{menu}')")
    page.click(f".lm-Menu-itemLabel:text-is('{item}')")


def run_all(page):
    """Run every cell and wait until each has its number, or one has failed; say what can be seen then.

    Cells whose source is folded away have no prompt; they have run when the kernel is idle again.
    """
    choose(page, "Edit", "Clear Outputs of All Cells")
    choose(page, "Run", "Run All Cells")
    prompts = "[...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')]"
    numbered = f"{prompts}.filter(prompt => /\\[\\d+\\]/.test(prompt.textContent)).length"
    failure = "[data-mime-type='application/vnd.jupyter.stderr'] pre:has(.ansi-red-fg)"  # no progress bar is red
    page.wait_for_function(f"{numbered} == {prompts}.length || document.querySelector(`{failure}`)", timeout=RUN)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", timeout=RUN)
    page.wait_for_timeout(1000)  # for the last figure
    images = "[...document.querySelectorAll('.jp-OutputArea-output img')]"
    return Visit(
        cells=page.evaluate(numbered),
        errors=page.locator(failure).all_inner_texts(),
        images=page.evaluate(f"{images}.length"),
        broken_images=page.evaluate(f"{images}.filter(image => !image.complete || image.naturalWidth == 0).length"),
        outside=page.outside,
        script_errors=page.script_errors,
    )


def take_screenshots(page, stem):
    """Save the window as build/screenshots/STEM-00.png and the notebook, screen after screen, as STEM-01.png, ..."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for old in SCREENSHOTS.glob(f"{stem}-*.png"):
        old.unlink()
    panel = page.locator(".jp-NotebookPanel-notebook .jp-WindowedPanel-outer")
    panel.evaluate("panel => panel.scrollTo(0, 0)")
    page.screenshot(path=SCREENSHOTS / f"{stem}-00.png")
    height, step = panel.evaluate("panel => [panel.scrollHeight, panel.clientHeight]")
    for number, top in enumerate(range(0, height, step), start=1):
        panel.evaluate("(panel, top) => panel.scrollTo(0, top)", top)
        page.wait_for_timeout(200)
        panel.screenshot(path=SCREENSHOTS / f"{stem}-{number:02}.png")


@pytest.mark.parametrize("stem", OPENED)
def test_every_cell_runs_every_figure_is_drawn_and_nothing_leaves_the_machine(page, address, stem):
    lecture = nbformat.read(ROOT / "lectures" / f"{stem}.ipynb", as_version=4)
    code = [cell for cell in lecture.cells if cell.cell_type == "code"]
    figures = [output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    open_notebook(page, address, f"{stem}.ipynb")
    visit = run_all(page)
    take_screenshots(page, stem)
    assert visit.errors == []
    shown = [cell for cell in code if not cell.metadata.get("jupyter", {}).get("source_hidden")]
    assert visit == Visit(len(shown), [], visit.images, 0, [], [])
    assert visit.images >= len(figures)


def test_a_sound_notebook_passes_and_finds_the_courses_modules(page, address):
    open_notebook(page, address, "good.ipynb")
    visit = run_all(page)
    take_screenshots(page, "good")
    assert visit == Visit(len(GOOD) + 1, [], 1, 0, [], [])


def test_an_error_a_missing_figure_and_a_request_to_the_network_are_noticed(page, address):
    open_notebook(page, address, "bad.ipynb")
    visit = run_all(page)
    assert visit.cells == len(BAD)  # the import before them, and not the cell after the error
    assert "ZeroDivisionError" in visit.errors[0]
    assert visit.broken_images == 1
    assert set(visit.outside) == {"https://example.invalid/figure.png"}


def test_views_work_once_they_were_run_and_when_the_notebook_is_opened_again(page, address):
    open_notebook(page, address, "good.ipynb")
    run_all(page)
    assert page.inner_text("#view") == "alive"
    choose(page, "File", "Save Notebook")
    page.wait_for_timeout(2000)
    page.goto("about:blank")
    open_notebook(page, address, "good.ipynb")
    assert page.inner_text("#view") == "alive"


def test_what_is_not_read_first_is_closed_on_opening_and_run_all_runs_it(page, address):
    open_notebook(page, address, "folded.ipynb")
    visible = page.locator(".jp-Notebook .jp-Cell:visible")
    headings = [text.strip().splitlines()[0] for text in visible.all_inner_texts() if text.strip()]
    assert [text for text in headings if not text.startswith("[")] == [
        "Title",
        "Going further",
        "Behind the scenes",
        "Glossary",
    ]
    take_screenshots(page, "folded")
    visit = run_all(page)
    assert visit == Visit(3, [], 0, 0, [], [])
    assert "42" in page.locator(".jp-OutputArea-output").all_text_contents()[0]
    page.locator(".jp-MarkdownCell:has-text('Behind the scenes') .jp-showHiddenCellsButton").click()
    folded = page.locator(".jp-CodeCell:has-text('42')")
    assert folded.locator(".jp-Placeholder").is_visible() and not folded.locator(".jp-InputArea-editor").is_visible()


def test_the_file_list_shows_what_is_the_learner_s_and_nothing_else(page, address, project):
    open_notebook(page, address, "good.ipynb")
    listed = page.locator(".jp-DirListing-itemText").all_inner_texts()
    assert sorted(listed) == sorted(
        path.name for path in (project / "workbook").iterdir() if not path.name.startswith(".")
    )
    assert not {"lectures", "solutions", "utils", "course.py"} & set(listed)


def test_a_figure_carries_its_caption_as_alternative_text(page, address):
    open_notebook(page, address, "figure.ipynb")
    run_all(page)
    pictures = page.locator(".jp-OutputArea-output img")
    assert [pictures.nth(i).get_attribute("alt") for i in range(pictures.count())] == ["A line that rises: 2 * 2."]
    assert page.locator(".jp-RenderedMarkdown em").last.inner_text() == "A line that rises: 2 * 2."


def test_a_text_notebook_opens_as_a_notebook(page, address):
    open_notebook(page, address, "text.py")
    assert page.locator(".jp-MarkdownCell").inner_text().strip().startswith("A title")
