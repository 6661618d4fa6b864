"""Properties of the interactive views: nothing from the network, the same bytes each time, and they work in a browser."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from utils import plotting
from utils.plotting.views import bertviz as bertviz_offline
from utils.plotting.views.bertviz import bertviz_html
from utils.plotting.views.heads import head_viewer_html

TOKENS = ["[CLS]", "the", "it", "</script><b>", "$x$"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(bertviz_offline, "carrier", None)
    yield
    plt.close("all")


def weights_of(layers=2, heads=3, n_queries=5, n_keys=5):
    scores = np.random.default_rng(0).normal(size=(layers, heads, n_queries, n_keys)) * 2
    return np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)


def unpacked(html):
    """The weights that the viewer's script will read, and the rest of what it is given."""
    spec = json.loads(re.search(r"\}\)\((\{.*\})\)</script>$", html, re.DOTALL).group(1).replace("<\\/", "</"))
    digits = spec["weights"]
    values = [int(digits[at : at + 2], 36) / 1000 for at in range(0, len(digits), 2)]
    return np.array(values).reshape(spec["shape"]), spec


def test_the_viewer_holds_every_weight_to_three_decimals():
    weights = weights_of()
    weights[0, 0, 0] = [1, 0, 0, 0, 0]
    held, spec = unpacked(head_viewer_html(torch.tensor(weights, requires_grad=True), TOKENS))
    assert np.abs(held - weights).max() <= 0.0005 + 1e-12
    assert spec["queries"] == spec["keys"] == TOKENS


def test_the_same_weights_give_the_same_viewer_and_others_another_id():
    weights = weights_of()
    first, again = head_viewer_html(weights, TOKENS), head_viewer_html(weights.copy(), TOKENS)
    assert first == again
    assert unpacked(first)[1]["id"] != unpacked(head_viewer_html(weights[:1], TOKENS))[1]["id"]


def test_six_layers_of_twelve_heads_of_fifteen_tokens_stay_below_60_kb():
    assert len(head_viewer_html(weights_of(6, 12, 15, 15), ["word"] * 15).encode()) < 60_000


def test_no_view_names_an_address_to_load_from():
    views = [
        head_viewer_html(weights_of(), TOKENS),
        *(bertviz_html(v, weights_of(), TOKENS) for v in ("head_view", "model_view")),
    ]
    for html in views:
        assert not re.search(r"<(script|link|img)[^>]*(src|href)|@import|require\.config|requirejs\(", html)


def test_a_token_cannot_end_the_script():
    assert head_viewer_html(weights_of(), TOKENS).count("</script>") == 1
    assert bertviz_html("head_view", weights_of(), TOKENS).count("</script>") == 2  # the libraries, the view


@pytest.mark.parametrize("view", ["head_view", "model_view"])
def test_bertviz_gives_the_same_bytes_twice_and_rounds_its_weights(view):
    first, again = bertviz_html(view, weights_of(), TOKENS), bertviz_html(view, weights_of(), TOKENS)
    assert first == again
    assert not re.search(r"\[0\.\d{4,}", first)


def test_the_first_bertviz_view_carries_the_libraries_and_so_does_its_repetition():
    first = bertviz_html("head_view", weights_of(), TOKENS)
    second = bertviz_html("model_view", weights_of(), TOKENS)
    assert len(first) > 300_000 > len(second)
    assert bertviz_html("head_view", weights_of(), TOKENS) == first


def test_the_vendored_libraries_are_the_files_that_their_readme_names():
    readme = (bertviz_offline.VENDOR / "README.md").read_text(encoding="utf-8")
    for name in bertviz_offline.LIBRARIES.values():
        assert hashlib.sha256((bertviz_offline.VENDOR / name).read_bytes()).hexdigest() in readme


@pytest.mark.parametrize(
    "weights, tokens, message",
    [
        (weights_of() * 2, TOKENS, "must be rows of probabilities"),
        (weights_of()[0, 0], TOKENS, "with 3 or 4 axes"),
        (weights_of(), TOKENS[:4], "tokens must have one label for each of the 5 places, got 4"),
        (weights_of(), None, "tokens must be a list of labels"),
        (weights_of(n_keys=4), TOKENS, "must have"),
    ],
)
def test_bad_input_is_refused_by_every_view(weights, tokens, message):
    for view in (lambda w, t: head_viewer_html(w, t), lambda w, t: bertviz_html("head_view", w, t)):
        with pytest.raises(ValueError, match=message):
            view(weights, tokens)


def test_too_many_weights_are_refused_with_a_way_out():
    with pytest.raises(ValueError, match="choose some layers"):
        head_viewer_html(np.full((4, 8, 100, 100), 0.01), ["a"] * 100)


def maps_of(figure):
    return sum(bool(ax.images) for ax in figure.axes)


def test_a_static_picture_stands_beside_every_view(monkeypatch):
    drawn = []
    monkeypatch.setattr(plt, "show", lambda: drawn.append((maps_of(plt.gcf()), plt.gcf().get_suptitle())))
    for view in (plotting.head_viewer, plotting.bertviz_head_view, plotting.bertviz_model_view):
        view(weights_of(), TOKENS, "Six heads.")
        with pytest.raises(ValueError, match="description"):
            view(weights_of(), TOKENS, "")
        view(weights_of(), TOKENS, "Six heads.", title="All heads look alike")
    assert drawn == [(6, "All heads: rows are queries, columns are keys"), (6, "All heads look alike")] * 3


def chromium():
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright, a development extra, is not installed")
    if chromium() is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as driver:
        instance = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        yield instance
        instance.close()


@pytest.fixture
def page(browser):
    """A page whose requests and errors are collected; both must be empty at the end."""
    page, wrong = browser.new_page(), []
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("file:") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    yield page
    page.close()
    assert wrong == []


def opened(page, tmp_path: Path, html):
    path = tmp_path / "page.html"
    path.write_text(f'<!doctype html><meta charset="utf-8"><body>{html}</body>', encoding="utf-8")
    page.goto(path.as_uri())


def test_in_a_browser_the_viewer_answers_to_mouse_and_keyboard(page, tmp_path):
    weights = np.full((2, 2, 3, 3), 0.0)
    weights[0, 0], weights[0, 1], weights[1] = np.eye(3), np.eye(3)[[1, 2, 0]], np.eye(3)[[2, 0, 1]]
    opened(page, tmp_path, head_viewer_html(weights, ["ant", "bee", "cat"]))
    said, tokens, choose = page.locator("[data-head-viewer] p"), page.locator("g.token"), page.locator("select")
    tokens.nth(1).hover()
    assert said.inner_text() == "query bee attends to bee 100.0 %"
    tokens.nth(0).focus()
    choose.nth(1).focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    assert said.inner_text() == "query ant attends to bee 100.0 %"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert said.inner_text() == "key bee is attended by ant 100.0 %"
    page.keyboard.press("Enter")
    assert page.locator("[aria-pressed=true]").count() == 1
    choose.nth(1).select_option("2")  # the mean of both heads
    assert said.inner_text() == "key bee is attended by ant 50.0 %, bee 50.0 %"


def test_in_a_browser_two_equal_viewers_are_both_drawn(page, tmp_path):
    opened(page, tmp_path, head_viewer_html(weights_of(), TOKENS) * 2)
    assert page.locator("[data-head-viewer] svg").count() == 2
    assert page.locator("g.token text").nth(3).text_content() == "</script><b>"


def test_in_a_browser_bertviz_draws_without_a_network(page, tmp_path):
    opened(page, tmp_path, "".join(bertviz_html(view, weights_of(), TOKENS) for view in ("head_view", "model_view")))
    assert page.locator("[id^=bertviz-] svg").count() == 2
    assert page.locator("[id^=bertviz-] svg line").count() > 50


def test_in_a_browser_bertviz_without_its_libraries_says_what_to_do(page, tmp_path):
    bertviz_html("head_view", weights_of(), TOKENS)  # carries them, and is not on this page
    opened(page, tmp_path, bertviz_html("model_view", weights_of(), TOKENS))
    assert "Run the whole notebook" in page.locator("[id^=bertviz-]").inner_text()


HOSTILE = ["<!--", "<script>", "c", "]]>", "</style>"]


@pytest.mark.parametrize("view", ["head_view", "model_view", "ours"])
def test_in_a_browser_hostile_tokens_leave_the_rest_of_the_page(page, tmp_path, view):
    html = head_viewer_html(weights_of(), HOSTILE) if view == "ours" else bertviz_html(view, weights_of(), HOSTILE)
    opened(page, tmp_path, html + "<p id='after'>still here</p>")
    assert page.inner_text("#after") == "still here"
    assert page.locator("svg").count() >= 1


def test_two_equal_tokens_are_told_apart_by_their_places():
    html = head_viewer_html(weights_of(), ["A", "b", "A", "c", "d"])
    assert '"queries":["A (0)","b","A (2)","c","d"]' in html


def test_in_a_browser_all_heads_of_bertviz_model_view_fit_beside_the_file_browser(page, tmp_path):
    opened(page, tmp_path, bertviz_html("model_view", weights_of(2, 12, 5, 5), TOKENS))
    page.set_viewport_size({"width": 860, "height": 800})
    right = page.evaluate(
        "Math.max(...[...document.querySelectorAll('[id^=bertviz-] svg *')].map(e => e.getBoundingClientRect().right))"
    )
    assert right < 850
