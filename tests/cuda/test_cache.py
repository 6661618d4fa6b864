"""The cache of compiled kernels: it heals, nobody else writes to it, and it is found again."""

import json
import os
import stat
import subprocess
import sys
import tempfile
import textwrap

import numpy as np
import pytest

from utils import cuda
from utils.cuda import binary
from utils.cuda.cpu import cache, process, toolchain
from utils.paths import ROOT

pytestmark = pytest.mark.slow  # each test compiles the runtime in a folder of its own

SOURCE = "__global__ void twice(float* x) { x[threadIdx.x] *= 2.f; }"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_COURSE_CACHE", str(tmp_path))
    binary.build.cache_clear()
    yield tmp_path
    binary.build.cache_clear()


def works(how="check"):
    x = np.ones(32, np.float32)
    report = getattr(cuda.compile(SOURCE), how)[1, 32](x)
    return (x == 2).all() and (how == "fast" or (report.ok and report.global_loaded == 128))


def in_a_new_process(folder, **environment):
    """Whether the kernel works there, and what was written on the way."""
    script = f"""
import numpy as np
from utils import cuda
from utils.cuda.cpu import cache
x = np.ones(32, np.float32)
cuda.compile({SOURCE!r})[1, 32](x)
print(cache.folder(), (x == 2).all())"""
    environment = {**os.environ, "CUDA_COURSE_CACHE": str(folder), **environment}
    environment = {name: value for name, value in environment.items() if value is not None}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


DAMAGE = {
    "cut in half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "one bit": lambda data: data[: len(data) // 3] + bytes([data[len(data) // 3] ^ 1]) + data[len(data) // 3 + 1 :],
    "something else": lambda data: b"null",
    "gone": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "pattern", ["*" + toolchain.LIBRARY_SUFFIX, f"*{toolchain.LIBRARY_SUFFIX}.json", "runtime-*.o", "runtime-*.o.json"]
)
def test_a_damaged_file_is_made_again(folder, pattern, damage):
    assert works()
    (file,) = folder.glob(pattern)
    content = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(DAMAGE[damage](content))
    if pattern.startswith("runtime"):
        for other in folder.glob("*" + toolchain.LIBRARY_SUFFIX):
            other.unlink()
    binary.build.cache_clear()  # as a new process finds it
    process.worker().close()
    assert works()
    assert cache.find(next(folder.glob("*" + toolchain.LIBRARY_SUFFIX))) is not None
    json.loads(next(folder.glob("runtime-*.o.json")).read_text())


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("how", ["check", "fast"])
def test_a_library_damaged_while_it_is_in_use_is_made_again(folder, how, damage):
    kernel = cuda.compile(SOURCE)
    assert works(how)
    for file in folder.glob("*" + toolchain.LIBRARY_SUFFIX):
        content = file.read_bytes()
        file.unlink()
        if damage != "gone":
            file.write_bytes(DAMAGE[damage](content))
    process.worker().close()  # the next one loads it anew
    x = np.ones(32, np.float32)
    getattr(kernel, how)[1, 32](x)
    assert (x == 2).all()


def test_a_crash_is_still_the_kernels_where_the_library_is_whole(folder):
    kernel = cuda.compile("__global__ void wild(float* x) { x[1ll << 40] = 1.f; }")
    with pytest.raises(cuda.KernelError, match="CRASH: wild"):
        kernel.fast[1, 1](np.zeros(1, np.float32))


def test_a_folder_that_disappears_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_COURSE_CACHE", str(tmp_path / "a/b"))
    assert works()
    subprocess.run(["rm", "-rf", str(tmp_path / "a")], check=True)
    binary.build.cache_clear()
    assert works() and (tmp_path / "a/b").is_dir()


posix = pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has no owners and modes of this kind")


@posix
def test_a_new_folder_is_for_its_owner_alone(tmp_path):
    in_a_new_process(tmp_path / "new")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


@posix
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_that_others_may_write_to_is_not_used(tmp_path, mode):
    shared, own = tmp_path / "shared", tmp_path / "tmp"
    shared.mkdir()
    own.mkdir()
    shared.chmod(mode)
    used, right = in_a_new_process(shared, TMPDIR=str(own))
    assert right == "True" and used == f"{own}/attention-course-{os.getuid()}" and not list(shared.iterdir())


@posix
@pytest.mark.parametrize("trap", ["writable", "link", "file"])
def test_a_folder_laid_out_in_advance_under_the_known_name_is_not_used(tmp_path, trap):
    own = tmp_path / "tmp"
    known = own / f"attention-course-{os.getuid()}"
    own.mkdir()
    if trap == "writable":
        known.mkdir()
        known.chmod(0o777)
    elif trap == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        known.symlink_to(tmp_path / "elsewhere")
    else:
        known.touch()
    used, right = in_a_new_process("/proc/nowhere", TMPDIR=str(own))
    assert right == "True" and used.startswith(f"{own}/attention-course-") and used != str(known)
    assert not os.path.exists(used), "a new folder goes with its process"
    assert trap != "link" or not list((tmp_path / "elsewhere").iterdir())


@posix
@pytest.mark.skipif(hasattr(os, "getuid") and os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_not_used(tmp_path):
    other, own = tmp_path / "other", tmp_path / "tmp"
    other.mkdir()
    own.mkdir()
    os.chown(other, 12345, 12345)
    used, right = in_a_new_process(other, TMPDIR=str(own))
    assert right == "True" and used.startswith(str(own))


@posix
@pytest.mark.parametrize("home", ["/proc/nowhere", "/", ""])
def test_without_a_home_that_can_be_written_kernels_run_all_the_same(tmp_path, home):
    used, right = in_a_new_process(
        "", HOME=home, XDG_CACHE_HOME=None if home else "/proc/nowhere", TMPDIR=str(tmp_path)
    )
    assert right == "True" and (home == "/" or used.startswith(str(tmp_path)))


def test_where_no_folder_can_be_written_a_sentence_says_so(monkeypatch):
    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setenv("CUDA_COURSE_CACHE", "/proc/nowhere")
    monkeypatch.setattr(cache, "_is_ours", lambda path: False)
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    cache._folder.cache_clear()
    with pytest.raises(
        cuda.CompileError, match="no folder for compiled kernels can be written .*: name one in CUDA_COURSE_CACHE"
    ):
        cuda.compile(SOURCE + "// another")
    cache._folder.cache_clear()


def test_a_process_that_is_killed_in_the_middle_leaves_nothing_half_done(tmp_path):
    script = textwrap.dedent(f"""
        import os
        from utils import cuda
        from utils.cuda.cpu import cache
        move, moved = os.replace, []
        def replace(a, b):
            moved.append(b)
            if len(moved) == int(os.environ["AT"]):
                os._exit(9)
            move(a, b)
        os.replace = replace
        cuda.compile({SOURCE!r})""")
    for at in range(1, 5):
        environment = {**os.environ, "CUDA_COURSE_CACHE": str(tmp_path / str(at)), "AT": str(at)}
        done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, check=False)
        assert done.returncode == 9
        assert in_a_new_process(tmp_path / str(at))[1] == "True"
