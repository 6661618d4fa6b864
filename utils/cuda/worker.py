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

TIME_LIMIT = 86          # exit status: the kernel ran longer than it may
ALIGNMENT = 64           # bytes, of each argument
PROBLEM_BYTES, TRAFFIC_BYTES, FIRST_GLOBAL = 176, 64, 16          # as in runtime/problems.h, traffic.h and memory.h


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
    except (EOFError, ValueError, TypeError):          # the sender died in the middle of it
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


class Library:
    """A compiled kernel."""

    def __init__(self, path, checked):
        self.c, self.checked = ctypes.CDLL(path), checked
        c = self.c
        c.cu_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_uint64] * 3]
        c.cu_problems.restype = ctypes.c_void_p
        c.cu_take_output.restype = ctypes.c_size_t
        self.entry = ctypes.cast(c.cu_entry, ctypes.c_void_p)
        if checked:
            c.cu_add_array.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
            c.cu_traffic.restype = ctypes.c_void_p
            c.cu_open(None)

    def describe(self):
        """The arguments as `(kind, code, size)`, and the offset of every place in the kernel."""
        room = ctypes.create_string_buffer(4 * 256)
        count = self.c.cu_signature(room)
        found = struct.iter_unpack("=BBH", room.raw[:4 * count])
        signature = [(chr(kind), chr(code) if code else "", size) for kind, code, size in found]
        offsets = ()
        if self.checked:
            offsets = (ctypes.c_uint32 * max(1, self.c.cu_open(None)))()
            offsets = list(offsets[:self.c.cu_open(offsets)])
        return signature, offsets

    def run(self, start, grid, block, dynamic_bytes, arguments, arrays, shift, threads):
        """Run the kernel; `start` is the address of the shared memory. Returns what report.py reads."""
        values = [struct.pack("=Q", start + a) if isinstance(a, int) else a for a in arguments]
        area = ctypes.create_string_buffer(sum(len(v) + ALIGNMENT for v in values) + ALIGNMENT)
        pointers, at = (ctypes.c_void_p * max(1, len(values)))(), ctypes.addressof(area)
        for i, value in enumerate(values):
            at = -(-at // ALIGNMENT) * ALIGNMENT
            ctypes.memmove(at, value, len(value))
            pointers[i], at = at, at + len(value)
        grid, block = (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block)

        def run_part(part):
            count = self.c.cu_run(self.entry, pointers, grid, block, dynamic_bytes, part, threads)
            return ctypes.string_at(self.c.cu_problems(), count * PROBLEM_BYTES)

        result = {}
        if self.checked:
            self.c.cu_begin(shift)
            for name, offset, size, element, writable in arrays:
                self.c.cu_add_array(name.encode(), start + offset, size, element, writable)
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

    def results(self, n_arrays):
        count = ctypes.c_int()
        table = self.c.cu_traffic(ctypes.byref(count))
        traffic = ctypes.string_at(table, count.value * TRAFFIC_BYTES)
        shared, name, size, element = [], ctypes.c_char_p(), ctypes.c_uint64(), ctypes.c_int()
        while self.c.cu_shared_array(len(shared), ctypes.byref(name), ctypes.byref(size), ctypes.byref(element)):
            shared.append((name.value.decode(), size.value, element.value))
        unchecked = [i for i in range(n_arrays) if self.c.cu_races_unchecked(FIRST_GLOBAL + i)]
        distinct, loaded, stored = [], ctypes.c_uint64(), ctypes.c_uint64()
        for i in range(n_arrays):
            self.c.cu_distinct_bytes(FIRST_GLOBAL + i, ctypes.byref(loaded), ctypes.byref(stored))
            distinct.append((loaded.value, stored.value))
        return {"traffic": traffic, "shared": shared, "distinct": distinct, "races_unchecked": unchecked}


_pool = None


def pool():
    """One thread for each core; each keeps its fibers between launches."""
    global _pool
    if _pool is None:
        from concurrent.futures import ThreadPoolExecutor
        _pool = ThreadPoolExecutor(os.cpu_count() or 1)
    return _pool


def watch(started, finished):
    """End the process if a launch takes longer than its limit; nothing gentler stops an endless loop."""
    while True:
        if not finished.acquire(timeout=started.get()):
            os._exit(TIME_LIMIT)


def listen(stream, requests):
    """Pass requests on. The end of the stream means that the parent is gone, whatever a kernel is doing."""
    while (message := read_message(stream)) is not None:
        requests.put(message)
    os._exit(0)


def main():
    signal.signal(signal.SIGINT, signal.SIG_IGN)         # the parent decides what an interrupt stops
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)                                        # nothing else may write between the replies
    memory, libraries = Memory(sys.argv[1]), {}
    requests, started, finished = queue.SimpleQueue(), queue.SimpleQueue(), threading.Semaphore(0)
    threading.Thread(target=listen, args=(sys.stdin.buffer, requests), daemon=True).start()
    threading.Thread(target=watch, args=(started, finished), daemon=True).start()
    while True:
        path, checked, launch = requests.get()
        try:
            if path not in libraries:
                libraries[path] = Library(path, checked)
            if launch is None:
                reply = libraries[path].describe()
            else:
                capacity, limit, *rest = launch
                start = memory.address(capacity)
                started.put(limit)
                try:
                    reply = libraries[path].run(start, *rest)
                finally:
                    finished.release()
        except (OSError, ValueError, TypeError, AttributeError, struct.error) as error:      # no such library, say
            reply = f"{type(error).__name__}: {error}"
        replies.write(message_bytes(reply))


if __name__ == "__main__":
    main()
