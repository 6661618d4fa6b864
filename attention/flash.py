# Generated from solutions/06_flash_attention.py by `python course.py build`. Edit that file, not this one.
"""Lecture 06 · Flash attention: the finished code."""

import datetime
import math
import tempfile
import time
from multiprocessing import connection
from pathlib import Path

import numpy as np
import torch
from torch import distributed, multiprocessing

from attention.fundamentals import check_arguments


def online_softmax(m, l, scores):
    """The softmax's running maximum m and sum l, after one more block of scores.

    m, l (...): of what was read before, -inf and 0 at the beginning; scores (..., width), -inf where a score may not be
    seen. Returns (m, l) of the same shapes in the float type of scores, with l the sum of exp(score - m) over all that
    was read; a row of nothing but -inf keeps -inf and 0.
    Source: Milakov and Gimelshein 2018 (arXiv 1805.02867), algorithm 3.
    """
    m_new = np.maximum(m, scores.max(axis=-1))
    finite = np.where(np.isneginf(m_new), 0, m_new)
    l_new = l * np.exp(m - finite) + np.exp(scores - finite[..., None]).sum(axis=-1)
    return m_new.astype(scores.dtype), l_new.astype(scores.dtype)


def merge_by_lse(outs, lses):
    """Attention over all keys, from attentions over disjoint sets of keys and their log-sum-exps.

    outs (n_parts, ..., n_queries, d_v), lses (n_parts, ..., n_queries): arrays or lists of arrays; -inf where a part
    had nothing to attend to. Returns (out, lse) of shapes (..., n_queries, d_v) and (..., n_queries), in the types of
    outs and lses; a query with nothing to attend to gets 0 and -inf.
    """
    outs, lses = np.asarray(outs), np.asarray(lses)
    top = lses.max(axis=0)
    finite = np.where(np.isneginf(top), 0, top)
    shares = np.exp(lses - finite)
    total = shares.sum(axis=0)
    out = (shares[..., None] * outs).sum(axis=0) / np.where(total == 0, 1, total)[..., None]
    with np.errstate(divide="ignore"):                     # the logarithm of an empty row is -inf, as it should be
        return out.astype(outs.dtype), finite + np.log(total)


def check_blocks(block_q, block_k):
    """Raise ValueError, in one sentence, unless both sizes of a tile are positive whole numbers."""
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if int(size) != size or size < 1:
            raise ValueError(f"{name} must be a positive whole number, got {size!r}")


def flash_attention_numpy(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    """Attention tile by tile: the output and the log-sum-exp of each row, without the matrix of scores, in NumPy.

    The oracle of flash_attention_torch and flash_attention_cuda.
    q (..., n_queries, d_head), k (..., n_keys, d_head), v (..., n_keys, d_v); causal is aligned at the bottom right;
    scale defaults to 1/sqrt(d_head). Returns out (..., n_queries, d_v) in the float type of q and lse (..., n_queries),
    at least in single precision; 0 and -inf for a query with nothing to attend to. The block sizes do not change the
    result beyond rounding. Raises ValueError when shapes do not fit or a block size is no positive whole number.
    Source: Dao 2023 (arXiv 2307.08691), algorithm 1.
    """
    check_arguments(q, k, v)
    check_blocks(block_q, block_k)
    work = np.result_type(q, np.float32)                   # half precision is computed in single
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    shift = n_keys - n_queries                             # query i may see the keys up to i + shift
    out = np.zeros((*lead, n_queries, v.shape[-1]), np.result_type(q, np.float16))
    lse = np.full((*lead, n_queries), -np.inf, work)
    for i in range(0, n_queries, block_q):
        rows = np.arange(i, min(i + block_q, n_queries))
        end = min(n_keys, rows[-1] + shift + 1) if causal else n_keys          # later keys are seen by none of the rows
        q_i = q[..., rows[0]:rows[-1] + 1, :].astype(work) * scale
        m = np.full((*lead, len(rows), 1), -np.inf, work)
        l, o = np.zeros_like(m), np.zeros((*lead, len(rows), v.shape[-1]), work)
        for j in range(0, end, block_k):
            k_j, v_j = (a[..., j:min(j + block_k, end), :].astype(work, copy=False) for a in (k, v))
            s = q_i @ np.swapaxes(k_j, -1, -2)
            columns = np.arange(j, j + s.shape[-1])
            if causal and columns[-1] > i + shift:                             # the diagonal crosses this tile
                s[..., columns > rows[:, None] + shift] = -np.inf
            m_new = np.maximum(m, s.max(axis=-1, keepdims=True))
            finite = np.where(np.isneginf(m_new), 0, m_new)
            p = np.exp(np.subtract(s, finite, out=s), out=s)                   # in the place of the scores
            factor = np.exp(m - finite)
            l = l * factor + p.sum(axis=-1, keepdims=True)
            o = o * factor + p @ v_j
            m = m_new
        out[..., rows, :] = o / np.where(l == 0, 1, l)
        with np.errstate(divide="ignore"):
            lse[..., rows] = (m + np.log(l))[..., 0]
    return out, lse


def causal_tiles(n_queries, n_keys, block_q, block_k):
    """Count the tiles of a causal matrix, aligned at the bottom right: (full, partial, skipped), three whole numbers.

    Full: every query of the tile may see every key of it; skipped: none may see any. Ragged last tiles count as one.
    Raises ValueError when a block size is no positive whole number.
    """
    check_blocks(block_q, block_k)
    full = partial = skipped = 0
    for i in range(0, n_queries, block_q):
        last_i, shift = min(i + block_q, n_queries) - 1, n_keys - n_queries
        for j in range(0, n_keys, block_k):
            last_j = min(j + block_k, n_keys) - 1
            if last_j <= i + shift:
                full += 1
            elif j <= last_i + shift:
                partial += 1
            else:
                skipped += 1
    return full, partial, skipped


def check_backward(q, k, v, out, lse, d_out):
    """Raise ValueError, in one sentence, unless what a backward pass is given fits together. For arrays and tensors."""
    check_arguments(q, k, v)
    lead = tuple(q.shape[:-2])
    shapes = {"k": (k, (*lead, *k.shape[-2:])), "v": (v, (*lead, *v.shape[-2:])), "lse": (lse, tuple(q.shape[:-1])),
              "out": (out, (*q.shape[:-1], v.shape[-1])), "d_out": (d_out, (*q.shape[:-1], v.shape[-1]))}
    for name, (array, expected) in shapes.items():
        if tuple(array.shape) != tuple(expected):
            raise ValueError(f"{name} must have the shape {tuple(expected)}, got {tuple(array.shape)}")

def backward_tiles(n_queries, n_keys, causal, block=64):
    """The tiles that a backward pass visits, keys outside: (slice of queries, slice of keys, mask or None) for each.

    The mask is boolean (rows, columns), True = may attend; None where all of a tile may.
    """
    shift = n_keys - n_queries
    for j in range(0, n_keys, block):
        for i in range(0, n_queries, block):
            rows, columns = slice(i, min(i + block, n_queries)), slice(j, min(j + block, n_keys))
            if not causal or columns.stop - 1 <= i + shift:
                yield rows, columns, None
            elif j <= rows.stop - 1 + shift:
                yield rows, columns, np.arange(j, columns.stop) <= np.arange(i, rows.stop)[:, None] + shift


def flash_attention_backward_numpy(q, k, v, out, lse, d_out, causal=False, scale=None):
    """Gradients of flash_attention_numpy's output with respect to q, k and v: weights are computed again, in NumPy.

    q, k, v, causal, scale as in flash_attention_numpy, with equal leading axes; out and lse are what it returned; d_out
    (..., n_queries, d_v). Returns (d_q, d_k, d_v) of the shapes and types of q, k, v; 0 for a query with nothing to
    attend to. Raises ValueError when shapes do not fit.
    Source: Dao 2023 (arXiv 2307.08691), algorithm 2.
    """
    check_backward(q, k, v, out, lse, d_out)
    work = np.result_type(q, np.float32)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    types = [np.result_type(a, np.float16) for a in (q, k, v)]
    q, k, v, out, d_out = (a.astype(work, copy=False) for a in (q, k, v, out, d_out))
    d_q, d_k, d_v = (np.zeros_like(a) for a in (q, k, v))
    lse = np.where(np.isneginf(lse), np.inf, lse)              # exp(s - inf) is 0: an empty row has no weights
    D = (d_out * out).sum(axis=-1)
    for rows, columns, allowed in backward_tiles(q.shape[-2], k.shape[-2], causal):
        q_i, d_out_i = q[..., rows, :], d_out[..., rows, :]
        k_j, v_j = k[..., columns, :], v[..., columns, :]
        s = q_i @ np.swapaxes(k_j, -1, -2) * scale
        if allowed is not None:
            s[..., ~allowed] = -np.inf
        p = np.exp(s - lse[..., rows, None])
        d_p = d_out_i @ np.swapaxes(v_j, -1, -2)
        d_s = p * (d_p - D[..., rows, None]) * scale
        d_v[..., columns, :] += np.swapaxes(p, -1, -2) @ d_out_i
        d_k[..., columns, :] += np.swapaxes(d_s, -1, -2) @ q_i
        d_q[..., rows, :] += d_s @ k_j
    return tuple(gradient.astype(type_, copy=False) for gradient, type_ in zip((d_q, d_k, d_v), types))


def flash_forward_torch(q, k, v, causal, scale, block_q, block_k):
    """The loops of flash_attention_numpy on tensors with equal leading axes: (out, lse). Records no gradient."""
    work = torch.promote_types(q.dtype, torch.float32)
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    shift, positions = n_keys - n_queries, torch.arange(max(n_queries, n_keys), device=q.device)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = torch.full(q.shape[:-1], -math.inf, dtype=work, device=q.device)
    for i in range(0, n_queries, block_q):
        stop = min(i + block_q, n_queries)
        end = min(n_keys, stop + shift) if causal else n_keys
        q_i = q[..., i:stop, :].to(work) * scale
        m = torch.full((*q_i.shape[:-1], 1), -math.inf, dtype=work, device=q.device)
        l, o = torch.zeros_like(m), torch.zeros(*q_i.shape[:-1], v.shape[-1], dtype=work, device=q.device)
        for j in range(0, end, block_k):
            j_stop = min(j + block_k, end)
            s = q_i @ k[..., j:j_stop, :].to(work).mT
            if causal and j_stop - 1 > i + shift:
                s.masked_fill_(positions[j:j_stop] > positions[i:stop, None] + shift, -math.inf)
            m_new = torch.maximum(m, s.amax(-1, keepdim=True))
            finite = m_new.masked_fill(m_new == -math.inf, 0)
            p, factor = torch.exp(s - finite), torch.exp(m - finite)
            l = l * factor + p.sum(-1, keepdim=True)
            o = o * factor + p @ v[..., j:j_stop, :].to(work)
            m = m_new
        out[..., i:stop, :] = (o / l.masked_fill(l == 0, 1)).to(out.dtype)
        lse[..., i:stop] = (m + torch.log(l))[..., 0]
    return out, lse


@torch.no_grad()
def flash_attention_backward_torch(q, k, v, out, lse, d_out, causal=False, scale=None):
    """Gradients as flash_attention_backward_numpy computes them, in PyTorch; arguments, shapes and errors as there."""
    check_backward(q, k, v, out, lse, d_out)
    work = torch.promote_types(q.dtype, torch.float32)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    types = [a.dtype for a in (q, k, v)]
    q, k, v, out, d_out = (a.detach().to(work) for a in (q, k, v, out, d_out))
    d_q, d_k, d_v = (torch.zeros_like(a) for a in (q, k, v))
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    D = (d_out * out).sum(-1)
    for rows, columns, allowed in backward_tiles(q.shape[-2], k.shape[-2], causal):
        s = q[..., rows, :] @ k[..., columns, :].mT * scale
        if allowed is not None:
            s.masked_fill_(~torch.from_numpy(allowed).to(q.device), -math.inf)
        p = torch.exp(s - lse[..., rows, None])
        d_s = p * (d_out[..., rows, :] @ v[..., columns, :].mT - D[..., rows, None]) * scale
        d_v[..., columns, :] += p.mT @ d_out[..., rows, :]
        d_k[..., columns, :] += d_s.mT @ q[..., rows, :]
        d_q[..., rows, :] += d_s @ k[..., columns, :]
    return tuple(gradient.to(type_) for gradient, type_ in zip((d_q, d_k, d_v), types))


class FlashAttention(torch.autograd.Function):
    """Flash attention as one operation of autograd: it keeps q, k, v, the output and one number for each row."""

    @staticmethod
    def forward(ctx, q, k, v, causal, scale, block_q, block_k):
        out, lse = flash_forward_torch(q, k, v, causal, scale, block_q, block_k)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal, ctx.scale = causal, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, _):
        gradients = flash_attention_backward_torch(*ctx.saved_tensors, d_out, ctx.causal, ctx.scale)
        return *gradients, None, None, None, None

def flash_attention_torch(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    """Attention tile by tile in PyTorch; arguments, shapes and errors as flash_attention_numpy.

    Differentiable in q, k and v through the output; the log-sum-exp carries no gradient. Half precision is computed in
    single.
    """
    check_arguments(q, k, v)
    check_blocks(block_q, block_k)
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = (t if t.is_floating_point() else t.double() for t in (q, k, v))
    q, k, v = (t.expand(*lead, *t.shape[-2:]) for t in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return FlashAttention.apply(q, k, v, causal, scale, block_q, block_k)


def flash_attention_varlen(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    """Flash attention of sequences packed one behind the other, each over its own keys: (out, lse), in NumPy.

    q (..., total_queries, d_head), k, v (..., total_keys, d); cu_queries, cu_keys integers (batch + 1,): sequence b has
    the queries cu_queries[b] to cu_queries[b + 1] and the keys cu_keys[b] to cu_keys[b + 1]. causal and scale as in
    flash_attention_numpy, for each sequence. Returns out (..., total_queries, d_v) and lse (..., total_queries).
    Raises ValueError when the two do not have the same length or do not go from 0 to the number of rows.
    """
    for name, cu, total in (("cu_queries", cu_queries, q.shape[-2]), ("cu_keys", cu_keys, k.shape[-2])):
        if len(cu) != len(cu_queries) or cu[0] != 0 or cu[-1] != total or (np.diff(cu) < 0).any():
            raise ValueError(f"{name} must rise from 0 to {total} in {len(cu_queries)} numbers, got {np.asarray(cu).tolist()}")
    parts = [flash_attention_numpy(q[..., cu_queries[b]:cu_queries[b + 1], :], k[..., cu_keys[b]:cu_keys[b + 1], :],
                                   v[..., cu_keys[b]:cu_keys[b + 1], :], causal, scale)
             for b in range(len(cu_queries) - 1)]
    return np.concatenate([out for out, _ in parts], axis=-2), np.concatenate([lse for _, lse in parts], axis=-1)


def attend_block(state, q, k, v, q_positions, k_positions, causal, scale):
    """Take one block of keys and values into a running attention: the new state (out, lse).

    state: out (..., n_queries, d_v) and lse (..., n_queries) over the blocks before, 0 and -inf at the beginning;
    q (..., n_queries, d_head), k, v (..., n_keys, d), positions integers (n_queries,) and (n_keys,).
    """
    s = q @ np.swapaxes(k, -1, -2) * scale
    if causal:
        s = np.where(k_positions <= q_positions[:, None], s, -np.inf)
    m, l = online_softmax(np.full(s.shape[:-1], -np.inf), np.zeros(s.shape[:-1]), s)
    p = np.exp(s - np.where(np.isneginf(m), 0, m)[..., None])
    with np.errstate(divide="ignore"):
        out, lse = p @ v / np.where(l == 0, 1, l)[..., None], m + np.log(l)
    return merge_by_lse([state[0], out], [state[1], lse])


def ring_attention_numpy(q, k, v, positions, causal=False, scale=None):
    """Ring attention in one process: each rank attends to the blocks of all ranks, one after another, and merges.

    q, k (n_ranks, n_local, d_head), v (n_ranks, n_local, d_v), positions integers (n_ranks, n_local): where each token
    stands in the sequence; causal: a query may see keys at its own position and before. scale defaults to
    1/sqrt(d_head). Returns (n_ranks, n_local, d_v).
    Source: Liu, Zaharia and Abbeel 2023 (arXiv 2310.01889), algorithm 1.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    results = np.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
    for rank in range(len(q)):
        state = results[rank], np.full(q.shape[1], -np.inf, q.dtype)
        for step in range(len(q)):
            held = (rank - step) % len(q)
            state = attend_block(state, q[rank], k[held], v[held], positions[rank], positions[held], causal, scale)
        results[rank] = state[0]
    return results


LOST_CONTACT = 5                                           # exit code of a rank whose neighbour went away

def ring_rank(rank, n_ranks, folder, shards, positions, causal, scale, time_limit, dies):
    """What one process of the ring runs. shards: its own q, k, v. Writes its output to a file in `folder`.

    dies: the rank that ends without a word before the last exchange, for the experiment, or None.
    """
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), n_ranks)
    try:
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=n_ranks,
                                       timeout=datetime.timedelta(seconds=time_limit))
        for step, state in enumerate(ring_steps(rank, n_ranks, *shards, positions, causal, scale)):
            if rank == dies and step == n_ranks - 2:
                raise SystemExit(3)
        np.save(folder / f"{rank}.npy", state[0])
        distributed.barrier()                              # nobody leaves while another still waits for a message
        distributed.destroy_process_group()
    except RuntimeError:                                   # gloo's, when a neighbour is gone or the time is up
        raise SystemExit(LOST_CONTACT) from None

def ring_steps(rank, n_ranks, q, k, v, positions, causal, scale):
    """The steps of one rank: sends its block on, receives the next, attends meanwhile. Yields its state after each."""
    state = np.zeros((len(q), v.shape[-1]), q.dtype), np.full(len(q), -np.inf, q.dtype)
    block = torch.from_numpy(np.concatenate([k, v], axis=-1))                   # one message for both
    for step in range(n_ranks):
        arriving, under_way = torch.empty_like(block), []
        if step < n_ranks - 1:
            under_way = [distributed.isend(block, (rank + 1) % n_ranks),
                         distributed.irecv(arriving, (rank - 1) % n_ranks)]
        keys, values = np.split(block.numpy(), [k.shape[-1]], axis=-1)
        state = attend_block(state, q, keys, values, positions[rank], positions[(rank - step) % n_ranks], causal, scale)
        for message in under_way:
            message.wait()
        block = arriving
        yield state


def wait_for(ranks, deadline, time_limit):
    """Return when all processes have ended well. RuntimeError as soon as one has not, and at the deadline."""
    while running := [rank for rank in ranks if rank.exitcode is None]:
        if not connection.wait([rank.sentinel for rank in running], max(0, deadline - time.monotonic())):
            late = [number for number, rank in enumerate(ranks) if rank.exitcode is None]
            raise RuntimeError(f"ranks {late} were not done after {time_limit:g} seconds; the ring was stopped")
        for number, rank in enumerate(ranks):
            if rank.exitcode not in (None, 0, LOST_CONTACT):
                raise RuntimeError(f"rank {number} of {len(ranks)} ended with exit code {rank.exitcode}; "
                                   "the ring was stopped")
    if lost := [number for number, rank in enumerate(ranks) if rank.exitcode == LOST_CONTACT]:
        raise RuntimeError(f"ranks {lost} of {len(ranks)} lost contact; the ring was stopped")

def ring_attention(q, k, v, n_ranks=4, causal=False, scale=None, striped=True, time_limit=120.0, dies=None):
    """Attention by a ring of processes on this machine, each with its share of the sequence. Returns (n, d_v).

    q, k (n, d_head), v (n, d_v), of one float type, n a multiple of n_ranks. striped: token i belongs to rank i mod
    n_ranks; otherwise each rank has a contiguous part. time_limit: seconds for everything, the start of the processes
    included. dies: a rank that ends in the middle, to see what happens then.
    Raises ValueError when shapes do not fit; RuntimeError, within the time limit, when a rank fails or is not done.
    """
    check_arguments(q, k, v)
    if q.ndim != 2 or len(q) != len(k) or len(q) % n_ranks:
        raise ValueError(f"q and k must have the shape (n, d_head) with n a multiple of {n_ranks}, got {q.shape} and {k.shape}")
    positions = np.arange(len(q)).reshape(-1, n_ranks).T if striped else np.arange(len(q)).reshape(n_ranks, -1)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    spawn, deadline = multiprocessing.get_context("spawn"), time.monotonic() + time_limit
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        ranks = [spawn.Process(target=ring_rank, daemon=True,
                               args=(rank, n_ranks, Path(name), (q[rows], k[rows], v[rows]), positions, causal, scale,
                                     time_limit, dies)) for rank, rows in enumerate(positions)]
        try:
            for rank in ranks:
                rank.start()
            wait_for(ranks, deadline, time_limit)
        finally:
            for rank in ranks:
                if rank.pid is not None:
                    rank.kill()
                    rank.join()
        out = np.empty((len(q), v.shape[-1]), q.dtype)
        for rank, rows in enumerate(positions):
            out[rows] = np.load(Path(name) / f"{rank}.npy")
    return out
