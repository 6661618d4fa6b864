"""Arrays and tensors: how the functions of a triple take them in, compute with them and give them back."""

import functools
import math

import numpy as np
import torch


def check_numbers(**arrays):
    """Raise TypeError or ValueError, in one sentence, unless all arguments are arrays or tensors of real numbers."""
    for name, array in arrays.items():
        if not isinstance(array, (np.ndarray, np.generic, torch.Tensor)):
            raise TypeError(f"{name} must be an array or a tensor, got {type(array).__name__}")
        if isinstance(array, torch.Tensor):
            few_bits = array.is_floating_point() and array.dtype.itemsize < 2  # PyTorch itself does not compute with 8
            real = not array.dtype.is_complex and array.dtype != torch.bool and not few_bits
        else:
            real = array.dtype.kind in "iuf"
        if not real:
            raise ValueError(f"{name} must hold real numbers, got {array.dtype}")


def check_kind(kind, **arrays):
    """Raise TypeError, in one sentence, unless all arguments are of this kind, np.ndarray or torch.Tensor."""
    for name, array in arrays.items():
        if not isinstance(array, kind):
            wanted = "a NumPy array" if kind is np.ndarray else "a tensor"
            raise TypeError(f"{name} must be {wanted}, got {type(array).__name__}")


def float_type(array):
    """The type in which results come back: that of the array or tensor where it is a float, double for integers."""
    if isinstance(array, torch.Tensor):
        return array.dtype if array.is_floating_point() else torch.float64
    return array.dtype if array.dtype.kind == "f" else np.dtype(np.float64)


def work_type(array):
    """The type to compute in: that of the array or tensor, but at least single precision; double for integers."""
    if isinstance(array, torch.Tensor):
        return torch.promote_types(float_type(array), torch.float32)
    return np.result_type(float_type(array), np.float32)


def on_device(*arrays, dtype=torch.float32):
    """Arrays or tensors as contiguous tensors of one type for a kernel: what they hold is never changed by it.

    They come to lie where the first tensor among them lies, on the CPU if there is none. Copied only where needed.
    """
    device = next((a.device for a in arrays if isinstance(a, torch.Tensor)), torch.device("cpu"))
    exact = np.float16 if dtype == torch.float16 else np.float32
    tensors = (a if isinstance(a, torch.Tensor) else torch.from_numpy(np.require(a, exact, "CW")) for a in arrays)
    return [t.detach().to(device, dtype).contiguous() for t in tensors]


def like(result, given, dtype=None):
    """A result in the kind (array or tensor) of `given` and, unless a torch type is given, in its float_type."""
    if isinstance(given, torch.Tensor):
        return result.to(dtype or float_type(given))
    if isinstance(result, torch.Tensor):
        result = (result if dtype is None else result.to(dtype)).cpu().numpy()
    return result if dtype else np.asarray(result).astype(float_type(given), copy=False)


def skip_unseen(attention):
    """Let attention(q, k, v, ...) take nothing from a value whose weight is 0, even where the value is inf or nan.

    A product would: 0 times nan is nan. Results are linear in v, so the weight of what is not finite is asked for with
    ones in its place, in calls that only such input costs.
    """

    @functools.wraps(attention)
    def wrapped(q, k, v, *args, **kwargs):
        library = torch if isinstance(v, torch.Tensor) else np
        if library is torch:
            looked_at = v.is_floating_point() and v.dtype.itemsize > 1 and not v.is_meta  # one on meta has no values
        else:
            looked_at = isinstance(v, np.ndarray) and v.dtype.kind == "f"
        if not looked_at:
            return attention(q, k, v, *args, **kwargs)
        finite = library.isfinite(v)
        if finite.all():
            return attention(q, k, v, *args, **kwargs)
        result = attention(q, k, library.where(finite, v, 0), *args, **kwargs)
        out, *rest = result if isinstance(result, tuple) else (result,)
        for value, found in ((math.inf, v == math.inf), (-math.inf, v == -math.inf), (math.nan, v != v)):
            with torch.no_grad(), np.errstate(invalid="ignore"):
                weight = attention(q, k, library.where(found, library.ones_like(v), 0), *args, **kwargs)
                seen = (weight[0] if isinstance(weight, tuple) else weight) != 0
                extra = library.where(seen, value, 0.0)
            with np.errstate(invalid="ignore"):
                out = out + (extra.to(out.dtype) if isinstance(out, torch.Tensor) else extra.astype(out.dtype))
        return (out, *rest) if isinstance(result, tuple) else out

    return wrapped


def weighted_sum(weights, v):
    """weights @ v, in which a weight of 0 takes nothing from its value, be it nan. For arrays and tensors."""
    return skip_unseen(lambda weights, _, v: weights @ v)(weights, None, v)
