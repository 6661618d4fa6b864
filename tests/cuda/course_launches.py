"""The launches that the course's public functions make, caught as they are made, for tests that change the kernels."""

import re
from dataclasses import dataclass

import numpy as np
import torch

import attention
from attention import differential, flash, linear, mixture
from utils.cuda import Kernel
from utils.cuda.structure import blocks
from utils.cuda.text import blank, line_at

BARRIER = re.compile(r"\b(?:__syncthreads|__syncwarp|__pipeline_wait_prior)\s*\([^;]*\)\s*;")


@dataclass(frozen=True)
class Launched:
    """A kernel, and what it was launched with: arrays as they were before."""

    kernel: Kernel
    shape: tuple
    arguments: tuple

    def __str__(self):
        return self.kernel.name

    def check(self, kernel):
        """The report of another kernel with the same arguments."""
        copies = [a.clone() if isinstance(a, torch.Tensor) else np.copy(a) if isinstance(a, np.ndarray) else a
                  for a in self.arguments]  # fmt: skip
        return kernel.check[self.shape](*copies)

    def barriers(self):
        """(start, end, line) of each barrier in the kernel and in the functions that it calls, also through others."""
        source = self.kernel.source
        bare, name = blank(source), self.kernel.name.split("<")[0]
        functions = [block for block in blocks(bare) if block.kind == "function"]
        reached = [b for b in functions if re.search(rf"\b{name}\s*\(", b.head)]
        for caller in reached:
            called = set(re.findall(r"\b(\w+)\s*(?:<[^;(){}]*>)?\s*\(", bare[caller.open : caller.close]))
            for block in functions:
                names = re.findall(r"\b(\w+)\s*\(", block.head)
                if block not in reached and called & set(names):
                    reached.append(block)
        return [
            (match.start(), match.end(), line_at(source, match.start()))
            for match in BARRIER.finditer(bare)
            if any(block.open < match.start() < block.close for block in reached)
        ]

    def without(self, start, end):
        """The kernel less a part of its source."""
        source = self.kernel.source
        return Kernel(source[:start] + ";" + source[end:], self.kernel.name.split("<")[0], self.kernel.template)


def course_launches():
    """One `Launched` for each kernel that the public functions use, on small arrays of several tiles."""
    found, original = {}, Kernel._fast

    def caught(kernel, grid, block, shared, arguments):
        kept = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)
        found.setdefault((kernel.name, kernel.source), Launched(kernel, (grid, block, shared), kept))
        return original(kernel, grid, block, shared, arguments)

    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    Kernel._fast = caught
    try:
        q, k, v = (normal(1, 1, n, 32) for n in (80, 144, 144))
        attention.attention_cuda(q, k, v)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            flash.flash_attention_cuda(q.to(dtype), k.to(dtype), v.to(dtype))
        for rung, dtype in (("rows", q.dtype), ("shared", q.dtype), ("large", q.dtype), ("mma", torch.float16)):
            kernel, launch, arguments = flash.flash_launch(rung, *(a[0].to(dtype) for a in (q, k, v)))
            kernel.fast[launch](*arguments)
        out, lse = flash.flash_attention_cuda(q, k, v)
        flash.flash_attention_backward_cuda(q, k, v, out, lse, normal(*out.shape))
        attention.softmax_rows_cuda(normal(3, 700))
        attention.softmax_rows_cuda(normal(1, 20_000))
        attention.matmul_cuda(normal(70, 50), normal(50, 70))
        x, weights = normal(1, 40, 64), [normal(64, 64) for _ in range(4)]
        attention.multi_head_attention_cuda(x, x, *weights, 2)
        attention.decode_attention_cuda(
            normal(1, 2, 32), normal(1, 2, 700, 32), normal(1, 2, 700, 32), torch.tensor([700])
        )
        attention.block_sparse_attention_cuda(q, k, v, torch.ones(5, 9, dtype=torch.bool), 16)
        attention.grouped_query_attention_cuda(normal(1, 4, 40, 32), normal(1, 2, 40, 32), normal(1, 2, 40, 32))
        attention.latent_decode_attention_cuda(
            normal(1, 4, 32), normal(1, 4, 16), normal(1, 70, 32), normal(1, 70, 16), torch.tensor([70]), 0.1
        )
        attention.block_sparse_attention_cuda(
            *(a.to(torch.float16) for a in (q, k, v)), torch.ones(2, 3, dtype=torch.bool), 64
        )
        q2, k2 = normal(*q.shape), normal(*k.shape)
        differential.differential_attention_cuda(q, k, q2, k2, v, 0.5)
        linear.linear_attention_cuda(q.abs(), k.abs(), v)
        linear.selective_scan_cuda(
            normal(1, 70, 40), normal(1, 70, 40).abs(), -normal(40, 16).abs(), normal(1, 70, 16), normal(1, 70, 16)
        )
        mixture.mixture_attention_cuda(
            normal(1, 70, 64), normal(64, 4), normal(4, 64, 32), normal(64, 32), normal(64, 32), normal(4, 32, 64), 2
        )
    finally:
        Kernel._fast = original
    return list(found.values())
