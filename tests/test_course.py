"""`course.py` and the environment it makes: first use, interruption, damage, one clear sentence for each failure."""

import os
import re
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import course
from utils import doctor, environment

ROOT = Path(__file__).parent.parent


def make_wheel(folder, version):
    """Write the smallest installable package, `tiny`, which says its version."""
    info = f"tiny-{version}.dist-info"
    with zipfile.ZipFile(folder / f"tiny-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny.py", f"version = '{version}'\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


class TinyCourse:
    """A course whose only requirement is `tiny`, installed from a folder beside it."""

    def __init__(self, root):
        self.root, self.home = root, root / ".venv"
        self.require("1.0")
        for version in ("1.0", "2.0"):
            make_wheel(root, version)
        (root / "requirements-dev.txt").write_text("-r requirements.txt\n-c constraints.txt\n")
        (root / "constraints.txt").write_text("# none\n")

    def require(self, version):
        where = self.root.as_posix()
        (self.root / "requirements.txt").write_text(f"--no-index\n--find-links {where}\ntiny=={version}\n")

    def prepare(self, requirements="requirements.txt"):
        return environment.prepare(requirements, self.root)

    def installed(self):
        python = environment.python_in(self.home)
        return environment.ask([python, "-c", "import tiny; print(tiny.version)"])[1].strip()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A fresh tiny course, with no environment yet; nothing looks for the network."""
    monkeypatch.setattr(environment, "wants_cpu_torch", lambda: False)
    monkeypatch.delenv("CONDA_DEFAULT_ENV", raising=False)
    return TinyCourse(tmp_path)


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A tiny course that has been installed once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "wants_cpu_torch", lambda: False)
        made = TinyCourse(tmp_path_factory.mktemp("ready"))
        made.prepare()
    return made


@pytest.fixture
def no_pip(monkeypatch):
    """Make every installation fail the test."""
    monkeypatch.setattr(environment, "pip_install", lambda *_: pytest.fail("pip was run"))


# --- the environment -------------------------------------------------------------------------------------------------


def test_first_use_installs_and_the_second_runs_no_pip(ready, no_pip):
    assert ready.installed() == "1.0"
    assert ready.prepare() == environment.python_in(ready.home)


def test_changed_requirements_are_installed_again(tiny):
    tiny.prepare()
    tiny.require("2.0")
    tiny.prepare()
    assert tiny.installed() == "2.0"


def test_changed_constraints_count_as_changed_requirements(tiny):
    before = environment.fingerprints(tiny.root / "requirements-dev.txt")
    (tiny.root / "constraints.txt").write_text("tiny<3\n")
    after = environment.fingerprints(tiny.root / "requirements-dev.txt")
    assert before["requirements-dev.txt"] != after["requirements-dev.txt"]


def test_installing_for_the_tests_installs_for_the_lab_too(tiny, monkeypatch):
    tiny.prepare("requirements-dev.txt")
    monkeypatch.setattr(environment, "pip_install", lambda *_: pytest.fail("pip was run"))
    tiny.prepare("requirements.txt")


def test_an_interrupted_installation_is_finished_by_the_next_run(tiny, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(environment, "pip_install", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tiny.prepare()
    assert not environment.is_installed(tiny.home, tiny.root / "requirements.txt")
    tiny.prepare()
    assert tiny.installed() == "1.0"


def test_an_unfinished_environment_is_made_again(tiny, capsys):
    tiny.home.mkdir()
    (tiny.home / "leftover").touch()
    tiny.prepare()
    assert "made again" in capsys.readouterr().out
    assert tiny.installed() == "1.0" and not (tiny.home / "leftover").exists()


def test_an_environment_whose_python_is_gone_is_made_again(tiny, capsys):
    tiny.prepare()
    environment.python_in(tiny.home).unlink()
    tiny.prepare()
    assert "made again" in capsys.readouterr().out
    assert tiny.installed() == "1.0"


@pytest.mark.parametrize("damage", ["", "nonsense", "[]", "5"])
def test_a_damaged_stamp_means_not_installed(tmp_path, damage):
    (tmp_path / environment.STAMP).write_text(damage)
    assert environment.read_stamp(tmp_path) == {}


def test_the_courses_conda_environment_is_used_instead_of_a_venv(monkeypatch, tmp_path):
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path))
    monkeypatch.setenv("CONDA_DEFAULT_ENV", "base")
    assert environment.environment_home(ROOT) == ROOT / ".venv"
    monkeypatch.setenv("CONDA_DEFAULT_ENV", environment.CONDA_NAME)
    assert environment.environment_home(ROOT) == tmp_path


# --- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "gpu", "wanted"),
    [("linux", False, True), ("linux", True, False), ("win32", False, False), ("darwin", False, False)],
)
def test_only_linux_without_a_gpu_asks_for_the_cpu_build(monkeypatch, system, gpu, wanted):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(environment, "has_nvidia_gpu", lambda: gpu)
    assert environment.wants_cpu_torch() == wanted


@pytest.mark.parametrize("reachable", [True, False])
def test_the_cpu_index_is_asked_first_and_pip_goes_on_without_it(ready, monkeypatch, capsys, reachable):
    calls = []

    def pip_install(_python, _log, *arguments):
        calls.append(arguments)
        return reachable or environment.CPU_INDEX not in arguments

    monkeypatch.setattr(environment, "pip_install", pip_install)
    monkeypatch.setattr(environment, "wants_cpu_torch", lambda: True)
    monkeypatch.setattr(environment, "torch_pin", lambda _root: "torch==9")
    environment.install("python", ready.home, ready.root / "requirements.txt")
    assert environment.CPU_INDEX in calls[0] and calls[0][-1] == "torch==9" and "-r" in calls[1] and len(calls) == 2
    assert ("3 GB" in capsys.readouterr().out) != reachable


def test_the_pin_of_torch_is_found():
    assert re.fullmatch(r"torch==[\d.]+", environment.torch_pin(ROOT))


# --- one sentence for each failure -----------------------------------------------------------------------------------


def sentence(problem):
    """The text of a Stop, which must be one line."""
    text = str(problem.value)
    assert "\n" not in text and len(text) < 400
    return text


@pytest.mark.parametrize(
    ("line", "expected"),
    [("--index-url http://127.0.0.1:9/simple", "check the network"), ("--no-index", "no-such-package==1.0")],
)
def test_what_pip_cannot_get_is_named(ready, tmp_path, monkeypatch, line, expected):
    monkeypatch.setattr(environment, "wants_cpu_torch", lambda: False)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    wanted = tmp_path / "wanted.txt"
    wanted.write_text(f"{line}\nno-such-package==1.0\n")
    with pytest.raises(environment.Stop) as problem:
        environment.install(environment.python_in(ready.home), ready.home, wanted)
    assert expected in sentence(problem)
    assert not environment.is_installed(ready.home, wanted)


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: [Errno 13] Permission denied: '/x'", "not allowed to write"),
        ("Retrying after NewConnectionError(...)\nERROR: No matching distribution found for x", "check the network"),
        ("ERROR: No matching distribution found for torch==2.13.0", "64-bit Python 3.11"),
        ("ERROR: something else", "something else"),
        ("", "no reason given"),
    ],
)
def test_pips_failures_are_told_apart(log, expected):
    text = environment.explain_pip(log, Path("pip.log"))
    assert expected in text and "\n" not in text


def test_a_full_disk_is_seen_before_anything_is_downloaded(tiny, monkeypatch, no_pip):
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5e8}))
    with pytest.raises(environment.Stop) as problem:
        environment.install("python", tiny.home, tiny.root / "requirements.txt")
    assert "0.5 GB" in sentence(problem)


def test_a_read_only_folder_is_named(tiny, monkeypatch):
    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(environment.tempfile, "TemporaryFile", refuse)
    with pytest.raises(environment.Stop) as problem:
        tiny.prepare()
    assert str(tiny.root) in sentence(problem) and "Read-only" in sentence(problem)


def test_a_python_without_venv_is_told_what_to_install(tiny, monkeypatch):
    monkeypatch.setattr(environment, "ask", lambda *_, **__: (1, "... ensurepip is not\navailable ..."))
    with pytest.raises(environment.Stop) as problem:
        tiny.prepare()
    assert "python3-venv" in sentence(problem)


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


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_on_ctrl_c_the_command_may_tidy_up(tmp_path):
    child = "import pathlib, sys, time\ntry:\n    print('up', flush=True); time.sleep(60)\nfinally:\n" \
            "    time.sleep(1); pathlib.Path('tidied').touch()"
    parent = f"import sys\nfrom utils import environment\nenvironment.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path, start_new_session=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)},
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == b"up\n"
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=20)
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
    assert command[command.index("--dist") + 1] == "loadfile" and "--nbval" in command
    assert options["env"]["OMP_NUM_THREADS"] == "1" and options["env"]["TQDM_DISABLE"] == "1"


def test_build_passes_its_arguments_on(commands):
    assert course.main(["build", "01", "--force"]) == 0
    assert commands[0][0] == ["python", "-m", "utils.build", "01", "--force"]


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
    assert "--no-browser" in lab and f"--ServerApp.root_dir={lectures}" in lab
    assert "--LabApp.default_url=/lab/tree/workbook" in lab
    assert options["env"]["JUPYTERLAB_WORKSPACES_DIR"].startswith(str(lectures))


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


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_has_one_line_for_each_subject(capsys):
    status = doctor.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:4].strip() in (doctor.OK, doctor.NOTE, doctor.BAD) for line in lines] == [True] * len(doctor.FINDERS)
    assert status == int(any(line.startswith(doctor.BAD) for line in lines))


def test_doctor_says_what_a_missing_installation_needs(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "environment_home", lambda: tmp_path / ".venv")
    finding = doctor.find_packages()
    assert finding.state == doctor.BAD and "course.py lab" in finding.text


def test_doctor_names_a_package_in_another_version(monkeypatch):
    pins = dict(doctor.pins("requirements.txt"))
    monkeypatch.setattr(doctor, "is_installed", lambda *_: True)
    monkeypatch.setattr(doctor, "installed_version", lambda name: "0" if name == "numpy" else pins[name])
    finding = doctor.find_packages()
    assert finding.state == doctor.BAD and "numpy" in finding.text and "torch" not in finding.text


def test_doctor_accepts_the_cpu_build_of_torch_as_pinned(monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda _: "2.13.0+cpu")
    assert doctor.installed_version("torch") == "2.13.0"
    assert doctor.installed_version("torch", local=True) == "2.13.0+cpu"


def test_doctor_says_how_to_get_a_compiler(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: None)
    finding = doctor.find_compiler()
    assert finding.state == doctor.NOTE and "ziglang" in finding.text


def test_doctor_says_when_a_gpu_stays_idle(monkeypatch):
    monkeypatch.setattr(doctor, "ask", lambda *_, **__: (0, "CPU False\n"))
    monkeypatch.setattr(doctor, "has_nvidia_gpu", lambda: True)
    finding = doctor.find_torch()
    assert finding.state == doctor.NOTE and "CPU build" in finding.text
