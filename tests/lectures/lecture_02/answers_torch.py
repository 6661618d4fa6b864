"""Answers to exercises 2D and 2G, a module and a loss without heads, as in answers.py."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from attention.multi_head import TransformerConfig, TransformerLM
from tests.lectures.collect import collect
from utils import training

RIGHT, WRONG, right, wrong = collect()


# --- 2D --------------------------------------------------------------------------------------------------------------


class Nowhere:
    """Positions that do nothing."""

    def rotate(self, x, positions):
        return x

    def bias(self, n_queries, n_keys):
        return None


@right("2D")
class WithEinsum(nn.Module):
    def __init__(self, d_model, n_heads, positions=None):
        super().__init__()
        self.n_heads, self.d_head = n_heads, d_model // n_heads
        self.positions = Nowhere() if positions is None else positions
        for name in ("w_q", "w_k", "w_v", "w_o"):
            setattr(self, name, nn.Parameter(torch.randn(d_model, d_model) / math.sqrt(d_model)))
        self.outputs = nn.Identity()
        self.weights = nn.Dropout(0.0)

    def cut(self, x, w):
        return torch.einsum("bnd,dhe->bhne", x, w.view(len(w), self.n_heads, self.d_head))

    def bias(self, scores, cross):
        return None if cross else self.positions.bias(scores.shape[2], scores.shape[3])

    def softmax(self, scores, mask, causal):
        n, m = scores.shape[-2:]
        hidden = torch.zeros(scores.shape, dtype=torch.bool)
        if causal:
            hidden = hidden | (torch.arange(m) > torch.arange(n)[:, None] + m - n)
        if mask is not None:
            hidden = hidden | ~mask
        return scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0)

    def found(self, weights, v):
        return self.outputs(torch.einsum("bhij,bhje->bhie", self.weights(weights), v))

    def forward(self, x, x_kv=None, mask=None, causal=False, positions=None, cache=None):
        cross = x_kv is not None
        other = x_kv if cross else x
        q, k, v = self.cut(x, self.w_q), self.cut(other, self.w_k), self.cut(other, self.w_v)
        if not cross:
            places = torch.arange(x.shape[1]) if positions is None else positions
            q, k = self.positions.rotate(q, places), self.positions.rotate(k, places)
        if cache is not None:
            k, v = cache.update(k, v)
        scores = torch.einsum("bhie,bhje->bhij", q, k) * self.d_head**-0.5
        bias = self.bias(scores, cross)
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        found = self.found(self.softmax(scores, mask, causal), v)
        return torch.einsum("bhie,hed->bid", found, self.w_o.view(self.n_heads, self.d_head, -1))


@right("2D")
class WithWeightsOfLinearLayers(WithEinsum):
    def __init__(self, d_model, n_heads, positions=None):
        super().__init__(d_model, n_heads, positions)
        for name in ("w_q", "w_k", "w_v", "w_o"):
            setattr(self, name, nn.Linear(d_model, d_model, bias=False).weight)


@wrong("2D", "begins with numbers of size 0, expected about 0.06")
class AllZeros(WithEinsum):
    def __init__(self, d_model, n_heads, positions=None):
        super().__init__(d_model, n_heads, positions)
        self.w_v = nn.Parameter(torch.zeros(d_model, d_model))


@wrong("2D", "begins with numbers of size 1, expected about 0.06")
class TooLarge(WithEinsum):
    def __init__(self, d_model, n_heads, positions=None):
        super().__init__(d_model, n_heads, positions)
        self.w_q = nn.Parameter(torch.randn(d_model, d_model))


@wrong("2D", "is missing")
class WithLinearLayers(nn.Module):
    def __init__(self, d_model, n_heads, positions=None):
        super().__init__()
        self.query, self.key = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)


@wrong("2D", "self-attention with copied weights")
class ScaleFivePercentOff(WithEinsum):
    def softmax(self, scores, mask, causal):
        return super().softmax(1.05 * scores, mask, causal)


@wrong("2D", "x_kv answers")
class NeverCross(WithEinsum):
    def forward(self, x, x_kv=None, **others):
        return super().forward(x, **others)


@wrong("2D", "causal=True changes nothing")
class NeverCausal(WithEinsum):
    def softmax(self, scores, mask, causal):
        return super().softmax(scores, mask, False)


@wrong("2D", "mask and causal")
class NanForNothing(WithEinsum):
    def softmax(self, scores, mask, causal):
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool)
        allowed = allowed.tril(scores.shape[-1] - scores.shape[-2]) if causal else allowed
        return scores.masked_fill(~(allowed if mask is None else allowed & mask), -torch.inf).softmax(-1)


@wrong("2D", "The values are rotated too")
class RotatesAll(WithEinsum):
    def forward(self, x, x_kv=None, positions=None, **others):
        places = torch.arange(x.shape[1]) if positions is None else positions
        turn, cut = self.positions.rotate, self.cut
        if x_kv is None:
            self.cut = lambda x, w: turn(cut(x, w), places) if w is self.w_v else cut(x, w)
        try:
            return super().forward(x, x_kv, positions=places, **others)
        finally:
            self.cut = cut


@wrong("2D", "The bias is not added to the scores")
class WithoutBias(WithEinsum):
    def bias(self, scores, cross):
        return None


@wrong("2D", "in cross-attention too")
class BiasAlways(WithEinsum):
    def bias(self, scores, cross):
        return super().bias(scores, False)


@wrong("2D", "the old keys are not seen")
class CacheIsNotRead(WithEinsum):
    def forward(self, x, x_kv=None, cache=None, **others):
        return super().forward(x, x_kv, **others)


@wrong("2D", "nothing goes through it: weights = self.weights")
class WeightsPassBy(WithEinsum):
    def found(self, weights, v):
        return self.outputs(weights @ v)


@wrong("2D", "nothing goes through it.")
class OutputsPassBy(WithEinsum):
    def found(self, weights, v):
        return self.weights(weights) @ v


@wrong("2D", "self.weights is no module")
class WeightsAreNoModule(WithEinsum):
    def __init__(self, d_model, n_heads, positions=None):
        super().__init__(d_model, n_heads, positions)
        del self.weights
        self.weights = lambda weights: weights


@wrong("2D", "gradients reach every parameter")
class LeavesTorch(WithEinsum):
    def found(self, weights, v):
        return super().found(weights.detach(), v)


@wrong("2D", "float32, large scores, all at once")
class NotShifted(WithEinsum):
    def softmax(self, scores, mask, causal):
        powers = torch.exp(scores) * (super().softmax(0 * scores, mask, causal) > 0)
        total = powers.sum(-1, keepdim=True)
        return powers / total.masked_fill(total == 0, 1)


# --- 2G --------------------------------------------------------------------------------------------------------------


def small_lm():
    config = TransformerConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=2, d_ff=0)
    return training.initialise(TransformerLM(config).double(), 3)


class Silence:
    """A hook that is an object: it knows its heads."""

    def __init__(self, place, heads):
        self.heads, self.handle = heads, place.register_forward_hook(self)

    def __call__(self, module, inputs, outputs):
        keep = torch.ones(outputs.shape[1], dtype=outputs.dtype)
        keep[self.heads] = 0
        return outputs * keep[:, None, None]


def loss_of(model, ids, start):
    logits = model(ids)[:, start:-1]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, start + 1 :].reshape(-1))


@right("2G")
@torch.no_grad()
def with_objects(model, ids, groups, start=0):
    out = []
    for group in groups:
        places = {layer: [h for i, h in group if i == layer] for layer, _ in group}
        hooks = [Silence(model.blocks[i].attention.outputs, heads) for i, heads in places.items()]
        out.append(loss_of(model, ids, start))
        for hook in hooks:
            hook.handle.remove()
    return torch.stack(out)


def masked(model, ids, groups, start=0, remove=True, clone=True, returned=True):
    out, handles = [], []
    for group in groups:
        for layer, head in group:

            def hook(module, inputs, outputs, head=head):
                outputs = outputs.clone() if clone else outputs
                outputs[:, head] = 0
                return outputs if returned else None

            handles.append(model.blocks[layer].attention.outputs.register_forward_hook(hook))
        with torch.no_grad():
            out.append(loss_of(model, ids, start))
        while remove and handles:
            handles.pop().remove()
    return torch.stack(out)


@right("2G")
def a_hook_for_each_head(model, ids, groups, start=0):
    return masked(model, ids, groups, start)


@wrong("2G", "The hooks of the groups before are still there")
def never_removed(model, ids, groups, start=0):
    return masked(model, ids, groups, start, remove=False)


@wrong("2G", "with torch.no_grad()")
def with_gradients(model, ids, groups, start=0):
    out = []
    for group in groups:
        hooks = [Silence(model.blocks[i].attention.outputs, [h]) for i, h in group]
        out.append(loss_of(model, ids, start).detach())
        for hook in hooks:
            hook.handle.remove()
    return torch.stack(out)


@wrong("2G", "rounded to single precision")
def as_numbers(model, ids, groups, start=0):
    return torch.tensor([masked(model, ids, [group], start).item() for group in groups])


@wrong("2G", "any sizes, and the float type of the model")
def always_double(model, ids, groups, start=0):
    return masked(model, ids, groups, start).double()


@wrong("2G", "start is not used")
def from_the_beginning(model, ids, groups, start=0):
    return masked(model, ids, groups, 0)


@wrong("2G", "the loop's variable late")
def the_last_layer_only(model, ids, groups, start=0):
    out = []
    for group in groups:
        handles = []
        for i, block in enumerate(model.blocks):

            def hook(module, inputs, outputs):
                outputs = outputs.clone()
                outputs[:, [h for layer, h in group if layer == i]] = 0
                return outputs

            handles.append(block.attention.outputs.register_forward_hook(hook))
        with torch.no_grad():
            out.append(loss_of(model, ids, start))
        for handle in handles:
            handle.remove()
    return torch.stack(out)


@wrong("2G", "a hook wrote into `outputs` itself, and not into a copy")
def in_place(model, ids, groups, start=0):
    return masked(model, ids, groups, start, clone=False)


@wrong("2G", "Nobody falls silent")
def nothing_returned(model, ids, groups, start=0):
    return masked(model, ids, groups, start, returned=False)


@wrong("2G", "The layer's number silences")
def pairs_turned_round(model, ids, groups, start=0):
    return masked(
        model, ids, [[(head, layer) for layer, head in group if head < len(model.blocks)] for group in groups]
    )


@wrong("2G", "has no attribute 'weights'")
def weights_silenced(model, ids, groups, start=0):
    out = []
    for group in groups:
        hooks = [Silence(model.blocks[i].attention.weights, [h]) for i, h in group]
        with torch.no_grad():
            out.append(loss_of(model, ids, start))
        for hook in hooks:
            hook.handle.remove()
    return torch.stack(out)


@wrong("2G", "one head of one layer")
def nobody_is_silent(model, ids, groups, start=0):
    return masked(model, ids, [[] for _ in groups], start)


@wrong("2G", "the right answer is the next token")
def each_for_itself(model, ids, groups, start=0):
    out = []
    for group in groups:
        hooks = [Silence(model.blocks[i].attention.outputs, [h]) for i, h in group]
        with torch.no_grad():
            out.append(F.cross_entropy(model(ids)[:, start:].mT, ids[:, start:]))
        for hook in hooks:
            hook.handle.remove()
    return torch.stack(out)
