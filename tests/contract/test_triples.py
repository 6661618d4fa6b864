"""The contract: every promise of a mechanism that is built three times, for every row of the table."""

import math

import numpy as np
import pytest
import torch

from tests.contract.rows import TRIPLES
from tests.contract.triples import changed, plain_attention
from utils.cuda import Kernel

FLOATS = {"float64": 1e-10, "float32": 1e-5, "float16": 1e-2, "bfloat16": 3e-2}  # tolerance, of the largest value
INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU, or a torch without CUDA")
WAYS = [
    "numpy",
    "torch",
    "cuda, arrays",
    "cuda, tensors",
    pytest.param("torch, GPU", marks=needs_gpu),
    pytest.param("cuda, GPU", marks=needs_gpu),
]
every_way = pytest.mark.parametrize("way", WAYS)
every_row = pytest.mark.parametrize("row", TRIPLES, ids=lambda row: row.name)


def rng():
    return np.random.default_rng(7)


def prepared(row, way, arguments, dtype="float64"):
    """Arguments in the kind that this way takes, floats in this type."""
    device = "cuda" if "GPU" in way else "cpu"
    new = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, np.ndarray):
            known = way in ("numpy", "cuda, arrays") and dtype != "bfloat16"
            exact = name in row.floats and value.dtype == np.float64
            exact &= dtype not in INTEGERS or name not in ("out", "lse")
            new[name] = value.astype(dtype) if exact and known else value
            if not known:
                tensor = torch.from_numpy(value.copy()).to(device)
                new[name] = tensor.to(getattr(torch, dtype)) if exact else tensor
    return new


def function(row, way):
    return {"n": row.numpy, "t": row.torch, "c": row.cuda}[way[0]]


def run(row, way, arguments, dtype="float64"):
    """The results as they come, in a tuple."""
    results = function(row, way)(**prepared(row, way, arguments, dtype))
    return results if isinstance(results, tuple) else (results,)


def numbers(results):
    return [r.detach().double().cpu().numpy() if isinstance(r, torch.Tensor) else r.astype(float) for r in results]


def tolerance(way, dtype):
    return max(FLOATS.get(dtype, 0), 1e-5 if way.startswith("cuda") else 1e-10)


def assert_close(results, expected, bound, what=""):
    for result, exact in zip(results, expected, strict=False):
        assert result.shape == exact.shape, what
        finite = np.isfinite(exact)
        np.testing.assert_array_equal(result[~finite], exact[~finite], what)
        largest = np.abs(exact[finite]).max(initial=0)
        np.testing.assert_allclose(result[finite], exact[finite], atol=bound * max(largest, 1e-2), rtol=0, err_msg=what)


@every_way
@every_row
def test_every_case_agrees_with_the_same_written_in_another_way(row, way):
    for name, case in row.cases.items():
        arguments = row.inputs(rng(), **case)
        exact = {key: value for key, value in arguments.items() if key not in ("block_q", "block_k")}
        assert_close(numbers(run(row, way, arguments)), row.reference(**exact), tolerance(way, "float64"), name)


@every_way
@pytest.mark.parametrize("dtype", FLOATS)
@every_row
def test_kind_and_float_type_come_back_and_agree_with_double(row, dtype, way):
    if dtype == "bfloat16" and way in ("numpy", "cuda, arrays"):
        pytest.skip("NumPy has no bfloat16")
    arguments = row.inputs(rng())
    given = prepared(row, way, arguments, dtype)
    rounded = {k: numbers([given[k]])[0] if k in row.floats else v for k, v in arguments.items()}
    results = run(row, way, arguments, dtype)
    for result, like in zip(results, row.results, strict=True):
        assert type(result) is type(given[row.floats[0]])
        if like is not None:
            assert result.dtype == given[like].dtype
        assert "64" in str(result.dtype) or dtype != "float64"
    assert_close(numbers(results), row.reference(**rounded), tolerance(way, dtype))


@every_way
@pytest.mark.parametrize("dtype", INTEGERS)
@every_row
def test_integers_of_every_type_are_computed_as_numbers_and_come_back_as_double(row, dtype, way):
    arguments = row.inputs(rng())
    whole = {k: np.round(np.abs(v) * 8).clip(0, 12) if k in row.floats else v for k, v in arguments.items()}
    if "lse" in whole:  # what a forward pass left is never whole
        whole["out"], whole["lse"] = plain_attention(whole["q"], whole["k"], whole["v"])
    results = run(row, way, whole, dtype)
    assert all("float64" in str(r.dtype) for r in results)
    oracle = numbers(run(row, "numpy", whole, "float64"))
    assert_close(numbers(results), oracle, 1e-4 if way.startswith("cuda") else 1e-10)


@every_way
@every_row
def test_inputs_are_not_changed_and_may_lie_in_memory_as_they_like(row, way):
    arguments = row.inputs(rng())
    expected = numbers(run(row, way, arguments, "float32"))
    given = prepared(row, way, arguments, "float32")
    for name, value in given.items():
        if name in row.floats:
            wide = np.concatenate if isinstance(value, np.ndarray) else torch.cat
            given[name] = wide([value, value + 1], -1)[..., : value.shape[-1]]  # a view with gaps
            if isinstance(value, np.ndarray):
                given[name].flags.writeable = False
    before = {n: v.clone() if isinstance(v, torch.Tensor) else np.copy(v) for n, v in given.items()}
    results = function(row, way)(**given)
    assert_close(numbers(results if isinstance(results, tuple) else (results,)), expected, 1e-6)
    for name, value in given.items():
        if isinstance(value, (np.ndarray, torch.Tensor)):
            assert (value == before[name]).all(), name


@every_way
@every_row
def test_empty_axes_give_zeros_of_the_right_shape_and_gradient_zero(row, way):
    for name, case in row.empty.items():
        arguments = row.inputs(rng(), **case)
        results = run(row, way, arguments)
        for result, exact in zip(numbers(results), row.reference(**arguments), strict=True):
            assert result.shape == exact.shape, name
            assert_close([result], [exact], 1e-6, name)
        if way == "torch" and row.gradient:
            assert all((g == 0).all() for g in gradients(row, arguments)), name


def gradients(row, arguments):
    given = prepared(row, "torch", arguments)
    for name in row.gradient:
        given[name].requires_grad_()
    results = row.torch(**given)
    out = results[0] if isinstance(results, tuple) else results
    assert out.requires_grad
    return torch.autograd.grad(out.sum(), [given[name] for name in row.gradient], allow_unused=False)


@every_way
@pytest.mark.parametrize("row", [r for r in TRIPLES if r.nothing], ids=lambda row: row.name)
def test_a_row_with_nothing_to_attend_to_is_zero_with_gradient_zero(row, way):
    arguments = row.nothing(row.inputs(rng()))
    assert (numbers(run(row, way, arguments))[0] == 0).all()
    if way == "torch":
        assert all((g == 0).all() for g in gradients(row, arguments))


@every_way
@pytest.mark.parametrize("row", [r for r in TRIPLES if r.unseen], ids=lambda row: row.name)
def test_nan_where_nobody_may_look_changes_nothing(row, way):
    hidden = row.unseen(row.inputs(rng()))
    shown = {k: np.nan_to_num(v) if isinstance(v, np.ndarray) and v.dtype == float else v for k, v in hidden.items()}
    assert_close(numbers(run(row, way, hidden)), numbers(run(row, way, shown)), tolerance(way, "float64"))
    if way == "torch":
        for found, expected in zip(gradients(row, hidden), gradients(row, shown), strict=True):
            torch.testing.assert_close(found, expected)


@every_way
@pytest.mark.parametrize("row", [r for r in TRIPLES if r.unseen], ids=lambda row: row.name)
def test_nan_and_infinity_that_are_looked_at_are_not_hidden(row, way):
    for value in (math.nan, math.inf, -math.inf):
        arguments = row.inputs(rng())
        name = row.floats[-1] if row.name != "multi_head_attention" else "x_kv"
        arguments[name] = arguments[name].copy()
        at = (int(arguments["block_table"][0, 0]), 0) if "block_table" in arguments else (0,)
        arguments[name][at] = value
        assert not np.isfinite(numbers(run(row, way, arguments))[0][0]).any()
    if "k" in row.floats:  # one number of a key is enough
        arguments = row.inputs(rng())
        arguments["k"][..., 0, 1] = math.nan
        assert np.isnan(numbers(run(row, way, arguments))[0]).all()


@every_way
@pytest.mark.parametrize("size", [1e4, -1e4])
@every_row
def test_scores_of_ten_thousand_give_no_nan(row, size, way):
    if row.name == "flash_attention_backward":
        pytest.skip("takes scores as the forward pass left them; the forward pass has its own row")
    arguments = row.inputs(rng())
    first = row.floats[0]
    arguments = changed(arguments, **{first: lambda a: np.sign(a) * abs(size) + size / 2})
    results = numbers(run(row, way, arguments, "float32"))
    assert np.isfinite(results[0]).all()
    assert_close(results[:1], row.reference(**arguments)[:1], 1e-2)


@every_way
@every_row
def test_what_cannot_be_right_gets_the_same_sentence_from_all(row, way):
    for sentence, change in row.bad.items():
        arguments = changed(row.inputs(rng()) | {n: None for n in change if n not in row.inputs(rng())}, **change)
        with pytest.raises(ValueError) as caught:
            run(row, way, arguments)
        message = str(caught.value)
        assert sentence in message
        assert "\n" not in message


@every_way
@every_row
def test_a_list_is_refused_by_its_name(row, way):
    given = prepared(row, way, row.inputs(rng()))
    name = row.floats[0]
    given[name] = given[name].tolist()
    with pytest.raises(TypeError, match=f"^{name} must be "):
        function(row, way)(**given)


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("way", ["torch", "cuda, tensors"])
@every_row
def test_what_is_no_number_of_at_least_16_bits_is_refused_by_its_name(row, way, dtype):
    given = prepared(row, way, row.inputs(rng()))
    name = row.floats[-1]
    given[name] = given[name].to(dtype)
    with pytest.raises(ValueError, match="must hold real numbers, got torch"):
        function(row, way)(**given)


@every_row
def test_a_tensor_is_refused_by_numpy_and_an_array_by_torch(row):
    arguments = row.inputs(rng())
    for way, other in (("numpy", "torch"), ("torch", "numpy")):
        with pytest.raises(TypeError, match="must be a"):
            function(row, way)(**prepared(row, other, arguments))


@every_row
def test_the_launches_of_a_wrapper_hold_under_the_runners_checks(row, monkeypatch):
    """Grids, blocks and bytes of shared memory: what a plain run on a CPU does not notice, and a GPU does."""
    launched = []

    def checked(kernel, grid, block, shared, arguments):
        report = kernel._check(grid, block, shared, arguments)
        assert report.ok, report.complaint()
        launched.append(kernel.name)

    monkeypatch.setattr(Kernel, "_fast", checked)
    for case in row.cases.values():
        arguments = row.inputs(rng(), **case)
        results = run(row, "cuda, tensors", arguments, "float32")
        exact = {key: value for key, value in arguments.items() if key not in ("block_q", "block_k")}
        assert_close(numbers(results), row.reference(**exact), 1e-5)
    assert launched


LIMITS = [pytest.param(row, check, id=f"{row.name}: {name}") for row in TRIPLES for name, check in row.limits.items()]


@every_way
@pytest.mark.parametrize(("row", "check"), LIMITS)
def test_limits(row, check, way):
    check(lambda **arguments: numbers(run(row, way, arguments)), rng())
