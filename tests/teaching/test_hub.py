"""A class on a JupyterHub: its own configuration, three simulated learners at once, and what parts them."""

import asyncio
import json
import re
import subprocess
from urllib.parse import urlsplit

import pytest
from tornado.httpclient import HTTPClientError

from tests.teaching import browser, classroom, learners
from tests.teaching.submissions import SOLVED
from utils.judge import walls
from utils.paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not walls.keep_out(ROOT), reason="this system has no Landlock"),
]
PATIENCE = 1000 * learners.PATIENCE  # milliseconds
NAMES = ("ada", "ben", "eve")
MOST_MEMORY = 10**9  # bytes for a learner who has run the first cell and a check
TRY = """
def works(action):
    try:
        action()
        return True
    except OSError:
        return False
import os, pathlib, signal
print([works(action) for action in (
    lambda: open({theirs!r}).read(), lambda: os.listdir({home!r}), lambda: open({theirs!r}, "w"),
    lambda: open("/proc/{pid}/environ", "rb").read(), lambda: os.kill({pid}, 0), lambda: open({book!r}).read(),
    lambda: open({course!r}, "a"), lambda: open("mine.txt", "w").write("mine"), lambda: open({lecture!r}).read())])
"""
CAN = [False] * 7 + [True, True]  # write a file of one's own, read the course


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What three learners saw who worked at once, as {what: {learner: ...}}."""
    hub = learners.Hub(tmp_path_factory.mktemp("hub").resolve(), classroom.python())
    try:
        return asyncio.run(_class(hub))
    finally:
        hub.stop()


async def _class(hub):
    await hub.ready()
    found = await asyncio.gather(*(hub.enter(name) for name in NAMES))
    said = await asyncio.gather(*(_exercise(learner, learner.name != "eve") for learner in found))
    after = [*found[1:], found[0]]
    tried = await asyncio.gather(*(_reach(learner, other) for learner, other in zip(found, after)))
    foreign = await asyncio.gather(*(_foreign(learner, other.name) for learner, other in zip(found, after)))
    progress = [learner.home / "workbook" / "progress.json" for learner in found]
    return {
        "said": dict(zip(NAMES, said)),
        "reach": dict(zip(NAMES, tried)),
        "foreign": dict(zip(NAMES, foreign)),
        "progress": {name: json.loads(path.read_text()) for name, path in zip(NAMES, progress)},
        "memory": {learner.name: learner.memory() for learner in found},
        "copies": {
            learner.name: sorted(p.name for p in (learner.home / "workbook").glob("*.ipynb")) for learner in found
        },
    }


async def _exercise(learner, is_right):
    """Run the lecture's first cell, then exercise 1A."""
    cells = await learner.open()
    answer = SOLVED["1A"] if is_right else "def softmax(x, axis=-1):\n    return x"
    first = await learner.run(cells[0]["source"])
    return first + await learner.run(f'{answer}\nfrom utils.check import check\nsoftmax = check("1A", softmax)')


async def _reach(learner, other):
    """Which of the attempts in TRY work in a cell."""
    theirs = str(other.home / "workbook" / learners.LECTURE)
    places = {"book": str(learner.hub.folder / "jupyterhub.sqlite"), "course": str(ROOT / "README.md")}
    lecture = str(ROOT / "lectures" / learners.LECTURE)
    return await learner.run(TRY.format(theirs=theirs, home=str(other.home), pid=other.pid, lecture=lecture, **places))


async def _foreign(learner, other):
    """What another learner's server answers."""
    try:
        await learner.ask("GET", "contents", of=other)
    except HTTPClientError as refused:
        return refused.code
    return 200


def test_each_learner_has_copies_of_all_lectures(seen):
    lectures = sorted(path.name for path in (ROOT / "lectures").glob("*.ipynb"))
    assert all(copies == lectures for copies in seen["copies"].values())


def test_each_has_an_answer_and_a_progress_of_their_own(seen):
    assert "properties hold" in seen["said"]["ada"] and "properties fail" in seen["said"]["eve"]
    assert seen["progress"] == {"ada": {"1A": "passed"}, "ben": {"1A": "passed"}, "eve": {"1A": "tried"}}


@pytest.mark.parametrize("name", NAMES)
def test_nobody_reaches_another_s_files_processes_or_the_hub_s_and_the_course_is_read_only(seen, name):
    assert json.loads(seen["reach"][name].strip().lower()) == CAN


@pytest.mark.parametrize("name", NAMES)
def test_nobody_is_let_into_another_s_server(seen, name):
    assert seen["foreign"][name] in (403, 404)


def test_a_learner_s_memory_is_bounded(seen):
    assert max(seen["memory"].values()) < MOST_MEMORY


def test_the_hub_is_refused_in_a_folder_that_learners_can_read():
    command = [classroom.python(), "-m", "jupyterhub", "-f", str(learners.CONFIG)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0 and "start it in a folder outside the course" in done.stderr


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium (Debian: apt install chromium)")
def test_in_a_browser_a_learner_logs_in_opens_the_lecture_and_runs_a_cell(tmp_path):
    hub = learners.Hub(tmp_path.resolve(), classroom.python())
    try:
        asyncio.run(hub.ready())
        with browser.opened_at(f"{hub.url}/hub/login", 1280, 800) as page:
            page.fill("#username_input", "ada")
            page.fill("#password_input", "anything: this login is the test's")
            page.click("#login_submit")
            page.locator(f".jp-DirListing-item[title*='{learners.LECTURE}']").dblclick(timeout=PATIENCE)
            notebook = page.locator(".jp-NotebookPanel")
            notebook.locator(".jp-CodeCell .cm-content").first.click(timeout=PATIENCE)
            page.keyboard.press("Shift+Enter")
            prompt = notebook.locator(".jp-CodeCell .jp-InputPrompt").first
            prompt.filter(has_text=re.compile(r"\[\d+\]")).wait_for(timeout=PATIENCE)
            assert urlsplit(page.url).path.startswith("/user/ada/lab")
            assert not notebook.locator("[data-mime-type='application/vnd.jupyter.error']").count()
    finally:
        hub.stop()
    assert sorted(path.name for path in (tmp_path / "homes").iterdir()) == ["ada"]
