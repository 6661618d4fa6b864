"""Lecture 02: the loss of a language model without some of its heads."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from utils.exercises.arrays import draw
from utils.judge.function import exercise
from utils.judge.result import Failed

MODULE = "multi_head"


class Heads(nn.Module):
    """n_heads of causal attention, with the one place that the contract names.

    RuntimeError where a hook writes into what it was given: a right one writes into a copy.
    """

    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.w_q, self.w_k, self.w_v, self.w_o = (nn.Parameter(torch.zeros(d_model, d_model)) for _ in range(4))
        self.outputs = nn.Identity()

    def forward(self, x):
        q, k, v = ((x @ w).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for w in (self.w_q, self.w_k, self.w_v))
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        found = torch.softmax((q @ k.mT).masked_fill(later, -torch.inf), -1) @ v
        kept, handed_on = found.clone(), self.outputs(found)
        if not torch.equal(found, kept):
            raise RuntimeError("a hook wrote into `outputs` itself, and not into a copy")
        return handed_on.transpose(1, 2).flatten(2) @ self.w_o


class Layer(nn.Module):
    def __init__(self, d_model, n_heads):
        super().__init__()
        self.attention = Heads(d_model, n_heads)

    def forward(self, x):
        return x + self.attention(x)


class Model(nn.Module):
    """ids (batch, n) -> logits (batch, n, vocab_size), with blocks as a TransformerLM has them."""

    def __init__(self, n_layers, n_heads, d_model=6, vocab_size=5):
        super().__init__()
        self.embedding, self.out = nn.Embedding(vocab_size, d_model), nn.Linear(d_model, vocab_size)
        self.blocks = nn.ModuleList(Layer(d_model, n_heads) for _ in range(n_layers))

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.out(x)

    def __repr__(self):
        return f"a model of {len(self.blocks)} layers of {self.blocks[0].attention.n_heads} heads"


def model(rng, n_layers, n_heads, dtype=torch.float64, **sizes):
    built = Model(n_layers, n_heads, **sizes).to(dtype)
    for parameter in built.parameters():
        parameter.data = torch.from_numpy(draw(rng, *parameter.shape)).to(dtype)
    return built


def texts(rng, batch=2, n=6, vocab_size=5):
    return torch.from_numpy(rng.integers(vocab_size, size=(batch, n)))


@exercise("2G", MODULE, importance="essential")
def losses_without(model, ids, groups, start=0):
    losses = []
    for group in groups:
        other = copy.deepcopy(model)
        for layer, head in group:
            w_o = other.blocks[layer].attention.w_o
            d_head = len(w_o) // other.blocks[layer].attention.n_heads
            w_o.data[head * d_head : (head + 1) * d_head] = 0
        with torch.no_grad():
            right = torch.log_softmax(other(ids), -1)[:, start:-1].gather(-1, ids[:, start + 1 :, None])
        losses.append(-right.mean())
    return torch.stack(losses)


@losses_without.property("nobody is silent: the loss of the model", hint="Which token is the right answer at place 0?")
def _(ask, rng):
    ask(model(rng, 1, 2), texts(rng), [[]])


@losses_without.property("one head of one layer", hint="Which index of `outputs` counts the heads?")
def _(ask, rng):
    ask(model(rng, 1, 2), texts(rng), [[(0, 0)]])
    ask(model(rng, 1, 3), texts(rng), [[(0, 1)]])


@losses_without.property(
    "heads of several layers",
    hint="Which layer does each of your hooks know when it is called: its own, or the last one?",
)
def _(ask, rng):
    ask(model(rng, 3, 2), texts(rng), [[(0, 1)]])
    ask(model(rng, 3, 2), texts(rng), [[(2, 0), (0, 0), (2, 1)]])


@losses_without.property(
    "each group alone: the heads of the one before speak again", hint="When are the hooks of a group taken away?"
)
def _(ask, rng):
    ask(model(rng, 2, 3), texts(rng), [[(0, 1)], [(1, 2)], [], [(0, 0), (1, 0)]])


@losses_without.property("only predictions from start on", hint="Which rows of the logits count, and which ids?")
def _(ask, rng):
    for start in (0, 1, 4):
        ask(model(rng, 1, 2), texts(rng), [[], [(0, 0)]], start=start)


@losses_without.property("no gradients", hint="What makes torch forget how the logits came about?")
def _(ask, rng):
    ask(Strict(2, 2).filled(rng), texts(rng), [[], [(1, 0)]])


class Strict(Model):
    """A model that refuses to be asked where gradients would be kept."""

    def filled(self, rng):
        for parameter in self.parameters():
            parameter.data = torch.from_numpy(draw(rng, *parameter.shape))
        return self.double()

    def forward(self, ids):
        if torch.is_grad_enabled():
            raise RuntimeError("the model was called where gradients are kept: with torch.no_grad()")
        return super().forward(ids)


@losses_without.property(
    "any sizes, and the float type of the model",
    hint="What keeps the type of single losses: torch.tensor or torch.stack?",
)
def _(ask, rng):
    ask(model(rng, 2, 1, d_model=4, vocab_size=9), texts(rng, 3, 9, 9), [[(1, 0)], []], start=3)
    got = ask.run(model(rng, 2, 2, torch.float32), texts(rng), [[(0, 0)]])
    kinds = {str(value.array.dtype) for value in got.values if value.array is not None}
    if kinds != {"float32"}:
        raise Failed(f"a model in float32: the losses are {', '.join(kinds)}")


def place(block):
    return block.attention.outputs


def own_heads(group, layer):
    return [head for of, head in group if of == layer]


def usual(
    model,
    ids,
    groups,
    start=0,
    *,
    place=place,
    heads=own_heads,
    value=lambda outputs, own: 0.0,
    axis=1,
    removed=True,
    shown=lambda logits, ids, start: (logits[:, start:-1], ids[:, start + 1 :]),
    reduction="mean",
    together=torch.stack,
):
    """The losses in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    losses, handles = [], []
    for group in groups:
        for i, block in enumerate(model.blocks):

            def silence(_module, _inputs, outputs, own=heads(group, i)):
                outputs = outputs.clone()
                index = (slice(None),) * axis + (own,)
                outputs[index] = value(outputs, own)
                return outputs

            handles.append(place(block).register_forward_hook(silence))
        with torch.no_grad():
            logits, target = shown(model(ids), ids, start)
        for handle in handles if removed else []:
            handle.remove()
        losses.append(F.cross_entropy(logits.mT, target, reduction=reduction))
    return together(losses)


losses_without.mistakes_of(
    usual,
    {
        "The hooks of the groups before are still there: remove each handle before the next group.": {"removed": False},
        "Every layer's heads of that number are silent: a pair names its layer.": {
            "heads": lambda group, layer: [head for _, head in group]
        },
        "Nobody falls silent: what a hook returns takes the place of `outputs`. Does yours return it?": {
            "heads": lambda group, layer: []
        },
        "The layer's number silences, not the head's: a pair is (layer, head).": {
            "heads": lambda group, layer: [of for of, head in group if head == layer]
        },
        "All heads but those of the group are silent in its layers.": {
            "heads": lambda group, layer: (
                [h for h in range(2) if h not in own_heads(group, layer)] if own_heads(group, layer) else []
            )
        },
        "Tokens are silenced, not heads: axis 1 of `outputs` counts the heads.": {"axis": 2},
        "Each token is asked for itself: the right answer is the next token.": {
            "shown": lambda logits, ids, start: (logits[:, start:], ids[:, start:])
        },
        "start is not used: predictions before it count too.": {
            "shown": lambda logits, ids, start: (logits[:, :-1], ids[:, 1:])
        },
        "One prediction too few counts: position start is the first, and predicts token start + 1.": {
            "shown": lambda logits, ids, start: (logits[:, start + 1 : -1], ids[:, start + 2 :])
        },
        "The loss is the sum over all predictions: take the mean.": {"reduction": "sum"},
        "The losses are rounded to single precision: torch.stack keeps the type of the model.": {
            "together": lambda losses: torch.tensor([loss.item() for loss in losses])
        },
    },
)


@losses_without.mistake("The heads are silent one after another, and never alone: each group gets hooks of its own.")
def _(model, ids, groups, start=0):
    return usual(model, ids, [sum(groups, [])] * len(groups), start)


@losses_without.mistake(
    "Every hook knows the last layer only: a function made in a loop reads the loop's variable late."
)
def _(model, ids, groups, start=0):
    last = len(model.blocks) - 1
    return usual(model, ids, groups, start, heads=lambda group, layer: own_heads(group, last))
