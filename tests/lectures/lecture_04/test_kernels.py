"""Lecture 04's two kernels: the triples against PyTorch and against each other, their bytes, and each of their barriers."""

import numpy as np
import pytest
import torch

from utils import cuda

lc = pytest.importorskip("attention.long_context")
if not hasattr(lc, "matmul_cuda"):
    pytest.skip("lecture 04 has no CUDA part yet", allow_module_level=True)

SOFTMAXES = [lc.softmax_rows_numpy, lc.softmax_rows_torch, lc.softmax_rows_cuda]
MATMULS = [lc.matmul_numpy, lc.matmul_torch, lc.matmul_cuda]
ROWS = [(1,), (257,), (5, 1), (3, 19, 33), (2, 1, 4, 300), (2, 12_000), (2, 12_001), (1, 100_000)]
MATRICES = [((1, 1), (1, 1)), ((7, 5), (5, 3)), ((65, 33), (33, 70)), ((2, 17, 16), (2, 16, 5)), ((3, 1, 20, 9), (2, 9, 4)),
            ((4, 6), (2, 3, 6, 5)), ((129, 64), (64, 1))]  # fmt: skip


def draw(*shapes, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    return arrays if len(arrays) > 1 else arrays[0]


def call(function, *arrays):
    """The result as an array, whichever of the triple it is."""
    if function.__name__.endswith("_torch"):
        return function(*(torch.from_numpy(a.copy()) for a in arrays)).numpy()
    return function(*arrays)


# --- softmax_rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("function", SOFTMAXES, ids=lambda f: f.__name__)
def test_softmax_rows_agrees_with_pytorch_for_rows_of_any_length(function, shape):
    x = 3 * draw(shape)
    expected = torch.softmax(torch.from_numpy(x), -1).numpy()
    np.testing.assert_allclose(call(function, x), expected, rtol=1e-5 if function is lc.softmax_rows_cuda else 1e-12)


@pytest.mark.parametrize("n_columns", [3, 300, 12_001])
@pytest.mark.parametrize("function", SOFTMAXES, ids=lambda f: f.__name__)
def test_minus_infinity_gets_no_weight_and_a_row_of_it_is_zero(function, n_columns):
    x = draw((4, n_columns), dtype=np.float32)
    x[1], x[2, 1:], x[3, ::2] = -np.inf, -np.inf, -np.inf
    weights = call(function, x)
    assert (weights[1] == 0).all()
    assert weights[2, 0] == 1
    assert (weights[x == -np.inf] == 0).all()
    np.testing.assert_allclose(weights.sum(-1), [1, 0, 1, 1], atol=1e-5)


@pytest.mark.parametrize("n_columns", [4, 12_001])
@pytest.mark.parametrize("function", SOFTMAXES, ids=lambda f: f.__name__)
def test_a_nan_is_not_hidden(function, n_columns):
    x = draw((3, n_columns), dtype=np.float32)
    x[1, -1] = x[2, 0] = np.nan
    assert np.isnan(call(function, x)).any(-1).tolist() == [False, True, True]


def test_softmax_rows_torch_has_the_gradient_of_pytorch_and_zero_for_an_empty_row():
    x = torch.from_numpy(draw((4, 9))).requires_grad_()
    d_out = torch.from_numpy(draw((4, 9), seed=1))
    ours, theirs = (
        torch.autograd.grad(f(x), x, d_out)[0] for f in (lc.softmax_rows_torch, lambda x: torch.softmax(x, -1))
    )
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    empty = torch.full((2, 3), -torch.inf, requires_grad=True)
    assert (torch.autograd.grad(lc.softmax_rows_torch(empty).square().sum(), empty)[0] == 0).all()


@pytest.mark.parametrize("n_columns", [1, 255, 1000, 4099])
def test_bytes_of_the_softmax_kernels_are_the_floor_and_one_and_a_half_times_the_floor(n_columns):
    x = draw((3, n_columns), dtype=np.float32)
    y = np.full_like(x, -1)
    for source, shared, reads in ((lc.SOFTMAX_READ_ONCE, 4 * n_columns, 1), (lc.SOFTMAX_ONLINE, 0, 2)):
        report = cuda.compile(source).check[3, 256, shared](x, y, n_columns)
        assert report.ok, report.problems
        assert (report.global_loaded, report.global_stored) == (reads * x.nbytes, x.nbytes)


# --- matmul ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", MATRICES, ids=str)
@pytest.mark.parametrize("function", MATMULS, ids=lambda f: f.__name__)
def test_matmul_agrees_with_a_sum_over_the_inner_axis_for_odd_shapes(function, shapes):
    a, b = draw(*shapes)
    expected = (a[..., :, :, None] * b[..., None, :, :]).sum(-2)
    got = call(function, a, b)
    assert got.shape == expected.shape and got.dtype == np.float64
    np.testing.assert_allclose(
        got, expected, atol=1e-5 * np.abs(expected).max() if function is lc.matmul_cuda else 1e-12
    )


def test_matmul_torch_has_the_gradient_of_pytorch():
    a, b = (torch.from_numpy(x).requires_grad_() for x in draw((3, 4, 5), (5, 2)))
    ours, theirs = (torch.autograd.grad(f(a, b).square().sum(), (a, b)) for f in (lc.matmul_torch, torch.matmul))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def random_sizes(count):
    rng = np.random.default_rng(5)
    return [tuple(int(size) for size in rng.integers(1, 150, 3)) for _ in range(count)]


@pytest.mark.parametrize("tile", [16, 64])
def test_bytes_of_the_tiled_products_equal_the_formula_on_ten_random_sizes(tile):
    for m, n, k in random_sizes(10):
        a, b = draw((m, k), (k, n), dtype=np.float32)
        c, rows, columns = np.full((m, n), -1, np.float32), -(-m // tile), -(-n // tile)
        kernel = cuda.compile(lc.MATMUL_TILED if tile == 16 else lc.MATMUL_REGISTERS)
        grid = (columns, rows) if tile == 16 else (1, rows, columns)
        report = kernel.check[grid, (16, 16)](a, b, c, m, n, k)
        assert report.ok, report.problems
        assert report.global_loaded == 4 * (m * k * columns + k * n * rows)
        assert report.global_stored == 4 * m * n
        np.testing.assert_allclose(c, a.astype(float) @ b, atol=1e-4)


# --- what both promise -----------------------------------------------------------------------------------------------


BAD_ROWS = {
    "x must have at least one axis": np.float32(3),
    "x must hold real numbers, got .*complex64": np.zeros(3, np.complex64),
    "x must hold real numbers, got .*bool": np.zeros(3, bool),
}


@pytest.mark.parametrize("message", BAD_ROWS)
def test_bad_rows_get_one_sentence(message):
    for function in SOFTMAXES:
        with pytest.raises(ValueError, match=message):
            function(torch.as_tensor(BAD_ROWS[message]) if function is lc.softmax_rows_torch else BAD_ROWS[message])


def softmax_launch():
    x = draw((2, 600), dtype=np.float32)
    return (2, 256, 4 * 600), (x, np.zeros_like(x), 600)


def matmul_launch():
    a, b = draw((70, 40), (40, 70), dtype=np.float32)
    return ((5, 5), (16, 16)), (a, b, np.zeros((70, 70), np.float32), 70, 70, 40)


def register_launch():
    _, arguments = matmul_launch()
    return ((1, 2, 2), (16, 16)), arguments


KERNELS = {
    "SOFTMAX_READ_ONCE": softmax_launch,
    "SOFTMAX_ONLINE": softmax_launch,
    "MATMUL_TILED": matmul_launch,
    "MATMUL_REGISTERS": register_launch,
}


@pytest.mark.parametrize("which", range(2))
@pytest.mark.parametrize("name", KERNELS)
def test_every_barrier_is_needed_and_its_absence_reported(name, which):
    before, between, after = getattr(lc, name).split("__syncthreads();")
    source = (
        before + between + "__syncthreads();" + after if which == 0 else before + "__syncthreads();" + between + after
    )
    configuration, arguments = KERNELS[name]()
    report = cuda.compile(source).check[configuration](*arguments)
    assert "race" in {problem.kind for problem in report.problems}
