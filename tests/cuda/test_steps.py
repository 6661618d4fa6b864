"""A block step by step: the trace is what happened, and the view plays it in a browser, by mouse and by keyboard."""

import html
import json
import re
import shutil

import numpy as np
import pytest

from tests.cuda.cases import CASES
from tests.cuda.compilers import compiler  # noqa: F401
from utils import cuda
from utils.cuda.steps import BARRIER

SWAP = """__global__ void swap(const float* x, float* y) {
  __shared__ float s[2][32];
  int i = threadIdx.x;
  s[i / 32][i % 32] = 2.f * x[i];
  __syncthreads();
  if (i < 5) s[0][i] += 1.f;
  __syncthreads();
  y[i] = s[1 - i / 32][31 - i % 32];
}"""


def steps_of(source, *arguments, block=64, **how):
    return cuda.compile(source, **how).steps[1, block](*arguments)


@pytest.fixture(scope="module")
def swap():
    return steps_of(SWAP, np.arange(64, dtype=np.float32), np.zeros(64, np.float32))


def test_the_steps_are_what_the_warps_did(compiler):  # noqa: F811
    steps = steps_of(SWAP, np.arange(64, dtype=np.float32), np.zeros(64, np.float32))
    assert [array.name for array in steps.arrays.values()] == ["s", "x", "y"]
    assert [array.columns for array in steps.arrays.values()] == [32, 0, 0]
    told = [(s.line, s.kind, s.array, s.threads, s.cells) for s in steps.steps]
    low, high = list(range(32)), list(range(32, 64))
    assert told == [
        (4, 0, 1, low, low), (4, 1, 0, low, low), (4, 0, 1, high, high), (4, 1, 0, high, high), (5, BARRIER, 0, [], []),
        (6, 0, 0, low[:5], low[:5]), (6, 1, 0, low[:5], low[:5]), (7, BARRIER, 0, [], []),
        (8, 0, 0, low, high[::-1]), (8, 1, 2, low, low), (8, 0, 0, high, low[::-1]), (8, 1, 2, high, high),
    ]  # fmt: skip
    assert steps.steps[3].values == [2 * i for i in high] and steps.steps[6].values == [2 * i + 1 for i in range(5)]


def stands_at_the_end(steps, name):
    """What the steps say stands in a shared array at the end."""
    number = [array.name for array in steps.arrays.values()].index(name)
    cells = {}
    for step in steps.steps:
        if step.array == number and step.values:
            cells |= {
                cell + j: step.values[n * step.width + j]
                for n, cell in enumerate(step.cells)
                for j in range(step.width)
            }
    return cells


@pytest.mark.parametrize(
    "type_, value, expected",
    [
        ("float", "0.1f * i", lambda i: float(f"{np.float32(0.1) * np.float32(i):.4g}")),
        ("int", "-3 * i", lambda i: -3 * i),
        ("unsigned char", "200 + i", lambda i: 200 + i),
        ("half", "__float2half(i * 0.5f)", lambda i: i * 0.5),
        ("nv_bfloat16", "__float2bfloat16(i)", lambda i: i),
        ("double", "i / 4.0", lambda i: i / 4),
    ],
)
def test_values_are_shown_as_their_type(type_, value, expected):
    source = f"""__global__ void k(int* y) {{
  __shared__ {type_} s[32];
  int i = threadIdx.x;
  s[i] = {value};
  __syncthreads();
  y[i] = s[31 - i] != s[i];
}}"""
    steps = steps_of(source, np.zeros(32, np.int32), block=32)
    assert stands_at_the_end(steps, "s") == {i: expected(i) for i in range(32)}


def test_vectors_atomics_and_copies_that_land():
    source = """__global__ void k(const float* x, float* y) {
  __shared__ float4 s[8];
  __shared__ int n;
  int i = threadIdx.x;
  __pipeline_memcpy_async(&s[i], (const float4*)x + i, 16);
  __pipeline_commit();
  if (i == 0) n = 5;
  __pipeline_wait_prior(0);
  __syncthreads();
  atomicAdd(&n, i);
  y[i] = s[7 - i].x;
}"""
    steps = steps_of(source, np.arange(32, dtype=np.float32), np.zeros(8, np.float32), block=8)
    assert stands_at_the_end(steps, "n") == {0: 5 + 28}
    assert any(step.kind == 4 for step in steps.steps)


def test_dynamic_memory_and_warps_that_diverge_are_told_in_each_threads_order():
    source = """__global__ void k(float* y) {
  extern __shared__ float s[];
  for (int j = 0; j <= threadIdx.x; ++j) s[threadIdx.x * 8 + j] = j + 1;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x * 8 + threadIdx.x];
}"""
    y = np.zeros(8, np.float32)
    steps = cuda.compile(source).steps[1, 8, 256](y)
    assert y.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    cells = stands_at_the_end(steps, "dynamic shared memory")
    assert cells == {t * 8 + j: j + 1 for t in range(8) for j in range(t + 1)}
    assert [len(s.threads) for s in steps.steps if s.line == 3] == [8, 7, 6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("name", CASES)
def test_the_view_is_small_repeats_and_needs_no_network(name):
    case = CASES[name]
    kernel = cuda.compile(case.source, case.name, case.template)
    first, second = (case.launch(kernel.steps)[0] for _ in range(2))
    page = first._repr_html_()
    assert page == second._repr_html_() and len(page.encode()) <= 200_000
    assert "http" not in page and page.count("<svg") == 1 and "aria-label" in page
    assert html.escape(repr(first)) in page and repr(first) == repr(second)


def test_a_long_block_is_cut_and_says_so():
    case = CASES["flash"]
    steps, _, _ = case.launch(cuda.compile(case.source, case.name, case.template).steps)
    shown = json.loads(re.search(r"\((\{\"source\".*\})\)</script>", steps._repr_html_(), re.DOTALL)[1])
    assert shown["cut"] and 500 < len(shown["steps"]) < len(steps.steps)
    assert f"The view plays the first {len(shown['steps']):,}." in steps._repr_html_()


def test_a_kernel_that_goes_wrong_is_played_as_far_as_it_came():
    source = SWAP.replace("y[i] = s", "y[i + 40] = s")
    steps = steps_of(source, np.arange(64, dtype=np.float32), np.zeros(64, np.float32))
    assert not steps.report.ok and len(steps.steps) >= 8


def test_what_touches_no_memory_has_its_report_instead():
    steps = steps_of("__global__ void k() {}", block=32)
    assert steps.steps == [] and "no problem found" in steps._repr_html_()


# ---- in a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright, a development extra, is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as driver:
        instance = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield instance
        instance.close()


@pytest.fixture
def page(browser):
    """A page of 1,000 pixels whose requests and errors are collected; both must be empty at the end."""
    page, wrong = browser.new_page(viewport={"width": 1000, "height": 800}), []
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("file:") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    yield page
    page.close()
    assert wrong == []


def opened(page, tmp_path, html):
    path = tmp_path / "page.html"
    path.write_text(f'<!doctype html><meta charset="utf-8"><body style="margin:0">{html}</body>', encoding="utf-8")
    page.goto(path.as_uri())


def test_in_a_browser_keys_and_buttons_walk_through_the_block(page, tmp_path, swap):
    opened(page, tmp_path, swap._repr_html_())
    said, view = page.locator("[data-cuda-steps] p"), page.locator("[data-cuda-steps]")
    assert said.inner_text() == "Step 1 of 12: threads 0 to 31 of warp 0 load from x[0 to 31], line 4."
    view.focus()
    page.keyboard.press("ArrowRight")
    assert said.inner_text() == "Step 2 of 12: threads 0 to 31 of warp 0 store to s[0 to 31], line 4."
    assert page.locator("li.now").inner_text().strip().startswith("s[i / 32][i % 32] = 2.f")
    page.keyboard.press("b")
    assert said.inner_text() == "Step 5 of 12: all threads have reached the barrier in line 5 and go on."
    page.keyboard.press("End")
    assert said.inner_text().startswith("Step 12 of 12: threads 32 to 63 of warp 1 store to y[32 to 63]")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Home")
    assert said.inner_text().startswith("Step 1 of 12")
    page.get_by_role("button", name="step on").click()
    page.get_by_role("button", name="on to the next barrier").click()
    assert said.inner_text().startswith("Step 5 of 12")
    page.get_by_role("slider").focus()
    page.keyboard.press("ArrowRight")
    assert said.inner_text().startswith("Step 6 of 12: threads 0 to 4 of warp 0 load from s[0 to 4]")


def test_in_a_browser_memory_is_drawn_as_it_stands(page, tmp_path, swap):
    opened(page, tmp_path, swap._repr_html_())
    picture = "document.querySelector('canvas').toDataURL()"
    page.locator("[data-cuda-steps]").focus()
    seen = [page.evaluate(picture)]
    for _ in range(3):
        page.keyboard.press("ArrowRight")
        seen.append(page.evaluate(picture))
    assert seen[0] != seen[1] != seen[2] != seen[3]
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    assert page.evaluate(picture) == seen[0]


def test_in_a_browser_the_view_fits_and_stands_twice_on_a_page(page, tmp_path):
    case = CASES["matmul"]
    steps, _, _ = case.launch(cuda.compile(case.source, case.name, case.template).steps)
    opened(page, tmp_path, steps._repr_html_() * 2)
    assert page.locator("[data-cuda-steps] canvas").count() == 4
    assert page.evaluate("document.documentElement.scrollWidth") <= 1000


@pytest.mark.parametrize("name", ["flash", "matmul", "softmax"])
def test_in_a_browser_a_report_fits_into_a_thousand_pixels(page, tmp_path, name):
    case = CASES[name]
    report, _, _ = case.launch(cuda.compile(case.source, case.name, case.template).check)
    opened(page, tmp_path, report._repr_html_())
    assert page.evaluate("Math.max(...[...document.querySelectorAll('div')].map(d => d.scrollWidth))") <= 1000


def test_in_a_browser_a_hostile_source_leaves_the_rest_of_the_page(page, tmp_path):
    source = "// </script><!-- <b>\n" + SWAP
    steps = steps_of(source, np.arange(64, dtype=np.float32), np.zeros(64, np.float32))
    opened(page, tmp_path, steps._repr_html_() + "<p id='after'>still here</p>")
    assert page.inner_text("#after") == "still here" and page.locator("canvas").count() == 1
