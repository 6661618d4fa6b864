"""Every kernel of the course compiles for real GPUs: Ampere (sm_80), Hopper (sm_90) and Blackwell (sm_120). No GPU needed.

Hardware instructions that only exist from some architecture on (wgmma, TMA) say so in the source, in a line
`// requires sm_90a`; such a kernel is compiled for that architecture only.
"""

import re
from pathlib import Path

import pytest

from tests.cuda import cases as cuda_cases
from tests.cuda import find_kernels
from tests.cuda.test_compile import USES_HOST_HEADERS
from utils.cuda.binary import plain_build
from utils.cuda.errors import CompileError

pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-core and nvidia-cuda-nvrtc are not installed")
from cuda import pathfinder

from utils.cuda import gpu
from utils.paths import ROOT

ARCHITECTURES = ("sm_80", "sm_90", "sm_120")
FILES = find_kernels.course_files(ROOT)
KERNELS = find_kernels.in_files(FILES) + [
    find_kernels.Found("samples", case.source, case.name, tuple(map(str, case.template)))
    for case in cuda_cases.CASES.values()
]


def architectures(kernel):
    required = re.search(r"//\s*requires (sm_\w+)", kernel.source)
    return (required[1],) if required else ARCHITECTURES


def test_the_finder_sees_every_kernel_that_the_course_has():
    defined = set()
    for path in FILES:
        defined |= set(
            re.findall(r"^__global__[^;{(]*?void\s+(\w+)\s*\(", path.read_text(encoding="utf-8"), re.MULTILINE)
        )
    if not defined:
        pytest.skip("no lecture has a kernel yet")
    missing = defined - {kernel.name for kernel in KERNELS}
    assert not missing, f"kernels that nothing here compiles: {sorted(missing)}"


@pytest.mark.parametrize(
    ("kernel", "arch"),
    [pytest.param(kernel, arch, id=f"{kernel}-{arch}") for kernel in KERNELS for arch in architectures(kernel)],
)
def test_the_kernel_compiles_for_the_architecture(kernel, arch):
    binary = gpu.compile_for(kernel.source, kernel.instance, arch)
    assert binary.cubin.startswith(b"\x7fELF")


EXAMPLE = '''
"""A docstring may speak of __global__ void nothing(int* a) {}"""
HEAD = "__device__ int two() { return 2; }\\n"
PLAIN = r"""
// __global__ void commented_out(int* a) {}
__global__ void plain(int* a) { a[0] = 1; }
__global__ void __launch_bounds__(128) second(int* a) { a[1] = 1; }
"""
SIZED = """template <int D, bool CAUSAL>
__global__ void sized(float* a) { a[0] = CAUSAL ? D : 0; }"""
USES_HEAD = "__global__ void uses_head(int* a) { a[0] = two(); }"
TYPED = "template <typename T> __global__ void typed(T* a) { a[0] = 0; }"
D = 32
cuda.compile(HEAD + USES_HEAD, "uses_head")
cuda.compile(SIZED, "sized", template=(D, True))
cuda.compile(SIZED, "sized", (64, False))
cuda.compile(TYPED.replace("= 0", "= 1"), template=(some_type,))
def made(source):
    return cuda.compile(source)
IN_PARTS = "__global__ void in_parts(int* a) { a[0] = two(); }"
made(HEAD + IN_PARTS)
'''


def test_the_finder_follows_names_sums_and_template_arguments():
    kernels = find_kernels.in_texts({"example.py": EXAMPLE})
    assert all("int two()" in kernel.source for kernel in kernels if kernel.name in ("uses_head", "in_parts"))
    found = {(kernel.name, kernel.template) for kernel in kernels}
    assert found == {("plain", ()), ("second", ()), ("uses_head", ()), ("sized", ("32", "true")),
                     ("sized", ("64", "false")), ("typed", ("float",)), ("in_parts", ())}  # fmt: skip


def test_the_finder_follows_what_one_lecture_imports_from_another():
    later = 'from attention.first import TOOLS as T\ncuda.compile(T + "__global__ void k(int* a) { a[0] = two(); }")'
    found = find_kernels.in_texts(
        {"first.py": 'HEAD = "__device__ "\nTOOLS = HEAD + "int two() { return 2; }"', "later.py": later}
    )
    assert [kernel.source for kernel in found] == [
        "__device__ int two() { return 2; }__global__ void k(int* a) { a[0] = two(); }"
    ]


def test_what_the_finder_finds_compiles():
    for kernel in find_kernels.in_texts({"example.py": EXAMPLE}):
        assert gpu.compile_for(kernel.source, kernel.instance, "sm_80").signature[0][0] == "p"


def test_the_finder_refuses_a_kernel_that_it_cannot_read():
    with pytest.raises(ValueError, match="f-string"):
        find_kernels.in_texts({"example.py": 'n = 3\nK = f"__global__ void k(int* a) {{ a[0] = {n}; }}"'})


def test_a_wrong_kernel_is_refused_at_the_learners_line():
    with pytest.raises(CompileError) as refused:
        gpu.compile_for("__global__ void k(int* a) {\n  a[0] = b;\n}", "k")
    assert str(refused.value) == 'line 2: identifier "b" is undefined\n    2 |   a[0] = b;\n      |          ^'


def test_a_header_that_is_not_there_is_skipped_and_named_where_it_is_missed():
    gpu.compile_for("#include <foo.h>\n__global__ void k(int* a) {}", "k")
    with pytest.raises(CompileError, match=r'^line 2: identifier "foo" is undefined(.|\n)*not read: #include <foo.h>'):
        gpu.compile_for("#include <foo.h>\n__global__ void k(int* a) { foo(a); }", "k")


@pytest.mark.parametrize("name", ["other", "k<3>"])
def test_a_kernel_that_is_not_there_is_named(name):
    with pytest.raises(CompileError, match=f"no kernel '{name}'"):
        gpu.compile_for("__global__ void k(int* a) {}", name)


def test_an_architecture_that_nvrtc_does_not_know_is_named():
    with pytest.raises(CompileError, match="sm_999"):
        gpu.compile_for("__global__ void k(int* a) {}", "k", "sm_999")


def test_the_headers_of_the_subset_are_found():
    source = """#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <mma.h>
#include <cuda_pipeline_primitives.h>
__global__ void k(float* a) { int32_t i = 0; a[i] = -INFINITY; }"""
    assert gpu.compile_for(source, "k").signature == (("p", "f", 4),)


def test_headers_whose_content_is_built_in_are_accepted_as_on_the_cpu():
    assert gpu.compile_for(USES_HOST_HEADERS, "k").signature == (("p", "f", 4), ("s", "q", 8))


def test_arguments_are_typed_by_the_compiler_and_not_by_the_text():
    source = """#include <cuda_fp16.h>
#include <cuda_bf16.h>
typedef float real;
#define ARRAY float4* __restrict__
struct Shape { int n; double scale; };
template <class T> __global__ void k(const T* a, ARRAY b, const Shape c, size_t d, real e, void* f, half g, __nv_bfloat16 h,
                                     const __half2* i, bool j, unsigned char k, long long l) {}"""
    assert gpu.compile_for(source, "k<half>").signature == (
        ("c", "e", 2), ("p", "f", 16), ("s", "", 16), ("s", "Q", 8), ("s", "f", 4), ("p", "v", 1), ("s", "e", 2),
        ("s", "y", 2), ("c", "e", 4), ("s", "?", 1), ("s", "B", 1), ("s", "q", 8))  # fmt: skip


def test_the_cpu_and_the_gpu_read_the_same_signature():
    source = """struct Shape { int n; double scale; };
__global__ void k(const float* a, float4* b, Shape c, size_t d, const Shape* e, void* f, bool g, const unsigned h) {}"""
    assert gpu.compile_for(source, "k").signature == plain_build(source, "k").signature


def test_a_learners_macros_do_not_reach_our_code():
    source = "#define T 16\n#define A 1\n#define code 3\n__global__ void k(float* x) { x[T] = A + code; }"
    assert gpu.compile_for(source, "k").signature == (("p", "f", 4),)


def test_an_older_nvrtc_is_told_where_the_headers_are(monkeypatch):
    located = pathfinder.locate_nvidia_header_directory("cudart")
    if located is None or not (Path(located.abs_path) / "crt/mma.h").exists():
        pytest.skip("nvidia-cuda-runtime and nvidia-cuda-crt are not installed")
    monkeypatch.setattr(gpu, "nvrtc_version", lambda: (13, 0))
    gpu._headers.cache_clear()
    try:
        source = "#include <mma.h>\n#include <cuda_bf16.h>\n__global__ void older(__nv_bfloat16* a) {}"
        assert gpu.compile_for(source, "older").signature == (("p", "y", 2),)
    finally:
        gpu._headers.cache_clear()
