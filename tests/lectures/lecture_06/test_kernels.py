"""Lecture 06 in CUDA: every rung of the ladder, on easy and on hard input; its bytes, to the byte; the backward pass."""

import io

import numpy as np
import pytest
import torch

from attention import fundamentals
from utils import cuda

f = pytest.importorskip("attention.flash")
f_experiments = pytest.importorskip("attention.experiments.flash")
if not hasattr(f, "flash_attention_cuda"):
    pytest.skip("lecture 06 has no CUDA part yet", allow_module_level=True)

TYPES = {"rows": torch.float32, "shared": torch.float32, "registers": torch.float32, "large": torch.float32,
         "half": torch.float16, "bfloat16": torch.bfloat16, "mma": torch.float16}  # fmt: skip
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
every_rung = pytest.mark.parametrize("rung", TYPES)
pytestmark = pytest.mark.filterwarnings("ignore:.*bytes of shared memory")


def attended(q, k, v, causal=False, scale=None):
    """Output and log-sum-exp in float64."""
    q, k, v = (a.double().numpy() for a in (q, k, v))
    n, m, d = q.shape[-2], k.shape[-2], q.shape[-1]
    s = q @ np.swapaxes(k, -1, -2) * (d**-0.5 if scale is None else scale)
    s = np.where(np.tri(n, m, m - n, dtype=bool), s, -np.inf) if causal else s
    highest = s.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(s - np.where(np.isneginf(highest), 0, highest))
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.where(total == 0, -np.inf, highest + np.log(total))
    return weights / np.where(total == 0, 1, total) @ v, lse[..., 0]


def draw(seed, n, m, d, heads=2, dtype=torch.float32):
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal((heads, rows, d))).to(dtype) for rows in (n, m, m)]


def climb(rung, q, k, v, causal=False, scale=None, **blocks):
    """The report of a rung, after its output and log-sum-exp have been compared."""
    kernel, launch, arguments = f.flash_launch(rung, q, k, v, causal, scale, **blocks)
    report = kernel.check[launch](*arguments)
    assert report.ok, report.problems[0]
    must_agree(arguments[3:5], attended(q, k, v, causal, scale), TOLERANCE[q.dtype])
    return report


def must_agree(got, expected, tolerance):
    (out, lse), (wanted, wanted_lse) = got, expected
    np.testing.assert_allclose(out.double().numpy(), wanted, rtol=0, atol=tolerance * max(1, np.abs(wanted).max()))
    np.testing.assert_allclose(lse.double().numpy(), wanted_lse, rtol=1e-6, atol=1e-5)


# --- every rung ------------------------------------------------------------------------------------------------------


@every_rung
@pytest.mark.parametrize("d", [1, 7, 32, 33, 64, 80, 128])
def test_every_rung_takes_any_d_and_ragged_lengths(rung, d):
    d = min(d, f.RUNGS[rung] or d)
    climb(rung, *draw(d, 19, 37, d, dtype=TYPES[rung]))
    climb(rung, *draw(d, 19, 37, d, dtype=TYPES[rung]), causal=True)


@pytest.mark.parametrize(("rung", "d"), [("large", 96), ("mma", 128)])
def test_a_rung_says_up_to_which_d_it_goes(rung, d):
    assert f.flash_launch(rung, *draw(0, 1, 1, d, dtype=TYPES[rung]))[1][2] <= 227 * 1024
    with pytest.raises(ValueError, match=f'rung "{rung}" takes d up to {d}, got {d + 1}'):
        f.flash_launch(rung, *draw(0, 1, 1, d + 1, dtype=TYPES[rung]))


def test_a_rung_that_is_none_is_told_which_there_are():
    with pytest.raises(ValueError, match="rung must be one of rows, shared, .*, mma, got 'tiles'"):
        f.flash_launch("tiles", *draw(0, 1, 1, 8))


@every_rung
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 70), (70, 1), (16, 16), (17, 33), (65, 65), (130, 67), (67, 130)])
def test_every_rung_takes_any_lengths_with_and_without_a_causal_mask(rung, n, m):
    climb(rung, *draw(n, n, m, 32, heads=1, dtype=TYPES[rung]))
    climb(rung, *draw(n, n, m, 32, heads=1, dtype=TYPES[rung]), causal=True)


@every_rung
def test_queries_with_nothing_to_attend_to_are_zero_on_every_rung(rung):
    q, k, v = draw(1, 90, 20, 32, dtype=TYPES[rung])
    kernel, launch, arguments = f.flash_launch(rung, q, k, v, True)
    arguments[3].fill_(9), arguments[4].fill_(9)
    kernel.fast[launch](*arguments)
    assert (arguments[3][:, :70] == 0).all() and torch.isneginf(arguments[4][:, :70]).all()
    must_agree(arguments[3:5], attended(q, k, v, True), TOLERANCE[q.dtype])


@every_rung
@pytest.mark.parametrize("score", [-200.0, -1e4, 1e4])
def test_scores_far_from_zero_give_no_nan_on_any_rung(rung, score):
    q, k = (torch.ones(1, rows, 32, dtype=TYPES[rung]) for rows in (20, 45))
    _, _, v = draw(2, 20, 45, 32, heads=1, dtype=TYPES[rung])
    climb(rung, q, k, v, scale=score / 32)
    climb(rung, q, k, v, causal=True, scale=score / 32)


@every_rung
def test_rows_whose_maximum_rises_and_falls_on_every_rung(rung):
    _, _, v = draw(3, 20, 100, 32, heads=1, dtype=TYPES[rung])
    slope = torch.linspace(-4, 4, 100)[:, None].expand(100, 32).to(TYPES[rung])
    q = torch.ones(1, 20, 32, dtype=TYPES[rung])
    for keys in (slope, slope.flip(0)):
        climb(rung, q, keys[None].contiguous(), v, scale=1.0)


@every_rung
def test_bytes_equal_the_formula_on_twenty_random_sizes(rung):
    rng = np.random.default_rng(4)
    for _ in range(20):
        n, m, d, causal = *(int(x) for x in rng.integers(1, (140, 140, 40))), bool(rng.integers(2))
        q, k, v = draw(5, n, m, d, dtype=TYPES[rung])
        kernel, launch, arguments = f.flash_launch(rung, q, k, v, causal)
        report = kernel.check[launch](*arguments)
        block_q = {"rows": 64, "shared": 16, "mma": 128}.get(rung) or kernel.template[1]
        loaded, stored = f.flash_bytes(n, m, d, block_q, causal, q.element_size())
        assert (report.global_loaded, report.global_stored) == (2 * loaded, 2 * stored), (n, m, d, causal)


@pytest.mark.parametrize("rung", ["registers", "half"])
def test_block_sizes_do_not_change_the_answer_and_keys_not_the_bytes(rung):
    q, k, v = draw(6, 70, 90, 24, dtype=TYPES[rung])
    for block_q in (16, 40, 64):
        reports = [climb(rung, q, k, v, causal=True, block_q=block_q, block_k=block_k) for block_k in (1, 16, 33, 64)]
        assert len({(report.global_loaded, report.global_stored) for report in reports}) == 1


@pytest.mark.parametrize("scores", [-200.0, 0.0, 1e4])
@pytest.mark.parametrize("d", [7, 32, 64, 80, 128])
def test_the_three_kernels_of_rung_1_agree_too(d, scores):
    n, m = 19, 37
    q, k, v = (a[0] for a in draw(7, n, m, d, heads=1))
    k, scale = (k, d**-0.5) if scores == 0 else (torch.ones(m, d), scores / d)
    q = q if scores == 0 else torch.ones(n, d)
    s, p, out = torch.zeros(n, m), torch.zeros(n, m), torch.zeros(n, d)
    cuda.compile(fundamentals.SCORES)[(3, 2), (16, 16)](q, k, s, n, m, d, scale)
    cuda.compile(fundamentals.SOFTMAX_ROWS)[n, 32](s, p, m)
    cuda.compile(fundamentals.BLEND)[(-(-d // 16), 2), (16, 16)](p, v, out, n, m, d)
    np.testing.assert_allclose(out.numpy(), attended(q, k, v, scale=scale)[0], atol=1e-5)


@pytest.mark.parametrize("d", [32, 64, 80, 128])
def test_register_tiles_meet_no_bank_conflict_and_without_the_swizzle_many(d):
    kernel, launch, arguments = f.flash_launch("registers", *draw(8, 64, 64, d, heads=1))
    report = kernel.check[launch](*arguments)
    plain = "__device__ int place(int row, int chunk, int chunks) { return row * chunks + chunk; }"
    plain = cuda.compile(kernel.source.replace(f.SWIZZLE, plain), name="flash_registers", template=kernel.template)
    assert report.bank_conflicts == 0
    assert plain.check[launch](*arguments).bank_conflicts > 0.3 * sum(
        row.requests for row in report.rows if row.space == "shared"
    )


@pytest.mark.parametrize("rung", ["shared", "registers", "large", "half", "bfloat16"])
def test_neighbouring_threads_read_and_write_neighbouring_addresses(rung):
    report = climb(rung, *draw(9, 64, 64, 64, heads=1, dtype=TYPES[rung]))
    assert all(row.sectors == row.ideal_sectors for row in report.rows if row.space == "global" and row.array != "lse")


def without(source, which):
    """The source without one of its barriers, counted from 0."""
    at = -1
    for _ in range(which + 1):
        at = min(
            place for place in (source.find(b, at + 1) for b in ("__syncthreads();", "__syncwarp();")) if place >= 0
        )
    return source[:at] + source[source.index(";", at) + 1 :]


# In the tensor cores kernel the other barriers are those of a warp, which wmma's own functions meet on the CPU.
BARRIERS = [("rows", "FLASH_ROWS", 2), ("shared", "FLASH_SHARED", 3), ("registers", "FLASH_REGISTERS", 3),
            ("half", "FLASH_TENSOR_CORES", 2), ("mma", "FLASH_MMA", 3)]  # fmt: skip


@pytest.mark.parametrize(("rung", "name", "which"), [(r, name, i) for r, name, count in BARRIERS for i in range(count)])
def test_every_barrier_is_needed_and_its_absence_reported(rung, name, which):
    kernel, launch, arguments = f.flash_launch(rung, *draw(10, 33, 70, 32, heads=1, dtype=TYPES[rung]))
    source = kernel.source.replace(getattr(f, name), without(getattr(f, name), which))
    assert source != kernel.source
    report = cuda.compile(source, name=kernel.name.split("<")[0], template=kernel.template).check[launch](*arguments)
    assert "race" in {problem.kind for problem in report.problems}


# --- the function around them ----------------------------------------------------------------------------------------


def test_values_may_be_wider_or_narrower_than_keys():
    q, k, v = draw(14, 9, 21, 16)
    for d_v in (5, 40):
        wide = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 21, d_v))).float()
        must_agree(f.flash_attention_cuda(q, k, wide), attended(q, k, wide), 1e-5)


@pytest.mark.filterwarnings("ignore:.*bytes of shared memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_wide_heads_take_smaller_tiles_and_more_shared_memory(dtype):
    q, k, v = draw(26, 20, 37, 260, heads=1, dtype=dtype)
    must_agree(f.flash_attention_cuda(q, k, v, True), attended(q, k, v, True), TOLERANCE[dtype])


def test_views_and_tensors_with_gradients_are_taken_and_left_alone():
    storage = torch.from_numpy(np.random.default_rng(15).standard_normal((2, 16, 21))).float().requires_grad_()
    q = storage.transpose(1, 2)[:, 3:10]
    k, v = storage.transpose(1, 2), storage.detach().transpose(1, 2).flip(1)
    before = storage.detach().clone()
    out, _ = f.flash_attention_cuda(q, k, v)
    must_agree((out, _), attended(q.detach(), k.detach(), v), 1e-5)
    assert torch.equal(storage, before) and not out.requires_grad


@pytest.mark.parametrize("width", [16, 64, 96, 128, 256, 512])
def test_tiles_fit_into_the_shared_memory_of_every_gpu_up_to_512(width):
    for needs in (f.registers_bytes, f.tensor_cores_bytes):
        rows, keys = f.tile_sizes(64, 64, lambda rows, keys: needs(width, rows, keys))
        assert needs(width, rows, keys) <= (48 if width <= 128 else 99) * 1024


# --- on a GPU --------------------------------------------------------------------------------------------------------


def registers_and_spills(source, instance):
    """Registers of a thread, and bytes that it spills, when NVIDIA's compiler builds the kernel for Hopper."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-core and nvidia-cuda-nvrtc are not installed")
    from cuda.core import Program, ProgramOptions

    from utils.cuda import gpu

    before = gpu.__file__.replace("gpu.py", "gpu_before.h")
    with open(before, encoding="utf-8") as header:
        text = header.read() + source
    said = io.StringIO()
    options = ProgramOptions(arch="sm_90", std="c++17", ptxas_options=["-v"], **gpu._headers())
    Program(text, "c++", options).compile("cubin", name_expressions=(instance,), logs=said)
    numbers = said.getvalue().split()
    return int(numbers[numbers.index("registers,") - 1]), int(numbers[numbers.index("spill") - 2])


@pytest.mark.filterwarnings("ignore")
def test_a_query_a_thread_spills_at_128_and_register_tiles_never():
    assert registers_and_spills(f.FLASH_HEAD + f.FLASH_ROWS, "flash_rows<128>")[0] == 255
    assert registers_and_spills(f.FLASH_HEAD + f.FLASH_ROWS, "flash_rows<128>")[1] > 0
    source = f.FLASH_HEAD + f.SWIZZLE + f.CHUNKS + f.REGISTER_STEPS + f.FLASH_REGISTERS
    for width in (32, 64, 96, 128):
        rows, keys = f.tile_sizes(64, 64, lambda rows, keys: f.registers_bytes(width, rows, keys))
        registers, spilled = registers_and_spills(source, f"flash_registers<{width}, {rows}, {keys}>")
        assert registers <= 128 and spilled == 0
    assert registers_and_spills(source, "flash_registers<64, 128, 128>")[1] == 0  # the rung of 8 x 8
    source = f.FLASH_HEAD + f.HALF_TILES + f.MMA + f.MMA_STEPS + f.FLASH_MMA
    for width in (64, 128):
        assert registers_and_spills(source, f"flash_mma<{width}, 8>")[1] == 0


def test_each_rung_needs_what_the_lecture_says():
    counts = f_experiments.ladder_counts(256, 64)
    turns = {name: count[1] / (256 * 256 * 4) for name, count in counts.items()}
    two, three, four, five, six, seven = (turns[name] for name in list(counts)[1:])
    assert three > 2 * two > 2 * five and four > 0.5 > five > 0.25 and six > five and seven < 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU, or a torch without CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_forward_and_backward_agree_with_the_cpu(dtype):
    q, k, v = draw(25, 200, 150, 80, dtype=dtype)
    out, lse = f.flash_attention_cuda(q, k, v, True)
    on_gpu = [a.cuda() for a in (q, k, v)]
    got, got_lse = f.flash_attention_cuda(*on_gpu, True)
    must_agree((got.cpu(), got_lse.cpu()), attended(q, k, v, True), TOLERANCE[dtype])
    theirs = f.flash_attention_backward_cuda(q, k, v, out, lse, out, True)
    ours = f.flash_attention_backward_cuda(*on_gpu, got, got_lse, got, True)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(
            a.cpu().double(), b.double(), rtol=0, atol=TOLERANCE[dtype] * b.double().abs().max() * 2
        )
