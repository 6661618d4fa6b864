"""The course against the node tests of the ONNX standard (onnx.backend.test)."""

import numpy as np
import pytest
import torch

from attention.fundamentals import attention_cuda, attention_numpy, attention_torch, attention_weights
from attention.kv_cache import KVCache
from attention.rotary import apply_rope_numpy
from tests.conformance.onnx_cases import as_attention, cases, heads
from tests.conformance.with_onnx import GROUPS, remembered, rotated, streamed, written
from tests.conformance.with_onnx import by_torch as rope_by_torch

LARGEST = {"float32": 5e-6, "float16": 1e-2, "bfloat16": 2e-2}  # largest difference allowed, relative to the result
ATTENTION, ROTARY, SCATTER, MEMORY, CONVOLUTION = (
    cases(name) for name in ("Attention", "RotaryEmbedding", "TensorScatter", "LinearAttention", "CausalConvWithState")
)


def parameters(found):
    return pytest.mark.parametrize("case", found, ids=lambda case: case.name)


def by_numpy(q, k, v, mask, scale):
    kind = np.float32 if q.dtype.name == "bfloat16" else q.dtype  # NumPy itself has no bfloat16
    return attention_numpy(q.astype(kind), k.astype(kind), v.astype(kind), mask=mask, scale=scale)


def by_torch(q, k, v, mask, scale, function=attention_torch):
    kind = getattr(torch, q.dtype.name)
    q, k, v = (torch.from_numpy(x.astype(np.float32)).to(kind) for x in (q, k, v))
    return function(q, k, v, mask=torch.from_numpy(mask), scale=scale).float().numpy()


def by_cuda(q, k, v, mask, scale):
    return by_torch(q, k, v, mask, scale, function=attention_cuda)


def assert_close(got, expected):
    assert got.shape == expected.shape
    allowed = LARGEST[expected.dtype.name]
    expected = expected.astype(np.float64)
    size = max(1.0, np.abs(expected).max(initial=0.0))
    assert np.abs(got.astype(np.float64) - expected).max(initial=0.0) <= allowed * size


@pytest.mark.parametrize("attention", [by_numpy, by_torch, by_cuda])
@parameters(ATTENTION)
def test_attention_gives_the_standard_s_result(case, attention):
    if case.skipped:
        pytest.skip(case.skipped)
    arguments = as_attention(case)
    assert_close(attention(*arguments), heads(case.outputs["Y"], case.attributes.get("q_num_heads")))


@parameters([case for case in ATTENTION if case.attributes.get("qk_matmul_output_mode") == 3])
def test_attention_weights_are_the_standard_s_softmax(case):
    if case.skipped:
        pytest.skip(case.skipped)
    q, k, _, mask, scale = as_attention(case)
    assert_close(attention_weights(q, k, mask=mask, scale=scale), case.outputs["qk_matmul_output"])


@parameters([case for case in ATTENTION if "present_key" in case.outputs])
def test_a_cache_holds_what_the_standard_calls_present(case):
    past, new = case.inputs["past_key"], heads(case.inputs["K"], case.attributes.get("kv_num_heads"))
    cache = KVCache(len(past), past.shape[1], past.shape[2] + new.shape[2], past.shape[3], torch.float64)
    for part in (past, new):
        keys, _ = cache.update(*[torch.from_numpy(part.astype(np.float64))] * 2)
    assert_close(keys.numpy(), case.outputs["present_key"])


@parameters(SCATTER)
def test_a_cache_is_written_where_the_standard_scatters(case):
    expected = torch.from_numpy(case.outputs["present_cache"])
    assert torch.equal(written(case), expected if expected.ndim == 4 else expected[:, None])


@pytest.mark.parametrize("apply_rope", [apply_rope_numpy, rope_by_torch], ids=["numpy", "torch"])
@parameters(ROTARY)
def test_rotation_pairs_the_columns_that_the_standard_pairs(case, apply_rope):
    assert_close(rotated(case, apply_rope), heads(case.outputs["output"], case.attributes.get("num_heads")))


@pytest.mark.parametrize(
    ("case", "ours"),
    [(case, by) for found, by in ((MEMORY, remembered), (CONVOLUTION, streamed)) for case in found],
    ids=lambda given: getattr(given, "name", ""),
)
def test_a_memory_and_a_convolution_give_the_standard_s_result_and_hand_its_state_over(case, ours):
    for got, name in zip(ours(case), ("output", "present_state"), strict=True):
        assert_close(got, case.outputs[name])


def test_the_standard_has_the_cases_that_are_counted_on():
    assert len(ATTENTION) == 93
    assert sum(not case.skipped for case in ATTENTION) == 82
    assert (len(ROTARY), len(SCATTER), len(MEMORY), len(CONVOLUTION)) == (8, 3, 14, 13)
    assert len(GROUPS) == 12
