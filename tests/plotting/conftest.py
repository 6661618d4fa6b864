"""What the tests of pictures share."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest
from IPython.core.interactiveshell import InteractiveShell

from utils.plotting import figure as figure_module


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.fixture
def notebook(monkeypatch):
    """show() as it is in a notebook: what is displayed can be captured."""
    shell = InteractiveShell.instance()
    monkeypatch.setattr(figure_module, "get_ipython", lambda: shell)
    yield shell
    InteractiveShell.clear_instance()
