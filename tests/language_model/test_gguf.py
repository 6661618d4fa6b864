"""The reader of GGUF files, held to the package `gguf` of the people who made the format."""

import struct

import numpy as np
import pytest

from utils import language_model
from utils.language_model import files
from utils.language_model.gguf import GGUF


@pytest.fixture(scope="module")
def both():
    """The model's file, read by the course and by `gguf`."""
    if language_model.problem():
        pytest.skip(language_model.problem())
    from gguf import GGUFReader

    return GGUF(files.path()), GGUFReader(files.path())


def test_every_tensor_is_that_of_the_package_bit_for_bit(both):
    from gguf.quants import dequantize

    ours, theirs = both
    assert list(ours.shapes) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine, right = ours.tensor(tensor.name), dequantize(tensor.data, tensor.tensor_type)
        assert mine.dtype == np.float32 and mine.shape == right.shape == ours.shapes[tensor.name]
        assert np.array_equal(mine.view(np.uint32), right.view(np.uint32)), tensor.name


def test_the_metadata_is_that_of_the_package(both):
    ours, theirs = both
    right = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert list(ours.metadata) == list(right)
    for key, field in right.items():
        assert (ours.metadata[key] == field.contents()) is True, key


def test_the_file_is_the_one_that_was_tested(both):
    files.check_content(files.path())
    assert files.path().stat().st_size == files.SIZE


def test_a_changed_byte_is_seen(tmp_path):
    other = tmp_path / files.FILE
    other.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match="must have the SHA-256 b179c9523d0e"):
        files.check_content(other)


def test_another_file_is_refused_in_one_sentence(tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(ValueError, match="must be a GGUF file of version 2 or 3"):
        GGUF(other)


def test_a_type_that_is_not_read_is_named(tmp_path):
    name = b"weight"
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
    tensor = struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 32, 2, 0)  # type 2 is Q4_0
    (tmp_path / "file").write_bytes(header + tensor + bytes(200))
    with pytest.raises(ValueError, match="tensor weight must be of type F32, Q4_1 or Q8_0"):
        GGUF(tmp_path / "file").tensor("weight")


def test_blocks_by_hand(tmp_path):
    """Q4_1: 16 bytes hold 32 halves, the low ones first. Q8_0: scale times signed byte."""
    q4 = np.float16(0.5).tobytes() + np.float16(-2).tobytes() + bytes([0x31] * 16)
    q8 = np.float16(0.25).tobytes() + np.arange(-16, 16, dtype=np.int8).tobytes()
    entries = b"".join(
        struct.pack("<Q", 1) + name + struct.pack("<IQIQ", 1, 32, kind, offset)
        for name, kind, offset in ((b"a", 3, 0), (b"b", 8, 32))
    )
    header = b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + entries
    (tmp_path / "file").write_bytes(header + bytes(-len(header) % 32) + q4 + bytes(12) + q8)
    file = GGUF(tmp_path / "file")
    assert file.tensor("a").tolist() == [-1.5] * 16 + [-0.5] * 16
    assert file.tensor("b").tolist() == [0.25 * i for i in range(-16, 16)]
