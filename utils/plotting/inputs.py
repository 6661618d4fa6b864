"""What the pictures accept: NumPy arrays, torch tensors and lists, checked, with one clear sentence for bad input."""

import numpy as np

from utils.plotting.fonts import has_glyph

SUM_TOLERANCE = 1e-2  # half precision: a row of 512 rounded weights may miss 1 by this much
LONGEST_LABEL = 18


def as_array(values, name, dtype=np.float64):
    """`values` (NumPy array, torch tensor on any device, or nested list) as a NumPy array of `dtype`.

    Raises ValueError if it is not an array of numbers.
    """
    if hasattr(values, "detach"):  # a torch tensor, perhaps with grad
        values = values.detach().cpu()
        values = values.numpy() if values.dtype.is_floating_point is False else values.double().numpy()
    try:
        return np.asarray(values, dtype=dtype)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be a rectangular array of numbers, got {type(values).__name__} that NumPy cannot convert"
        ) from None


def as_finite(values, name, dims):
    """`values` as a float64 array with one of the numbers of axes in `dims` and no nan or infinity."""
    array = as_array(values, name)
    if array.ndim not in dims or array.size == 0:
        expected = " or ".join(str(d) for d in dims)
        raise ValueError(f"{name} must be a non-empty array with {expected} axes, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {np.count_nonzero(~np.isfinite(array))} nan or infinite values")
    return array


def as_weights(weights, name, dims):
    """Attention weights as a float64 array (..., n_queries, n_keys) whose rows are probabilities.

    Also takes what transformers returns: a list with one (1, heads, n_queries, n_keys) tensor for each layer.
    A row may be all zeros: a query that may attend to nothing. Raises ValueError otherwise.
    """
    if isinstance(weights, (list, tuple)) and len(weights) and hasattr(weights[0], "ndim") and weights[0].ndim == 4:
        layers = [as_array(layer, name) for layer in weights]
        if any(layer.shape != (1, *layers[0].shape[1:]) for layer in layers):
            raise ValueError(
                f"{name} as a list of layers must hold equal shapes (1, heads, n_queries, n_keys), "
                f"got {[layer.shape for layer in layers]}"
            )
        weights = np.concatenate(layers)
    array = as_finite(weights, name, dims)
    if array.min() < -1e-6:
        where = tuple(int(i) for i in np.unravel_index(array.argmin(), array.shape))
        raise ValueError(f"{name} must be rows of probabilities, got {array.min():.4g} at {where}")
    sums = array.sum(-1)
    wrong = (np.abs(sums - 1) > SUM_TOLERANCE) & (sums > 1e-6)
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"{name} must be rows of probabilities (each sums to 1, or to 0 where all is masked), "
            f"got a sum of {sums[where]:.4g} in row {where if len(where) > 1 else where[0]}"
        )
    return array.clip(0)


def as_heads(weights, name="weights"):
    """Weights as (layers, heads, n_queries, n_keys); (heads, n_queries, n_keys) becomes one layer."""
    array = as_weights(weights, name, dims=(3, 4))
    return array if array.ndim == 4 else array[None]


def as_mask(mask, name):
    """A boolean mask (n_queries, n_keys); 0 and 1 are accepted as well. Raises ValueError otherwise."""
    array = as_array(mask, name)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{name} must have shape (n_queries, n_keys), got {array.shape}")
    if not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name} must be boolean (True = may attend), got other values than 0 and 1")
    return array.astype(bool)


def as_labels(labels, count, name):
    """One printable string for each of `count` places, or None if `labels` is None. Raises ValueError otherwise."""
    if labels is None:
        return None
    labels = list(labels)
    if len(labels) != count:
        raise ValueError(f"{name} must have one label for each of the {count} places, got {len(labels)}")
    return [printable(str(label)) for label in labels]


def printable(label):
    """White space made visible, what no font can draw as its number, and no label longer than a figure can take."""
    label = label.replace("\n", "⏎").replace("\t", "⇥")
    label = "".join(c if has_glyph(c) else f"U+{ord(c):04X}" for c in label)
    if not label.strip(" "):
        label = "␣" * len(label) or "∅"
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"


def told_apart(labels):
    """Labels of which those that occur more than once carry their place: A (0), B, A (2)."""
    return [f"{label} ({place})" if labels.count(label) > 1 else label for place, label in enumerate(labels)]


def as_named(values, name):
    """A non-empty dict from label to values. Raises ValueError otherwise."""
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{name} must be a non-empty dict from label to values, got {values!r:.60}")
    return values
