"""The process in which kernels run, so that nothing a kernel does can take the notebook down.

Started by process.py as a script, with the standard library alone (it is ready in some twenty milliseconds). Messages
are marshalled tuples with their length in front: requests on standard input, replies on what was standard output.
Arrays lie in memory shared with the parent.
"""

import ctypes
import marshal
import mmap
import os
import queue
import signal
import struct
import sys
import threading

TIME_LIMIT = 86  # exit status: the kernel ran longer than it may
ALIGNMENT = 64  # bytes, of each argument
PROBLEM_BYTES, TRAFFIC_BYTES, TRACED_BYTES, FIRST_GLOBAL = (
    176,
    64,
    40,
    256,
)  # as in runtime/{problems,traffic,trace,memory}.h
ALL_GLOBAL, ALL_SHARED = -1, -2  # as in runtime/workers.h


def read_exactly(stream, count):
    """`count` bytes, or fewer at the end of the stream."""
    data = b""
    while len(data) < count and (more := stream.read(count - len(data))):
        data += more
    return data


def read_message(stream):
    """The next message, or None at the end of the stream."""
    header = read_exactly(stream, 4)
    if len(header) < 4:
        return None
    body = read_exactly(stream, struct.unpack("=I", header)[0])
    try:
        return marshal.loads(body)
    except (EOFError, ValueError, TypeError):  # the sender died in the middle of it
        return None


def message_bytes(message):
    body = marshal.dumps(message)
    return struct.pack("=I", len(body)) + body


class Memory:
    """The shared memory, mapped anew when the parent has made it larger."""

    def __init__(self, place):
        self.file = int(place) if place.isdigit() else os.open(place, os.O_RDWR | getattr(os, "O_BINARY", 0))
        self.capacity = 0

    def address(self, capacity):
        if capacity != self.capacity:
            self.map = mmap.mmap(self.file, capacity)
            self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
            self.capacity = capacity
        return self.start


class Constant(ctypes.Structure):
    """As struct CuConstant in include/cpu/entry.h."""

    _fields_ = [
        ("address", ctypes.c_void_p),
        ("bytes", ctypes.c_uint),
        ("element", ctypes.c_uint),
        ("code", ctypes.c_char),
    ]


class Shape(ctypes.Structure):
    """As struct CuShape in include/cpu/runtime.h."""

    _fields_ = [("columns", ctypes.c_int), ("code", ctypes.c_char)]


class Library:
    """A compiled kernel."""

    def __init__(self, path, checked):
        self.c, self.checked = ctypes.CDLL(path), checked
        c = self.c
        c.cu_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_uint64] * 4]
        c.cu_problems.restype = ctypes.c_void_p
        c.cu_take_output.restype = ctypes.c_size_t
        self.entry = ctypes.cast(c.cu_entry, ctypes.c_void_p)
        table = (Constant * max(1, c.cu_constants(None)))()
        self.constants = table[: c.cu_constants(table)]
        self.initial = [ctypes.string_at(constant.address, constant.bytes) for constant in self.constants]
        if checked:
            c.cu_add_array.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
            c.cu_traffic.restype = c.cu_traced.restype = ctypes.c_void_p
            c.cu_trace.argtypes = [ctypes.c_uint64, ctypes.c_int]
            c.cu_workers.restype = ctypes.c_uint64
            c.cu_open(None)

    def describe(self):
        """The arguments as `(kind, code, size)`, the offset of every place in the kernel, and its constants as
        `(code, size of an element, bytes)`."""
        count = self.c.cu_signature(None)
        room = ctypes.create_string_buffer(8 * count)
        self.c.cu_signature(room)
        found = struct.iter_unpack("=BB2xI", room.raw)
        signature = [(chr(kind), chr(code) if code else "", size) for kind, code, size in found]
        offsets = ()
        if self.checked:
            offsets = (ctypes.c_uint32 * max(1, self.c.cu_open(None)))()
            offsets = list(offsets[: self.c.cu_open(offsets)])
        constants = [(c.code.decode().strip("\0"), c.element, c.bytes) for c in self.constants]
        return signature, offsets, constants

    def run(
        self, start, grid, block, dynamic_bytes, arguments, arrays, shift, threads, filled, schedule, traced, compared
    ):
        """Run the kernel; `start` is the address of the shared memory. Returns what report.py reads."""
        for i, (constant, initial) in enumerate(zip(self.constants, self.initial)):
            value = filled.get(i, initial)
            ctypes.memmove(constant.address, value, len(value))
        values = [struct.pack("=Q", start + a) if isinstance(a, int) else a for a in arguments]
        area = ctypes.create_string_buffer(sum(len(v) + ALIGNMENT for v in values) + ALIGNMENT)
        pointers, at = (ctypes.c_void_p * max(1, len(values)))(), ctypes.addressof(area)
        for i, value in enumerate(values):
            at = -(-at // ALIGNMENT) * ALIGNMENT
            ctypes.memmove(at, value, len(value))
            pointers[i], at = at, at + len(value)
        grid, block = (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block)

        def run_part(part):
            count = self.c.cu_run(self.entry, pointers, grid, block, dynamic_bytes, part, threads, schedule)
            more = ctypes.c_int()
            problems = self.c.cu_problems(ctypes.byref(more))
            result["more_problems"] |= bool(more.value)
            return ctypes.string_at(problems, count * PROBLEM_BYTES)

        result = {"more_problems": False}
        if self.checked:
            self.c.cu_trace(2**64 - 1 if traced is None else traced, compared)
            self.c.cu_begin(shift)
            for offset, size, element, writable in arrays:
                self.c.cu_add_array(start + offset, size, element, writable)
            result["problems"] = run_part(0)
            result.update(self.results(len(arrays)))
            self.c.cu_end()
        elif threads == 1:
            result["problems"] = run_part(0)
        else:
            result["problems"] = b"".join(pool().map(run_part, range(threads)))
        text = ctypes.c_char_p()
        size = self.c.cu_take_output(ctypes.byref(text))
        result["output"] = ctypes.string_at(text, size) if size else b""
        return result

    def where(self):
        """Of a kernel that does not end: (place or None, thread, block)."""
        if not self.checked:
            return None
        out = (ctypes.c_uint32 * 6)()
        self.c.cu_where(out)
        known, place, thread, *block = out
        return place if known else None, thread, block

    def results(self, n_arrays):
        count = ctypes.c_int()
        table = self.c.cu_traffic(ctypes.byref(count))
        traffic = ctypes.string_at(table, count.value * TRAFFIC_BYTES)
        shared, shapes, shape = [], [], Shape()
        name, size, element = ctypes.c_char_p(), ctypes.c_uint64(), ctypes.c_int()
        while self.c.cu_shared_array(len(shared), *map(ctypes.byref, (name, size, element, shape))):
            shared.append((name.value.decode(), size.value, element.value))
            shapes.append((shape.columns, shape.code.decode().strip("\0")))
        entries = self.c.cu_traced(ctypes.byref(count))
        trace = ctypes.string_at(entries, count.value * TRACED_BYTES) if entries else b""
        unchecked = [i for i in range(n_arrays) if self.c.cu_races_unchecked(FIRST_GLOBAL + i)]
        distinct, loaded, stored = [], ctypes.c_uint64(), ctypes.c_uint64()
        for i in range(n_arrays):
            self.c.cu_distinct_bytes(FIRST_GLOBAL + i, ctypes.byref(loaded), ctypes.byref(stored))
            distinct.append((loaded.value, stored.value))
        regions = [*range(FIRST_GLOBAL, FIRST_GLOBAL + n_arrays), ALL_GLOBAL, ALL_SHARED]
        workers = [(self.c.cu_workers(i, 0), self.c.cu_workers(i, 1)) for i in regions]
        return {
            "traffic": traffic,
            "shared": shared,
            "shapes": shapes,
            "distinct": distinct,
            "workers": workers,
            "races_unchecked": unchecked,
            "trace": trace,
        }


_pool = None


def pool():
    """One thread for each core; each keeps its fibers between launches."""
    global _pool
    if _pool is None:
        from concurrent.futures import ThreadPoolExecutor

        _pool = ThreadPoolExecutor(os.cpu_count() or 1)
    return _pool


def watch(started, finished, replies):
    """End the process if a launch takes longer than its limit; nothing gentler stops an endless loop."""
    while True:
        limit, library = started.get()
        if not finished.acquire(timeout=limit):
            replies.write(message_bytes((TIME_LIMIT, library.where())))
            os._exit(TIME_LIMIT)


def listen(stream, requests):
    """Pass requests on. The end of the stream means that the parent is gone, whatever a kernel is doing."""
    while (message := read_message(stream)) is not None:
        requests.put(message)
    os._exit(0)


def main():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt stops
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # nothing else may write between the replies
    memory, libraries = Memory(sys.argv[1]), {}
    requests, started, finished = queue.SimpleQueue(), queue.SimpleQueue(), threading.Semaphore(0)
    threading.Thread(target=listen, args=(sys.stdin.buffer, requests), daemon=True).start()
    threading.Thread(target=watch, args=(started, finished, replies), daemon=True).start()
    while True:
        path, checked, launch = requests.get()
        try:
            try:
                if path not in libraries:
                    libraries[path] = Library(path, checked)
            except (OSError, AttributeError) as error:  # a damaged file
                replies.write(message_bytes(str(error).encode()))
                continue
            if launch is None:
                reply = libraries[path].describe()
            else:
                capacity, limit, *rest = launch
                start = memory.address(capacity)
                started.put((limit, libraries[path]))
                try:
                    reply = libraries[path].run(start, *rest)
                finally:
                    finished.release()
        except (OSError, ValueError, TypeError, AttributeError, struct.error) as error:
            reply = f"{type(error).__name__}: {error}"
        replies.write(message_bytes(reply))


if __name__ == "__main__":
    main()
