"""What the tests of the build share."""

import pytest

from tests.authoring.courses import SAMPLE, new_course
from utils.authoring import build
from utils.paths import ROOT


@pytest.fixture(autouse=True)
def utils_in_reach_of_kernels(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture(scope="session")
def course(tmp_path_factory):
    """The sample lecture, built. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("course")
    new_course(folder, SAMPLE.read_text(encoding="utf-8"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        assert build.main([], root=folder) == 0
    return folder
