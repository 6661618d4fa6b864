"""Every mistake is reported, as what it is and at the line that makes it, under both compilers."""

import pytest

from tests.cuda import mistakes, mistakes_of_order
from tests.cuda.cases import CASES, barrier_lines, without_line
from tests.cuda.compilers import compiler  # noqa: F401
from tests.cuda.mistakes import floats, zeros
from utils import cuda

MISTAKES = mistakes.MISTAKES | mistakes_of_order.MISTAKES


def line_of(source):
    lines = source.split("\n")
    return 1 + next(i for i, line in enumerate(lines) if "HERE" in line)


@pytest.mark.parametrize("name", MISTAKES)
def test_the_mistake_is_named_at_its_line(name, compiler):  # noqa: F811
    kind, source, shape, arguments = MISTAKES[name]
    report = cuda.compile(source).check[shape](*arguments())
    found = [p for p in report.problems if p.kind == kind]
    assert found, f"reported instead: {[str(p) for p in report.problems]}"
    assert any(f"line {line_of(source)}:" in str(p) for p in found), str(found[0])
    assert {p.line for p in found} - {0}


DELETED = [(name, line) for name, case in CASES.items() for line in barrier_lines(case)]


def test_the_samples_have_barriers_to_delete():
    assert len(DELETED) >= 14


@pytest.mark.parametrize("name, line", DELETED, ids=[f"{name}-{line}" for name, line in DELETED])
def test_every_deleted_barrier_is_reported(name, line, compiler):  # noqa: F811
    case = CASES[name]
    kernel = cuda.compile(without_line(case.source, line), case.name, case.template)
    report, _, _ = case.launch(kernel.check)
    assert {p.kind for p in report.problems} & {"race", "async copy"}, f"line {line} of {name} can go unnoticed"


STACK = r"""
__device__ float deep(float x, int n) {
  volatile float here[64];
  here[n % 64] = x;
  return n ? deep(x + here[n % 64], n - 1) + here[0] : x;
}
__global__ void k(float* y, int n) { y[threadIdx.x] = deep(1.f, n); }
"""


def test_a_stack_overflow_is_reported(compiler):  # noqa: F811
    report = cuda.compile(STACK).check[1, 1](zeros(1), 500)
    assert [p.kind for p in report.problems] == ["stack overflow"]


def test_dynamic_shared_memory_that_the_launch_forgot_is_named(compiler):  # noqa: F811
    kernel = cuda.compile("""
__global__ void k(const float* x, float* y) {
  extern __shared__ float s[];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[31 - threadIdx.x];
}""")
    (problem,) = kernel.check[1, 32](floats(32), zeros(32)).problems
    assert problem.kind == "null pointer" and problem.line == 4
    assert problem.message.endswith(
        "; this launch gives the block no dynamic shared memory: k[grid, block, shared_bytes]"
    )
    (problem,) = kernel.check[1, 32, 128](None, zeros(32)).problems
    assert problem.kind == "null pointer" and "dynamic shared memory" not in problem.message


def test_threads_that_write_one_cell_are_told_to_let_one_write(compiler):  # noqa: F811
    kernel = cuda.compile("__global__ void k(float* y) { y[0] = threadIdx.x; }")
    (problem,) = kernel.check[1, 32](zeros(1)).problems
    assert problem.kind == "race" and "both in the same statement: let one thread write, in block" in problem.message
    assert "between them" not in problem.message


def test_one_wrong_kernel_gives_one_error_with_the_rest_folded():
    source = without_line(CASES["matmul"].source, barrier_lines(CASES["matmul"])[0])
    with pytest.raises(cuda.KernelError) as error:
        CASES["matmul"].launch(cuda.compile(source))
    assert str(error.value).startswith("RACE on shared tile_")
    assert "more problem" in str(error.value)
    assert len(error.value.report.problems) > 1


def test_a_stopped_launch_leaves_nothing_behind_for_the_next():
    _, source, shape, arguments = MISTAKES["a race in dynamic shared memory"]
    wrong, right = cuda.compile(source), CASES["matmul"]
    kernel = cuda.compile(right.source)
    for _ in range(2):
        assert not wrong.check[shape](*arguments()).ok
        assert right.launch(kernel.check)[0].ok


def test_the_same_run_gives_the_same_report():
    source = without_line(CASES["softmax"].source, barrier_lines(CASES["softmax"])[0])
    kernel = cuda.compile(source, "softmax")
    first, second = (CASES["softmax"].launch(kernel.check)[0] for _ in range(2))
    assert str(first) == str(second) and first.table() == second.table() and first._repr_html_() == second._repr_html_()
