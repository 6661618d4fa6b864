"""The GPU path: what a launch hands to the driver, and, where there is a GPU, that it computes what the CPU computes."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.cuda import cases as cuda_cases
from tests.cuda.both import CASES, MISTAKES
from utils import cuda

pytest.importorskip("cuda.bindings.driver", reason="cuda-core is not installed")
from utils.cuda import gpu
from utils.paths import ROOT

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU, or a torch without CUDA")


class FakeTensor:
    """As much of a CUDA tensor as a launch looks at."""

    is_cuda, shape, dtype = True, (4,), torch.float32
    layout, is_quantized, is_nested, requires_grad = torch.strided, False, False, False

    def __init__(self, device="cuda:0", address=0x1122334455667788):
        self.device, self._address = torch.device(device), address

    def data_ptr(self):
        return self._address

    def is_contiguous(self):
        return True

    def is_neg(self):
        return False

    is_conj = is_neg

    def numel(self):
        return 4

    def element_size(self):
        return 4


def test_tensors_on_two_gpus_are_refused():
    kernel = SimpleNamespace(name="k", parameters=("x", "n", "y"), filled={})
    with pytest.raises(ValueError, match=r"one device, but x is on cuda:0 and y on cuda:1"):
        gpu.launch(kernel, (1, 1, 1), (32, 1, 1), 0, (FakeTensor(), 3, FakeTensor("cuda:1")))


@pytest.mark.parametrize("how", ["kernel", "fast"])
def test_cuda_tensors_are_launched_on_the_gpu(how, monkeypatch):
    launched = []
    monkeypatch.setattr(gpu, "launch", lambda *what: launched.append(what))
    kernel = cuda.compile("__global__ void k(float* x, int n) { x[n] = 1.f; }")
    arguments = (FakeTensor(), 2)
    (kernel if how == "kernel" else kernel.fast)[(3, 2), 64, 128](*arguments)
    assert launched == [(kernel, (3, 2, 1), (64, 1, 1), 128, arguments)]


FAKE_LAUNCH = r'''
import contextlib, ctypes, sys
from types import SimpleNamespace
import numpy as np
import torch
from tests.cuda.test_gpu import FakeTensor
from utils import cuda
from utils.cuda import gpu

source = """#include <cuda_bf16.h>
struct Pair { int a; double b; };
__constant__ float c[2];
template <int D> __global__ void k(const float* x, float* y, Pair s, int n, float f, __nv_bfloat16 h) { y[0] = D + c[n]; }"""
filled = {"c": np.array([1.5, -2], np.float32)}
k = SimpleNamespace(source=source, name="k<64>", parameters=["x", "y", "s", "n", "f", "h"], filled=filled)
class Pair(ctypes.Structure):
    _fields_ = [("a", ctypes.c_int), ("b", ctypes.c_double)]

gpu.compile_for(source, "k<64>", "sm_90a")     # before the fake driver is there: NVRTC would ask it for more
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.current_stream = lambda device: SimpleNamespace(cuda_stream=0x5150)
torch.cuda.get_device_capability = lambda device: (9, 0)
arguments = (FakeTensor(), FakeTensor(address=0xAABB), Pair(7, 2.5), -5, 1.5, 3.14159)
gpu.launch(k, (3, 2, 1), (128, 1, 1), 66304, arguments)
for grid, shared in ((13, 0), (1, 300000)):
    try:
        gpu.launch(k, (grid, 1, 1), (32, 1, 1), shared, arguments)
    except cuda.KernelError as error:
        print("refused:", error, flush=True)
'''


@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("gcc"), reason="the fake driver is built with gcc on Linux"
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real driver")
def test_a_launch_hands_the_driver_the_right_bytes(tmp_path):
    library = tmp_path / "libcuda.so.1"
    source = ROOT / "tests/cuda/fake_driver/libcuda.c"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", library, source, "-ldl"], check=True
    )
    environment = {**os.environ, "FAKE_SIZES": "8,8,16,4,4,2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", FAKE_LAUNCH, str(library)], capture_output=True, text=True, cwd=ROOT,
                          env=environment, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert (
        lines.count("filled 0x300 with 0000c03f000000c0") == 1 and "global c" in lines
    )  # once, however often launched
    assert "attribute 8 = 66304" in lines  # the opt-in to more than 48 KB
    at = lines.index("launch 0x200 grid 3 2 1 block 128 1 1 shared 66304 stream 0x5150 extra 0")
    assert lines[at + 1 : at + 7] == [f"argument {content}" for content in (
        "8877665544332211", "bbaa000000000000", "07000000000000000000000000000440", "fbffffff", "0000c03f", "4940")]  # fmt: skip
    refused = [line for line in lines if line.startswith("refused:")]
    assert "the GPU refused the launch with grid (13, 1, 1)" in refused[0]
    assert "300,000 bytes of dynamic" in refused[1]
    assert "this GPU has 232,448" in refused[1]


def assert_close(case, given, expected):
    error = np.abs(given.astype(np.float64) - expected).max() / max(1.0, np.abs(expected).max())
    assert error <= case.tolerance


@pytest.mark.filterwarnings("ignore:.*bytes of shared memory")  # one case asks for more than 48 KB on purpose
@pytest.mark.parametrize("name", CASES)
def test_the_cpu_computes_what_numpy_computes(name):
    case = CASES[name]
    arguments = case.arguments(np.random.default_rng(0))
    expected = case.expected(*(np.copy(a) if isinstance(a, np.ndarray) else a for a in arguments))
    compiled = cuda.compile(case.source, template=case.template)
    report = compiled.check[case.grid, case.block, case.shared](*arguments)
    assert report.ok, str(report.problems[0])
    assert_close(case, arguments[-1], expected)


@needs_gpu
@pytest.mark.filterwarnings("ignore:.*bytes of shared memory")
@pytest.mark.parametrize("name", CASES)
def test_the_gpu_computes_what_the_cpu_computes(name):
    case = CASES[name]
    on_cpu = case.arguments(np.random.default_rng(0))
    on_gpu = [torch.from_numpy(np.copy(a)).cuda() if isinstance(a, np.ndarray) else a for a in on_cpu]
    compiled = cuda.compile(case.source, template=case.template)
    compiled[case.grid, case.block, case.shared](*on_cpu)
    compiled[case.grid, case.block, case.shared](*on_gpu)
    assert_close(case, on_gpu[-1].cpu().numpy(), on_cpu[-1])


class OnGpu:
    """Takes a launch of NumPy arrays to the GPU and brings the arrays back."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, configuration):
        def launch(*arguments):
            moved = [torch.from_numpy(a).cuda() if isinstance(a, np.ndarray) else a for a in arguments]
            self.kernel[configuration](*moved)
            for a, tensor in zip(arguments, moved):
                if isinstance(a, np.ndarray):
                    a[...] = tensor.cpu().numpy()

        return launch


@needs_gpu
@pytest.mark.filterwarnings("ignore:.*bytes of shared memory")
@pytest.mark.parametrize("name", cuda_cases.CASES)
def test_the_gpu_computes_what_numpy_computes(name):
    case = cuda_cases.CASES[name]
    _, result, expected = case.launch(OnGpu(cuda.compile(case.source, case.name, case.template)))
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


@needs_gpu
def test_a_launch_goes_to_the_current_stream():
    add = cuda.compile("__global__ void k(float* x) { x[threadIdx.x] += 1.f; }")
    x, stream = torch.zeros(32, device="cuda"), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        add[1, 32](x)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            add[1, 32](x)
    graph.replay()  # the captured launch runs again: it was on the stream that was captured
    graph.replay()
    torch.cuda.synchronize()
    assert x.tolist() == [3.0] * 32


@pytest.mark.parametrize("name", MISTAKES)
def test_the_cpu_reports_the_mistake(name):
    _, source = MISTAKES[name]
    report = cuda.compile(source).check[1, 128](np.zeros(128, np.float32))
    assert not report.ok
    assert report.problems


@needs_gpu
@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("name", MISTAKES)
def test_compute_sanitizer_reports_the_same_mistake(name):
    tool, source = MISTAKES[name]
    program = (f"import torch; from utils import cuda; x = torch.zeros(128, device='cuda')\n"
               f"cuda.compile({source!r})[1, 128](x); torch.cuda.synchronize()")  # fmt: skip
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, check=False)
    assert done.returncode != 0
    assert "ERROR SUMMARY: 0 errors" not in done.stdout


def test_the_recorded_run_says_where_and_when_it_was_made():
    path = ROOT / "data/recorded/cuda_gpu.json"
    if not path.exists():
        pytest.skip("nobody has run data/recorded/cuda_gpu.py on a GPU yet")
    recorded = json.loads(path.read_text(encoding="utf-8"))
    assert {"machine", "date", "command", "outcomes"} <= set(recorded)
    assert recorded["outcomes"]
