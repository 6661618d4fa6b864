"""Kernels that are larger than any of ours: nothing is lost, or it is said."""

import numpy as np
import pytest

from tests.cuda.compilers import compiler  # noqa: F401
from utils import cuda


def test_thousands_of_places_are_all_counted():
    lines = 2100
    source = "__global__ void k(float* x) {\n" + "x[threadIdx.x] += 1;\n" * lines + "}"
    x = np.zeros(32, np.float32)
    report = cuda.compile(source).check[1, 32](x)
    assert report.ok and (x == lines).all()
    assert report.global_loaded == report.global_stored == 128 * lines
    assert [row.line for row in report.rows if row.kind == "load"] == list(range(2, 2 + lines))


def test_thousands_of_places_under_divergence_too():
    source = "__global__ void k(float* x) {\nint i = threadIdx.x;\n" + "if (i % 3) x[i] += 1;\n" * 2500 + "}"
    x = np.zeros(32, np.float32)
    report = cuda.compile(source, time_limit=30).check[1, 32](x)
    assert report.ok and x[1] == 2500 and x[0] == 0


def test_more_problems_than_are_kept_are_said_to_be_more_and_the_cause_is_among_them():
    body = "y[0] = threadIdx.x;\n" * 80 + "if (threadIdx.x % 2) { __syncthreads(); } else { __syncthreads(); }\n"
    report = cuda.compile("__global__ void k(volatile float* y) {\n" + body + "}").check[1, 64](np.zeros(1, np.float32))
    assert report.more_problems and str(report).startswith(f"k: more than {len(report.problems)} problems")
    assert report.problems[0].kind == "barrier"


def arrays_kernel(n):
    parameters = ", ".join(f"float* x{i}" for i in range(n))
    return f"__global__ void k({parameters}) {{ " + " ".join(f"x{i}[threadIdx.x] += {i};" for i in range(n)) + " }"


@pytest.mark.parametrize("n", [33, 300])
@pytest.mark.parametrize("how", ["check", "fast"])
def test_many_arrays(n, how):
    arrays = [np.zeros(32, np.float32) for _ in range(n)]
    report = getattr(cuda.compile(arrays_kernel(n)), how)[1, 32](*arrays)
    assert [x[31] for x in arrays] == list(range(n))
    assert how == "fast" or (report.ok and report.distinct_loaded == 128 * n)


def test_the_last_of_many_arrays_is_named():
    source = arrays_kernel(40).replace("x39[threadIdx.x] +=", "x39[threadIdx.x + 1] +=")
    (problem,) = cuda.compile(source).check[1, 32](*[np.zeros(32, np.float32) for _ in range(40)]).problems
    assert "at x39[32], but x39 has 32 elements" in problem.message


def test_more_arguments_than_a_gpu_takes_are_refused():
    source = (
        "struct S { char bytes[30000]; };\n__global__ void k(float* x, S s, S t) { x[0] = s.bytes[0] + t.bytes[1]; }"
    )
    s = np.zeros((), [("bytes", "u1", 30000)])[()]
    with pytest.raises(ValueError, match="k: its arguments take 60,008 bytes, but a GPU takes at most 32,764"):
        cuda.compile(source).check[1, 1](np.zeros(1, np.float32), s, s)


def test_a_pointer_to_a_large_struct():
    source = "struct S { float x[20000]; };\n__global__ void k(const S* s, float* y) { y[0] = s[1].x[7]; }"
    s, y = np.zeros(2, [("x", "f4", 20000)]), np.zeros(1, np.float32)
    s["x"][1, 7] = 5
    cuda.compile(source)[1, 1](s, y)
    assert y[0] == 5


def test_many_shared_arrays(compiler):  # noqa: F811
    n = 100
    declared = " ".join(f"__shared__ float a_shared_array_with_a_long_name_number_{i}[32];" for i in range(n))
    used = " ".join(f"a_shared_array_with_a_long_name_number_{i}[t] = {i};" for i in range(n))
    read = " + ".join(f"a_shared_array_with_a_long_name_number_{i}[31 - t]" for i in range(n))
    source = (
        f"__global__ void k(float* y) {{ int t = threadIdx.x; {declared}\n{used}\n__syncthreads();\ny[t] = {read};\n}}"
    )
    y = np.zeros(32, np.float32)
    report = cuda.compile(source).check[1, 32](y)
    assert report.ok and (y == sum(range(n))).all() and report.shared_bytes == 128 * n
    wrong = cuda.compile(source.replace("__syncthreads();", "")).check[1, 32](y)
    assert any(
        "shared a_shared_array_with_a_long_name_number_" in str(p) and "_number_0[" in str(p) for p in wrong.problems
    )


def test_a_long_printed_line_is_whole(capsys):
    text = "x" * 3000
    cuda.compile(f'__global__ void k(float* y) {{ printf("%s%d\\n", "{text}", 7); }}')[1, 1](np.zeros(1, np.float32))
    assert capsys.readouterr().out == text + "7\n"
