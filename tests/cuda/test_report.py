"""The report as text and as HTML: what it says, and that it says the same every time."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.cuda.cases import CASES, without_line
from utils import cuda
from utils.cuda import samples


@pytest.fixture(scope="module")
def strided():
    """A kernel with a wasteful read, a bank conflict and no mistake."""
    kernel = cuda.compile("""
__global__ void k(const float* x, float* y) {
  __shared__ float s[1024];
  for (int i = threadIdx.x; i < 1024; i += 32) s[i] = x[i];
  __syncwarp();
  y[threadIdx.x] = x[threadIdx.x * 32]
                 + s[threadIdx.x * 32];
}""")
    return kernel.check[1, 32](np.ones(1024, np.float32), np.zeros(32, np.float32))


def test_the_three_byte_counts_and_why_they_differ(strided):
    assert strided.global_loaded == 4 * (1024 + 32)
    assert strided.sectors_loaded == 128 + 32 and strided.sector_bytes_loaded == 32 * 160
    assert strided.distinct_loaded == 4096 and strided.distinct_stored == 128
    text = str(strided)
    assert re.search(r"requested by threads +4,224 +128  every load and store", text)
    assert re.search(r"moved in sectors +5,120 +128  32-byte sectors", text)
    assert re.search(r"distinct +4,096 +128  each sector once", text)
    assert text.startswith("k: no problem found\n") and "31 extra wavefronts" in text


def test_who_works_is_counted_once_for_each_thread_of_each_block():
    kernel = cuda.compile("""
__global__ void k(const float* x, float* y, int* n) {
  __shared__ float s[64];
  if (threadIdx.x < 40) s[threadIdx.x] = x[threadIdx.x] + x[0];
  __syncthreads();
  if (threadIdx.x % 2) for (int i = 0; i < 3; ++i) y[blockIdx.x * 64 + threadIdx.x] = s[i];
  if (blockIdx.x == 1 && threadIdx.x > 60) atomicAdd(n, 1);
}""")
    report = kernel.check[3, 64](np.ones(64, np.float32), np.zeros(192, np.float32), np.zeros(1, np.int32))
    assert report.workers == {
        ("x", "load"): 120,
        ("x", "store"): 0,
        ("y", "load"): 0,
        ("y", "store"): 96,
        ("n", "load"): 3,
        ("n", "store"): 3,
        ("global", "load"): 3 * 40 + 3,
        ("global", "store"): 3 * 32 + 1,
        ("shared", "load"): 96,
        ("shared", "store"): 120,
    }
    again = kernel.check[1, 64](np.ones(64, np.float32), np.zeros(192, np.float32), np.zeros(1, np.int32))
    assert again.workers["x", "load"] == 40, "each launch counts anew"


def test_the_table_shows_each_line(strided):
    rows = strided.table().splitlines()
    assert rows[0].split() == "line what array requests bytes sectors/req ideal conflicts source".split()
    assert any(re.match(r" +6 global load +x +1 +128 +32\.0 +4\.0 ", row) for row in rows), "\n".join(rows)
    assert any(re.match(r" +7 shared load +s +1 +128 +31 ", row) for row in rows), "\n".join(rows)
    assert strided.sectors_per_request[4] == 4 and strided.bank_conflicts == 31


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.lines, self.of_source = [], [], False

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        if tag == "td":
            self.of_source = "pre-wrap" in dict(attributes)["style"]
            if self.of_source:
                self.lines.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.of_source:
            self.lines[-1].append(data)


def test_the_html_shows_the_source_with_counts_and_is_well_formed(strided):
    page = strided._repr_html_()
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert strided.source.strip() in "\n".join("".join(line) for line in parser.lines)
    assert "32.0 (4.0)" in page and "<script" not in page and " id=" not in page
    assert set(re.findall(r"(?<!-)color:([^;\"]*)", page)) == {"inherit"}  # readable on light and on dark pages


def test_the_source_stands_first_and_columns_in_which_nothing_stands_are_left_out():
    kernel = cuda.compile("__global__ void k(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }")
    report = kernel.check[1, 32](np.zeros(32, np.float32), np.zeros(32, np.float32))
    titles = re.findall(r"<b>([^<]*)</b>", report._repr_html_())
    assert titles[-4:] == ["line", "source", "global bytes", "sectors (ideal)"]
    assert "conflicts" not in report.table()


def test_words_of_the_language_are_marked_and_the_source_is_whole(strided):
    page = strided._repr_html_()
    assert '<span style="font-weight:bold">float</span>' in page
    assert '<span style="font-weight:bold">__shared__</span>' in page


def test_no_line_of_the_table_is_wider_than_a_notebook_shows():
    q = np.zeros((1, 64, 32), np.float32)
    report = cuda.compile(samples.FLASH, template=(32,)).check[1, 128, samples.flash_shared_bytes(32)](
        q, q, q, q.copy(), 64, 1.0
    )
    assert max(map(len, report.table().splitlines())) == 95


def test_the_html_puts_a_problem_under_its_line():
    case = CASES["matmul"]
    line = next(i for i, text in enumerate(case.source.split("\n"), 1) if "__syncthreads" in text)
    report, _, _ = case.launch(cuda.compile(without_line(case.source, line)).check)
    page = report._repr_html_()
    rows = re.findall(r"<tr>.*?</tr>", page, re.DOTALL)
    at = [i for i, row in enumerate(rows) if "border-left" in row]
    assert at and f">{report.problems[0].line}</td>" in rows[at[0] - 1]
    assert "RACE on shared tile_" in rows[at[0]]


def test_a_hostile_source_is_escaped():
    kernel = cuda.compile("// <b>&amp;</b><script>alert(1)</script>\n__global__ void k(float* y) { y[0] = 1; }")
    report = kernel.check[1, 1](np.zeros(1, np.float32))
    assert "<script>" not in report._repr_html_() and "&lt;script&gt;" in report._repr_html_()


def test_the_verdict_names_arrays_too_large_for_the_race_check():
    kernel = cuda.compile("__global__ void k(char* small, char* large) { small[threadIdx.x] = large[threadIdx.x]; }")
    report = kernel.check[1, 32](np.zeros(32, np.int8), np.zeros((16 << 20) + 32, np.int8))
    verdict = "k: no problem found; races were not looked for in large (too large)"
    assert str(report).startswith(verdict + "\n") and verdict in report._repr_html_()
    assert report.races_unchecked == ["large"]


def test_printed_text_is_cut_at_a_megabyte_and_says_so():
    kernel = cuda.compile("""__global__ void k(int n) { for (int i = 0; i < n; ++i) printf("%099d\\n", i); }""")
    for n, cut in ((20_000, True), (10_000, False)):  # the second launch begins anew
        text = kernel.check[1, 1](n).output
        assert text.startswith("0" * 99 + "\n")
        assert text.endswith("\n... output cut at 1 MB, as a GPU's buffer is\n") == cut
        assert len(text.splitlines()) == (10_487 if cut else n)


def test_shared_bytes_are_those_of_a_block():
    q = np.zeros((1, 64, 32), np.float32)
    kernel = cuda.compile(samples.FLASH, template=(32,))
    report = kernel.check[1, 128, samples.flash_shared_bytes(32)](q, q, q, q.copy(), 64, 1.0)
    assert report.shared_bytes == samples.flash_shared_bytes(32)
