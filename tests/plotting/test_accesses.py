"""The pictures of utils.plotting.accesses: what they state is what the accesses say."""

import re
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest

from utils import cuda, plotting
from utils.plotting import accesses as figures

LANE = np.arange(32)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def title(ax):
    return " ".join(ax.figure.get_suptitle().split())


@pytest.mark.parametrize(
    ("offsets", "size", "sectors"),
    [
        (4 * LANE, 4, 4),  # neighbours: 128 bytes in a row
        (4 * LANE + 12, 4, 5),  # the same, begun in the middle of a sector
        (4 * LANE * 64, 4, 32),  # a column of a matrix with 64 columns
        (0 * LANE, 4, 1),  # everybody reads one word
        (16 * LANE, 16, 16),  # float4
        (4 * LANE + 30, 4, 5),  # a misaligned start splits words between sectors
        (np.where(LANE < 8, 4 * LANE, -1), 4, 1),  # three quarters of the warp are masked out
    ],
)
def test_sectors_are_counted_as_the_memory_fetches_them(offsets, size, sectors):
    assert len(figures.sectors_of(offsets, size)) == sectors
    by_byte = {(int(o) + b) // 32 for o in offsets if o >= 0 for b in range(size)}
    assert set(figures.sectors_of(offsets, size)) == by_byte


@pytest.mark.parametrize(
    ("offsets", "size", "count"),
    [
        (4 * LANE, 4, 1),
        (4 * LANE * 32, 4, 32),  # a column of tile[32][32]
        (4 * LANE * 33, 4, 1),  # the same column of tile[32][33]
        (8 * LANE, 4, 2),  # every second word
        (0 * LANE, 4, 1),  # one word for all: broadcast
        (2 * LANE, 2, 1),  # two half values share a word
        (8 * LANE, 8, 2),  # float2 in a row: half a warp at a time
        (16 * LANE, 16, 4),  # float4 in a row: a quarter of a warp at a time
        (np.where(LANE < 2, 128 * LANE, -1), 4, 2),
    ],
)
def test_wavefronts_count_different_words_in_one_bank(offsets, size, count):
    assert figures.wavefronts_of(offsets, size) == count


STRIDED = """__global__ void strided(const float* x, float* y, int stride, int start) {
  __shared__ float tile[1056];
  for (int i = threadIdx.x; i < 1056; i += 32) tile[i] = 0.f;
  __syncwarp();
  y[threadIdx.x] = tile[threadIdx.x * stride] + x[threadIdx.x * stride + start];
}"""


@pytest.mark.parametrize(("stride", "start"), [(1, 0), (1, 3), (2, 0), (7, 1), (32, 0), (33, 0)])
def test_the_pictures_count_as_the_report_does(stride, start):
    x, y = np.zeros(2048, np.float32), np.zeros(32, np.float32)
    report = cuda.compile(STRIDED).check[1, 32](x, y, stride, start)
    (load,) = [row for row in report.rows if row.array == "x"]
    assert load.sectors == len(figures.sectors_of(4 * (LANE * stride + start)))
    assert report.bank_conflicts == figures.wavefronts_of(4 * LANE * stride) - 1


def test_titles_state_what_the_accesses_do():
    assert title(figures.warp_access(4 * LANE * 64)) == "32 lanes ask for 128 bytes: 32 sectors fetched, 4 would do"
    assert title(figures.warp_access(4 * LANE)) == "32 lanes ask for 128 bytes: 4 sectors fetched, none wasted"
    assert title(figures.bank_map(4 * LANE * 32)) == "32 lanes meet in 1 of 32 banks: 32 wavefronts, 1 would do"
    assert title(figures.bank_map(4 * LANE * 33)) == "No conflict: 32 of 32 banks at work, one wavefront"
    loads = [(0, "Q", 0)] + [(t, name, t) for t in range(4) for name in "KV"]
    assert title(figures.tiles_over_time(loads)) == "Tiles loaded in 4 steps: Q 1, K 4, V 4"
    assert title(figures.walk_picture([(0, 0, 0), (1, 1, 0), (1, 1, 1)])) == "2 blocks visit 3 of 4 tiles in 2 steps"


def test_a_warp_picture_has_one_cell_for_each_word_and_one_for_each_sector():
    ax = figures.warp_access(4 * LANE * 64)
    widths = [patch.get_width() for patch in ax.patches]
    assert widths.count(4) == 32
    assert widths.count(32) == 32


def test_a_bank_map_is_as_high_as_the_number_of_wavefronts():
    for stride in (1, 2, 3, 4, 8, 16, 32, 33):
        ax = figures.bank_map(4 * LANE * stride)
        assert max(patch.get_y() + patch.get_height() for patch in ax.patches) == figures.wavefronts_of(
            4 * LANE * stride
        )
        plt.close("all")


def test_a_tile_stays_in_its_buffer_until_the_next_load():
    ax = figures.tiles_over_time([(0, "Q", 0), (0, "K", 0), (3, "K", 1)], n_steps=6)
    spans = [(patch.get_x(), patch.get_width()) for patch in ax.patches]
    assert spans == [(0, 6), (0, 3), (3, 3)]


def test_every_picture_can_end_a_cell():
    figures.warp_access(4 * LANE)
    plotting.show("Thirty-two lanes read 128 bytes in a row.")
    assert not plt.get_fignums()


def test_the_walk_is_the_same_twice_and_needs_nothing_from_outside():
    visits = [(b, b, k) for b in range(3) for k in range(b + 1)]
    first, second = figures.walk(visits), figures.walk(visits)
    assert first.html == second.html
    assert "http" not in first.html
    assert "<script" not in first.html
    assert "3 blocks visit 6 of 9 tiles in 3 steps" in first.description
    assert first.description in first.html
    other = figures.walk(visits[:-1])
    identity = re.compile(r'id="(walk-[0-9a-f]{10})"')
    assert identity.search(first.html).group(1) != identity.search(other.html).group(1)


def test_the_walk_shows_each_visit_in_full_colour_at_its_step():
    visits = [(b, b, k) for b in range(3) for k in range(4)]
    svg = re.search(r"<svg.*</svg>", figures.walk(visits).html).group(0)
    frames = [group for group in ElementTree.fromstring(svg).iter("g") if group.get("class", "").startswith("step")]
    assert len(frames) == 4
    for step, frame in enumerate(frames):
        strong = [rect for rect in frame.iter("rect") if rect.get("fill-opacity") == "1"]
        faded = [rect for rect in frame.iter("rect") if rect.get("fill-opacity") == "0.3"]
        assert len(strong) == 3 + 3  # a tile of Q and a tile of the scores for each of three blocks
        assert len(faded) == 3 * step


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: figures.warp_access(np.arange(33)), "1 to 32 whole numbers"),
        (lambda: figures.warp_access(np.arange(32.0)), "float64"),
        (lambda: figures.bank_map([4, 8], size=3), "1, 2, 4, 8 or 16"),
        (lambda: figures.bank_map([-1, -1]), "at least one lane"),
        (lambda: figures.tiles_over_time([]), "at least one"),
        (lambda: figures.walk([]), "got none"),
        (lambda: figures.walk([(0, 1)]), "(block, query_tile, key_tile)"),
        (lambda: figures.walk([(0, -1, 0)]), "from 0"),
    ],
)
def test_wrong_input_gets_a_sentence(call, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        call()
