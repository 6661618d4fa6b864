"""The fixture `compiler`: a test that asks for it runs once under g++ and once under zig."""

import shutil

import pytest

from utils.cuda.cpu.toolchain import zig_command


@pytest.fixture(params=["g++", "zig"])
def compiler(request, monkeypatch):
    present = zig_command() is not None if request.param == "zig" else shutil.which(request.param) is not None
    if not present:
        pytest.skip(f"{request.param} is not installed")
    monkeypatch.setenv("CUDA_COURSE_CXX", request.param)
    return request.param
