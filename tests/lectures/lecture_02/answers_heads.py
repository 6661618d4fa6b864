"""Answers to exercises 2.1 and 2.2: the weights of torch's module, and heads taken apart."""

import numpy as np

from tests.lectures.collect import collect

RIGHT, WRONG, right, wrong = collect()


# --- 2.1 -------------------------------------------------------------------------------------------------------------


@right("2.1")
def weights_by_reshape(in_proj_weight, out_proj_weight):
    d = len(out_proj_weight)
    w_q, w_k, w_v = in_proj_weight.reshape(3, d, d).swapaxes(1, 2)
    return w_q, w_k, w_v, out_proj_weight.swapaxes(0, 1)


@wrong("2.1", "Use slices and .T: arrays and tensors have both.")
def weights_by_vsplit(in_proj_weight, out_proj_weight):
    return tuple(np.ascontiguousarray(np.swapaxes(w, 0, 1)) for w in (*np.vsplit(in_proj_weight, 3), out_proj_weight))


@wrong("2.1", "Use slices and .T: arrays and tensors have both.")
def weights_as_arrays(in_proj_weight, out_proj_weight):
    d = out_proj_weight.shape[0]
    return *(np.array(in_proj_weight[i * d : (i + 1) * d].T) for i in range(3)), np.array(out_proj_weight.T)


@right("2.1")
def weights_turned_first(in_proj_weight, out_proj_weight):
    d = out_proj_weight.shape[0]
    wide = in_proj_weight.T
    return wide[:, :d], wide[:, d : 2 * d], wide[:, 2 * d :], out_proj_weight.T


@wrong("2.1", "None of them is transposed")
def weights_as_they_are(in_proj_weight, out_proj_weight):
    d = in_proj_weight.shape[1]
    return in_proj_weight[:d], in_proj_weight[d : 2 * d], in_proj_weight[2 * d :], out_proj_weight


@wrong("2.1", "w_o is not transposed")
def weights_last_one_forgotten(in_proj_weight, out_proj_weight):
    d = in_proj_weight.shape[1]
    return in_proj_weight[:d].T, in_proj_weight[d : 2 * d].T, in_proj_weight[2 * d :].T, out_proj_weight


@wrong("2.1", "expected the tuple (w_q, w_k, w_v, w_o)")
def weights_in_two(in_proj_weight, out_proj_weight):
    return in_proj_weight.T, out_proj_weight.T


@wrong("2.1", "The rows are dealt out in turn")
def weights_reshaped(in_proj_weight, out_proj_weight):
    d = in_proj_weight.shape[1]
    w_q, w_k, w_v = np.moveaxis(in_proj_weight.reshape(d, 3, d), 1, 0)
    return w_q.T, w_k.T, w_v.T, out_proj_weight.T


# --- 2.2 -------------------------------------------------------------------------------------------------------------


@right("2.2")
def heads_by_transposes(x, n_heads):
    return x.swapaxes(-1, -2).reshape(*x.shape[:-2], n_heads, x.shape[-1] // n_heads, x.shape[-2]).swapaxes(-1, -2)


@right("2.2")
def heads_one_by_one(x, n_heads):
    d_head = x.shape[-1] // n_heads
    parts = [x[..., i * d_head : (i + 1) * d_head] for i in range(n_heads)]
    if isinstance(x, np.ndarray):
        return np.stack(parts, axis=-3)
    import torch

    return torch.stack(parts, dim=-3)


@wrong("2.2", "Use the methods x.reshape and x.swapaxes")
def heads_by_split(x, n_heads):
    return np.stack(np.split(x, n_heads, axis=-1), axis=-3)


@wrong("2.2", "Use the methods x.reshape and x.swapaxes")
def heads_as_an_array(x, n_heads):
    x = x if isinstance(x, np.ndarray) else x.detach().numpy()
    return x.reshape(*x.shape[:-1], n_heads, -1).swapaxes(-3, -2)


@wrong("2.2", "Use the methods x.reshape and x.swapaxes")
def heads_by_moveaxis(x, n_heads):
    *lead, seq, width = x.shape
    return np.moveaxis(np.reshape(x, (*lead, seq, n_heads, width // n_heads)), -2, -3)


@wrong("2.2", "A reshape never moves a number")
def heads_reshaped(x, n_heads):
    return x.reshape(*x.shape[:-2], n_heads, x.shape[-2], -1)


@wrong("2.2", "behind the sequence")
def heads_not_swapped(x, n_heads):
    return x.reshape(*x.shape[:-1], n_heads, -1)


@wrong("2.2", "Count the axes from the end")
def heads_swapped_in_front(x, n_heads):
    return np.swapaxes(x.reshape(*x.shape[:-1], n_heads, -1), 0, 1)


@wrong("2.2", "dealt out in turn")
def heads_every_other_column(x, n_heads):
    return np.stack([x[..., i::n_heads] for i in range(n_heads)], axis=-3)


@wrong("2.2", "returned a list")
def heads_in_a_list(x, n_heads):
    return np.split(x, n_heads, axis=-1)
