"""Random kernels of the subset, each with its meaning in NumPy, statement by statement over all threads at once.

`Program(seed)` has `.source`, `.expected(x)` and `.barriers`, the lines of its barriers; each is needed. Numbers are 32-bit
and unsigned, so that nothing is undefined and nothing rounds.
"""

import numpy as np

THREADS, REGISTERS = 96, 4
HEAD = """template <int STEP> __device__ unsigned mix(unsigned a, unsigned b) {
  unsigned c = a * 2654435761u + b;
  for (int i = 0; i < STEP; ++i) c ^= c >> 7 + i;
  return c;
}
struct Pair { unsigned low, high; };
__device__ Pair both(unsigned a, unsigned b) { return {a & b, a | b}; }
"""


def mix(a, b, steps):
    c = (a * np.uint32(2654435761) + b).astype(np.uint32)
    for i in range(steps):
        c ^= c >> np.uint32(7 + i)
    return c


class Program:
    """One kernel `fuzz(const unsigned* x, unsigned* y)` for a block of 96 threads."""

    def __init__(self, seed, statements=14):
        self.rng, self.lines, self.meaning, self.barriers = np.random.default_rng(seed), [], [], []
        self.head = HEAD.count("\n") + 4
        kinds = (self.arithmetic, self.branch, self.loop, self.divergent_loop, self.exchange, self.shuffle, self.vote,
                 self.function, self.add_up, self.pairs)  # fmt: skip
        for kind in self.rng.permutation(np.arange(statements) % len(kinds)):
            kinds[kind]()
        load = "\n".join(f"  unsigned r{k} = x[i * {REGISTERS} + {k}];" for k in range(1, REGISTERS))
        self.source = (
            HEAD
            + f"__global__ void fuzz(const unsigned* x, unsigned* y) {{\n  __shared__ unsigned s[{THREADS}], t[{THREADS}];"
            + f"  unsigned i = threadIdx.x, lane = i % 32, r0 = x[i * {REGISTERS}];\n"
            + load.replace("\n", " ")
            + "\n"
            + "\n".join(self.lines)
            + f"\n  y[i] = {' + '.join(f'r{k} * {2 * k + 1}u' for k in range(REGISTERS))};\n}}\n"
        )

    def expected(self, x):
        """What the kernel must write, for x (96, 4)."""
        state = [x[:, k].copy() for k in range(REGISTERS)]
        for meaning in self.meaning:
            meaning(state)
        return sum(state[k] * np.uint32(2 * k + 1) for k in range(REGISTERS)).astype(np.uint32)

    def register(self):
        return int(self.rng.integers(REGISTERS))

    def two(self):
        return (int(n) for n in self.rng.choice(REGISTERS, 2, replace=False))

    def put(self, text, meaning):
        self.lines.append(f"  {text}")
        self.meaning.append(meaning)

    def barrier(self):
        self.lines.append("  __syncthreads();")
        self.barriers.append(self.head + len(self.lines) - 1)

    def arithmetic(self):
        (a, b), c = self.two(), int(self.rng.integers(1, 1 << 31))  # r - (r + c) would need no r
        op = ("+", "*", "^", "-")[self.rng.integers(4)]
        functions = {"+": np.add, "*": np.multiply, "^": np.bitwise_xor, "-": np.subtract}

        def meaning(state):
            state[a] = functions[op](state[a], state[b] + np.uint32(c))

        self.put(f"r{a} = r{a} {op} (r{b} + {c}u);", meaning)

    def branch(self):
        a, b = self.two()
        n = int(self.rng.integers(2, 6))

        def meaning(state):
            yes = state[b] % np.uint32(n) == 0
            state[a] = np.where(yes, state[a] * np.uint32(3), state[a] ^ state[b])

        self.put(f"if (r{b} % {n}u == 0u) r{a} *= 3u; else r{a} ^= r{b};", meaning)

    def loop(self):
        a, n = self.register(), int(self.rng.integers(2, 9))

        def meaning(state):
            for j in range(n):
                state[a] = state[a] * np.uint32(5) + np.uint32(j)

        self.put(f"#pragma unroll\n  for (int j = 0; j < {n}; ++j) r{a} = r{a} * 5u + j;".replace("\n", " ")
                 .replace("#pragma unroll ", ""), meaning)  # fmt: skip

    def divergent_loop(self):
        a, b = self.two()

        def meaning(state):
            times = state[b] % np.uint32(7)
            for j in range(7):
                state[a] = np.where(j < times, state[a] + (state[a] >> np.uint32(3)) + np.uint32(j), state[a])

        self.put(f"for (unsigned j = 0; j < r{b} % 7u; ++j) r{a} += (r{a} >> 3) + j;", meaning)

    def exchange(self):
        a, b = self.two()
        k = int(self.rng.integers(33, 63))  # to another warp, so that each barrier is needed
        which = "st"[self.rng.integers(2)]

        def meaning(state):
            state[b] = state[b] + np.roll(state[a], -k)

        self.put(f"{which}[i] = r{a};", lambda state: None)
        self.barrier()
        self.put(f"r{b} += {which}[(i + {k}) % {THREADS}];", meaning)
        self.barrier()

    def shuffle(self):
        a, b = self.two()
        x = int(self.rng.integers(1, 32))

        def meaning(state):
            other = state[a].reshape(-1, 32)[:, np.arange(32) ^ x].ravel()
            down = state[a].reshape(-1, 32)
            down = np.concatenate([down[:, 3:], down[:, 29:]], axis=1).ravel()
            state[b] = state[b] ^ (other + down)

        self.put(f"r{b} ^= __shfl_xor_sync(0xffffffffu, r{a}, {x}) + __shfl_down_sync(0xffffffffu, r{a}, 3);", meaning)

    def vote(self):
        a = self.register()

        def meaning(state):
            odd = (state[a] & np.uint32(1)).reshape(-1, 32)
            ballot = (odd.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
            state[a] = state[a] + np.repeat(ballot, 32)

        self.put(f"r{a} += __ballot_sync(0xffffffffu, r{a} & 1u);", meaning)

    def function(self):
        a, b = self.two()
        n = int(self.rng.integers(1, 4))

        def meaning(state):
            state[a] = mix(state[a], state[b], n)

        self.put(f"r{a} = mix<{n}>(r{a}, r{b});", meaning)

    def pairs(self):
        a, b = self.two()

        def meaning(state):
            state[a], state[b] = state[a] & state[b], state[a] | state[b]

        self.put(f"{{ Pair p = both(r{a}, r{b}); r{a} = p.low; r{b} = p.high; }}", meaning)

    def add_up(self):
        a, b = self.two()

        def meaning(state):
            bins = np.zeros(8, np.uint32)
            np.add.at(bins, (state[a] % np.uint32(8)).astype(int), state[a])
            state[b] = state[b] + bins[np.arange(THREADS) * 5 % 8]

        self.put("if (i < 8u) s[i] = 0u;", lambda state: None)
        self.barrier()
        self.put(f"atomicAdd(&s[r{a} % 8u], r{a});", lambda state: None)
        self.barrier()
        self.put(f"r{b} += s[i * 5u % 8u];", meaning)
        self.barrier()
