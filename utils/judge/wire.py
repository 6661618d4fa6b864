"""What comes back from the process that tries answers: numbers and text, as JSON and bytes that cannot be executed."""

import json
import struct
from typing import NamedTuple

import numpy as np

MAGIC = b"ANSWER"
HEAD = struct.Struct(">6sQQ")  # magic, bytes of JSON, bytes of arrays
LARGEST = 2**31  # bytes of one reply
PLAIN = "biufc"  # kinds of dtype that hold numbers


class Value(NamedTuple):
    """One returned object. `array` is None for what is neither an array, a tensor nor a set of numbers."""

    type_name: str
    array: np.ndarray | None
    name: str = ""


class Error(NamedTuple):
    type_name: str
    message: str
    frames: list[tuple[str, int]]  # file and line, outermost first


class Reply(NamedTuple):
    number: int  # of the request
    state: str  # "done", or what the process does: "running", "importing"
    values: list[Value] = []
    is_tuple: bool = False
    changed: list[int | str] = []  # positions or names of the arguments changed in place
    error: Error | None = None
    printed: str = ""
    largest: int = 0  # elements of the largest array that went through exp, where the request asks for it
    odd: str = ""  # what the answer left changed in its process


class Broken(Exception):
    """What came is no reply: something else wrote into the pipe, or it has ended."""

    ended = False


def write(stream, reply):
    described, data = [], []
    for value in reply.values:
        array = None if value.array is None else np.ascontiguousarray(value.array)
        kept = None if array is None else [array.dtype.str, np.shape(value.array)]
        described.append([value.type_name, kept, value.name])
        data.append(b"" if array is None else array.tobytes())
    text = json.dumps(reply._replace(values=described)).encode()
    blob = b"".join(data)
    stream.write(HEAD.pack(MAGIC, len(text), len(blob)) + text + blob)
    stream.flush()


def read(stream):
    """The next Reply of a stream. Raises Broken."""
    try:
        magic, n_text, n_blob = HEAD.unpack(_exactly(stream, HEAD.size))
        if magic != MAGIC or n_text + n_blob > LARGEST:
            raise Broken("what came is no reply")
        reply = Reply(*json.loads(_exactly(stream, n_text)))
        values = _values(reply.values, _exactly(stream, n_blob))
        error = reply.error and Error(
            str(reply.error[0]), str(reply.error[1]), [(str(f), int(n)) for f, n in reply.error[2]]
        )
        return reply._replace(values=values, error=error, printed=str(reply.printed), odd=str(reply.odd))
    except Broken:
        raise
    except Exception as error:  # anything may stand there
        raise Broken(type(error).__name__) from None


def _exactly(stream, n):
    data = stream.read(n)
    if len(data) < n:
        broken = Broken("the pipe has ended")
        broken.ended = True
        raise broken
    return data


def _values(described, blob):
    values, at = [], 0
    for type_name, kept, name in described:
        array = None
        if kept is not None:
            dtype = np.dtype(kept[0])
            if dtype.kind not in PLAIN:
                raise Broken(f"an array of {dtype}")
            n = int(np.prod(kept[1], dtype=int)) * dtype.itemsize
            array = np.frombuffer(blob[at : at + n], dtype).reshape(kept[1]).copy()
            at += n
        values.append(Value(str(type_name), array, str(name)))
    return values
