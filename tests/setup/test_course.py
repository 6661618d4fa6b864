"""`course.py` from the command line: what each command runs, how it ends, one clear sentence for each failure."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import course
from utils.paths import ROOT


def test_an_older_python_is_told_which_one_is_needed():
    program = "import runpy, sys; sys.version_info = (3, 10, 1, 'final', 0); runpy.run_path('course.py')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("The course needs Python 3.11 or newer") and done.stderr.count("\n") == 1


def test_a_busy_port_is_named(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        number = other.getsockname()[1]
        assert course.main(["lab", "--port", str(number)]) == 1
    assert f"Port {number} is in use" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["", "dance", "lab --port ten", "lab --port 70000", "doctor x", "lab --prot"])
def test_a_wrong_command_line_is_refused(line, capsys):
    with pytest.raises(SystemExit) as ending:
        course.main(line.split())
    assert ending.value.code == 2 and "error:" in capsys.readouterr().err


def test_ctrl_c_ends_with_one_sentence(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(course, "prepare", interrupt)
    assert course.main(["build"]) == 130
    assert capsys.readouterr().err.strip() == "Stopped. The next run carries on from here."


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_end_ends_the_command_and_what_it_started(tmp_path, number):
    grandchild = "import pathlib, os, time; pathlib.Path('up').write_text(str(os.getpid())); time.sleep(60)"
    child = (
        "import pathlib, signal, subprocess, sys\n"
        f"inner = subprocess.Popen([sys.executable, '-c', {grandchild!r}])\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n"
        "print('up', flush=True)\ntry:\n    inner.wait()\nfinally:\n    inner.kill(); inner.wait()"
    )
    parent = (
        "import signal, sys\nfor n in (signal.SIGTERM, signal.SIGHUP): signal.signal(n, signal.SIG_DFL)\n"
        f"from utils.setup import environment\nenvironment.run([sys.executable, '-c', {child!r}])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], cwd=tmp_path, env=dict(os.environ, PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"up\n"
    while not (tmp_path / "up").exists() or not (tmp_path / "up").read_text():
        time.sleep(0.05)
    process.send_signal(number)  # to this process alone, as `kill` and a container do
    assert process.wait(timeout=300) == 128 + number
    assert not is_running(int((tmp_path / "up").read_text()))
    assert process.stdout.read() == b""  # nobody holds the other end any more


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
@pytest.mark.usefixtures("ctrl_c")
def test_on_ctrl_c_the_command_may_tidy_up(tmp_path):
    child = (
        "import pathlib, sys, time\ntry:\n    print('up', flush=True); time.sleep(600)\nfinally:\n"
        "    time.sleep(1); pathlib.Path('tidied').touch()"
    )
    parent = f"import sys\nfrom utils.setup import environment\nenvironment.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", parent],
        cwd=tmp_path,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout.readline() == b"up\n"
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=300)
    assert (tmp_path / "tidied").exists()


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def commands(monkeypatch):
    """What the commands would run, in order: (command as strings, keyword arguments); none is run."""
    ran = []

    def run(command, **options):
        ran.append(([str(part) for part in command], options))
        return 0

    monkeypatch.setattr(course, "run", run)
    monkeypatch.setattr(course, "ask", lambda command: (run(command), ""))
    monkeypatch.setattr(course, "prepare", lambda *names: Path("python", *names))
    return ran


def test_test_runs_pytest_on_every_core_with_the_arguments_given(commands):
    assert course.main(["test", "tests/test_course.py", "-k", "port"]) == 0
    [(command, options)] = commands
    assert command[0] == str(Path("python", "requirements-dev.txt"))
    assert command[1:3] == ["-m", "pytest"] and command[-3:] == ["tests/test_course.py", "-k", "port"]
    assert command[command.index("--dist") + 1] == "loadscope" and "--nbval" in command
    assert options["env"]["OMP_NUM_THREADS"] == "1" and options["env"]["TQDM_DISABLE"] == "1"


def test_build_passes_its_arguments_on(commands):
    assert course.main(["build", "01", "--force"]) == 0
    assert commands[0][0] == ["python", "-m", "utils.authoring.build", "01", "--force"]


@pytest.fixture
def lectures(tmp_path, monkeypatch):
    """A course folder with one lecture."""
    monkeypatch.setattr(course, "ROOT", tmp_path)
    (tmp_path / "lectures").mkdir()
    (tmp_path / "lectures" / "01_topic.ipynb").write_text('{"cells": []}')
    return tmp_path


def test_lab_signs_the_copies_that_it_made_and_opens_the_workbook(commands, lectures):
    assert course.main(["lab", "--no-browser"]) == 0
    (sign, _), (lab, options) = commands
    assert sign[1:3] == ["-m", "nbformat.sign"] and sign[-1] == str(lectures / "workbook" / "01_topic.ipynb")
    assert "--no-browser" in lab and f"--ServerApp.root_dir={lectures / 'workbook'}" in lab
    assert options["env"]["JUPYTERLAB_WORKSPACES_DIR"].startswith(str(lectures))
    assert options["env"]["PYTHONPATH"].split(os.pathsep)[0] == str(lectures)


def test_a_workbook_that_is_a_file_ends_lab_with_a_sentence(commands, lectures, capsys):
    (lectures / "workbook").write_text("mine")
    assert course.main(["lab"]) == 1
    assert "is not a folder" in capsys.readouterr().err and commands == []


def test_lab_computes_on_one_thread_unless_the_learner_decided_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert course.lab_environment(ROOT)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert course.lab_environment(ROOT)["OMP_NUM_THREADS"] == "4"


def test_lab_signs_nothing_when_nothing_is_new(commands, lectures):
    course.main(["lab"])
    commands.clear()
    course.main(["lab"])
    assert len(commands) == 1 and "jupyterlab" in commands[0][0]


def test_bench_runs_every_benchmark_and_each_is_there(commands):
    assert course.main(["bench"]) == 0
    assert [command[0][-1] for command in commands] == list(course.BENCHMARKS)
    for name in course.BENCHMARKS:
        assert (ROOT / name.replace(".", "/")).with_suffix(".py").exists()


def test_help_names_every_command_and_says_where_torch_comes_from(capsys):
    with pytest.raises(SystemExit):
        course.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"    {command} " in text for command in ("lab", "test", "build", "bench", "doctor"))
    assert "CPU index" in text
