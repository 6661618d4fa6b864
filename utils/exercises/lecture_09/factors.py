"""Lecture 09: the factors of a joint latent. Any basis of the latent is right, so products are compared."""

import numpy as np

from utils.exercises.arrays import draw
from utils.judge.compare import TOLERANCE, difference
from utils.judge.function import exercise
from utils.judge.result import Failed

MODULE = "latent"
PARTS = ("w_dkv", "w_uk", "w_uv")


@exercise("9A", MODULE, returns=PARTS, importance="useful")
def joint_latent(w_k, w_v, d_latent, x=None):
    both = np.concatenate([w_k, w_v], axis=1).astype(float)
    seen = both if x is None else np.asarray(x, float) @ both
    _, directions = np.linalg.eigh(seen.T @ seen)
    best = directions[:, ::-1][:, :d_latent]
    return both @ best, best[: w_k.shape[1]].T, best[w_k.shape[1] :].T


def product(ask, w_k, w_v, d_latent, x=None):
    """Ask, and raise Failed unless the shapes and the two products are right."""
    given = (w_k, w_v, d_latent) if x is None else (w_k, w_v, d_latent, x)
    reply = ask.run(*given)
    shapes = [(len(w_k), d_latent), (d_latent, w_k.shape[1]), (d_latent, w_v.shape[1])]
    if len(reply.values) != 3 or any(value.array is None for value in reply.values):
        raise Failed(f"returned {len(reply.values)} results, expected the tuple ({', '.join(PARTS)}) of arrays")
    for name, value, shape in zip(PARTS, reply.values, shapes):
        if value.array.shape != shape:
            raise Failed(f"{name} has the shape {value.array.shape}, expected {shape}")
        if value.array.dtype.kind != "f":
            raise Failed(f"{name} is an array of {value.array.dtype}, expected floats")
    down, *ups = (value.array for value in reply.values)
    exact = joint_latent.oracle(w_k, w_v, d_latent, x)
    for name, up, wanted in zip(PARTS[1:], ups, exact[1:]):
        off = difference(down @ up, exact[0] @ wanted)
        if off > 100 * TOLERANCE[np.dtype(w_k.dtype).name]:
            raise Failed(f"w_dkv @ {name} is off by {off:.1g} of its largest entry")


@joint_latent.property(
    "without inputs: the best of its rank for the weights",
    hint="Of which matrix is the SVD, and which rows of vt belong to the largest singular values?",
)
def _(ask, rng):
    product(ask, np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([[4.0], [0.0]]), 1)
    product(ask, draw(rng, 4, 3), draw(rng, 4, 5), 2)


@joint_latent.property(
    "one latent for both: keys and values share its numbers",
    hint="How many SVDs do you take, and how many numbers has the latent then?",
)
def _(ask, rng):
    product(ask, 3 * draw(rng, 5, 4), draw(rng, 5, 4), 3)
    product(ask, draw(rng, 6, 2), 5 * draw(rng, 6, 7), 1)


@joint_latent.property(
    "with inputs: the best for keys and values that occur",
    hint="With inputs the SVD is that of x @ W. Which matrix do its directions multiply?",
)
def _(ask, rng):
    x = draw(rng, 20, 4) * np.array([5.0, 1.0, 1.0, 0.2])
    product(ask, draw(rng, 4, 3), draw(rng, 4, 3), 2, x)
    product(ask, draw(rng, 4, 5), draw(rng, 4, 2), 1, x[:3])


@joint_latent.property(
    "full rank loses nothing; wide, tall and float32 weights",
    hint="Does full_matrices=False stand in the SVD, and where do the columns of the keys end?",
)
def _(ask, rng):
    product(ask, draw(rng, 4, 6), draw(rng, 4, 6), 4)
    product(ask, draw(rng, 40, 3), draw(rng, 40, 2), 5, draw(rng, 60, 40))
    product(ask, draw(rng, 30, 8).astype(np.float32), draw(rng, 30, 1).astype(np.float32), 4)
    product(ask, draw(rng, 5, 3), np.zeros((5, 0)), 2)
    single = [draw(rng, *shape).astype(np.float32) for shape in ((7, 4), (7, 1), (30, 7))]
    product(ask, *single[:2], 3, single[2])


def both_of(w_k, w_v):
    return np.concatenate([w_k, w_v], axis=1)


def usual_latent(w_k, w_v, d_latent, x=None, *, seen=lambda x, w: w if x is None else x @ w, keep=None, cut=None):
    """The factors in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    both = both_of(w_k, w_v)
    _, _, vt = np.linalg.svd(seen(x, both), full_matrices=False)
    best = vt[-d_latent:] if keep == "last" else vt[:d_latent]
    end = len(w_k) if cut == "rows" else w_k.shape[1]
    return both @ best.T, best[:, :end], best[:, end:]


joint_latent.mistakes_of(
    usual_latent,
    {
        "x is not used: with inputs the SVD is that of x @ W, the keys and values that occur.": {
            "seen": lambda x, w: w
        },
        "The SVD is that of x alone: what is to be kept are keys and values, x @ W.": {
            "seen": lambda x, w: w if x is None else np.linalg.lstsq(np.eye(len(w)), x.T @ x @ w, rcond=None)[0]
        },
        "The last rows of vt belong to the smallest singular values: keep the first.": {"keep": "last"},
    },
)


@joint_latent.mistake("Keys and values have a latent each here: put [W_K W_V] side by side and take one SVD.")
def _(w_k, w_v, d_latent, x=None):
    parts = []
    for w, r in ((w_k, (d_latent + 1) // 2), (w_v, d_latent // 2)):
        vt = np.linalg.svd(w if x is None else x @ w, full_matrices=False)[2][:r]
        parts.append((w @ vt.T, vt))
    (down_k, up_k), (down_v, up_v) = parts
    w_uk = np.concatenate([up_k, np.zeros((len(up_v), up_k.shape[1]))])
    w_uv = np.concatenate([np.zeros((len(up_k), up_v.shape[1])), up_v])
    return np.concatenate([down_k, down_v], axis=1), w_uk, w_uv


@joint_latent.mistake("The latent is chosen for the keys alone: the values have to be made from it too.")
def _(w_k, w_v, d_latent, x=None):
    u, _, _ = np.linalg.svd(w_k, full_matrices=True)
    down = u[:, :d_latent]
    return down, down.T @ w_k, down.T @ w_v
