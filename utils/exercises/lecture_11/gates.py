"""Lecture 11: the first token as a gate. The oracle keeps it in the softmax."""

import math

import torch

from utils.exercises.arrays import draw
from utils.judge.function import exercise

MODULE = "differential"


@exercise("11F", MODULE, returns=("out", "gate"), importance="useful")
def first_as_gate(q, k, v):
    n, m = q.shape[-2], k.shape[-2]
    out, gate = [], []
    for i in range(n):
        end = i + 1 + m - n
        scores = (k[..., :end, :] * q[..., i, None, :]).sum(-1) / math.sqrt(q.shape[-1])
        weights = torch.softmax(scores, -1)
        out.append((weights[..., None] * v[..., :end, :]).sum(-2))
        gate.append(weights[..., 1:].sum(-1))
    return torch.stack(out, dim=-2), torch.stack(gate, dim=-1)


def tensors(rng, batch=1, heads=2, n=3, m=3, d=4, size=1.0):
    q, k, v = (torch.from_numpy(draw(rng, batch, heads, rows, d)) for rows in (n, m, m))
    return size * q, k, v


@first_as_gate.property(
    "one query, two tokens: a gate between two values",
    hint="Two scores: what is the LSE of the others, and the sigmoid of what?",
)
def _(ask, rng):
    ask(*(torch.tensor(a)[None, None] for a in ([[2.0]], [[1.0], [0.0]], [[4.0], [8.0]])))
    ask(*tensors(rng, n=1, m=5))


@first_as_gate.property(
    "the first query sees the first token alone: gate 0",
    hint="What are the LSE of nothing and its sigmoid, and is there a nan on the way?",
)
def _(ask, rng):
    ask(*tensors(rng, n=1, m=1))
    ask(*tensors(rng, n=3, m=3))


@first_as_gate.property("causal, with fewer queries than keys", hint="At which position is query 0 of 2, with 5 keys?")
def _(ask, rng):
    ask(*tensors(rng, n=2, m=5))
    ask(*tensors(rng, n=4, m=6, size=2.0))


@first_as_gate.property("the scale is in every score", hint="Is the first token's score divided by sqrt(d_head), too?")
def _(ask, rng):
    ask(*tensors(rng, n=2, m=4, d=9, size=2.0))


@first_as_gate.property(
    "all at once: a batch, float32, 40 tokens, large scores",
    hint="Which float type has a tensor that you make yourself, and what are exp and log of a score of 1,000?",
)
def _(ask, rng):
    q, k, v = tensors(rng, batch=2, heads=3, n=30, m=40)
    ask((3 * q).float(), k.float(), v.float())
    ask(*tensors(rng, heads=1, n=1, m=5, size=2000.0))
    ask(*tensors(rng, batch=2, n=4, m=4, size=2000.0))
    ask(*(a.float() for a in tensors(rng, heads=1, n=1, m=3)))


def usual_gate(
    q, k, v, *, scale=lambda d: d**-0.5, sink=None, sign=1, back=lambda gate, v: (1 - gate)[..., None] * v[..., :1, :],
    gated=lambda gate, out: gate[..., None] * out, causal=True, top=False, rest=1, told=lambda gate: gate, counted=None,
):  # fmt: skip
    """The function in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    n, m = q.shape[-2], k.shape[-2]
    hidden = torch.ones(n, m, dtype=torch.bool).triu(1 if top else m - n + 1)
    products = q @ k.mT
    scores = products * scale(q.shape[-1])
    first = (products if sink else scores)[..., 0]
    others = scores[..., rest:].masked_fill(hidden[:, rest:], -torch.inf) if causal else scores[..., rest:]
    lse = torch.logsumexp(others if counted is None else counted(scores, hidden), -1)
    gate = torch.sigmoid(sign * (lse - first))
    weights = torch.softmax(others, -1).nan_to_num(0.0)
    return gated(gate, weights @ v[..., rest:, :]) + back(gate, v), told(gate)


first_as_gate.mistakes_of(
    usual_gate,
    {
        "The first token's value does not come back: add (1 - gate) v_0.": {"back": lambda gate, v: 0.0},
        "The first token's value comes back in full: it is multiplied by 1 - gate.": {
            "back": lambda gate, v: v[..., :1, :]
        },
        "The output of the others is not multiplied by the gate.": {"gated": lambda gate, out: out},
        "The sigmoid's sign is wrong: the gate is the share of the others, sigmoid(LSE - s).": {"sign": -1},
        "The first token's score is not scaled: it is divided by sqrt(d_head), as the others are.": {"sink": True},
        "The scores are not scaled: divide them by sqrt(d_head).": {"scale": lambda d: 1.0},
        "The mask is missing: a query sees later keys.": {"causal": False},
        "The mask starts at the top left: the last query sees every key.": {"top": True},
        "The first token is still in the softmax: the others begin at column 1.": {"rest": 0},
        "The LSE has the first token's score in it: it is that of the others, from column 1 on.": {
            "counted": lambda scores, hidden: scores.masked_fill(hidden, -torch.inf)
        },
        "The LSE has later keys in it: the others keep their mask there, too.": {
            "counted": lambda scores, hidden: scores[..., 1:]
        },
        "What is returned as the gate is the first token's share: the gate is that of the others.": {
            "told": lambda gate: 1 - gate
        },
    },
)
