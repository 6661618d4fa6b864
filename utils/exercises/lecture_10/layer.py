"""Lecture 10: the layer of Mamba. The oracle goes token by token, with the last inputs of the convolution in a list."""

import torch
from torch import nn

from utils.exercises.arrays import draw
from utils.judge.module import module

MODULE = "linear"
SIZES = {"d_model": 4, "d_inner": 6, "d_state": 3, "width": 3, "rank": 2}


def tensor(rng, *shape):
    return torch.from_numpy(draw(rng, *shape))


class Weights(nn.Module):
    """The parameters of the contract, and what the oracle and the mistakes share."""

    def __init__(self, d_model, d_inner, d_state=16, width=4, rank=4):
        super().__init__()
        self.d_state, self.rank = d_state, rank
        shapes = {
            "w_in": (d_model, 2 * d_inner),
            "conv": (d_inner, width),
            "w_x": (d_inner, rank + 2 * d_state),
            "w_dt": (rank, d_inner),
            "w_out": (d_inner, d_model),
            "a_log": (d_inner, d_state),
            "d": (d_inner,),
            "conv_bias": (d_inner,),
            "dt_bias": (d_inner,),
        }
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))


def silu(x):
    return x / (1 + torch.exp(-x))


@module("10E", MODULE, make=SIZES, importance="essential")
class Mamba(Weights):
    def forward(self, x):
        inner, width = self.conv.shape
        a = -torch.exp(self.a_log)
        h, past, outs = x.new_zeros(len(x), inner, self.d_state), [x.new_zeros(len(x), inner)] * (width - 1), []
        for t in range(x.shape[1]):
            both = x[:, t] @ self.w_in
            past = [*past, both[:, :inner]][-width:]
            u = silu(sum(one * self.conv[:, i] for i, one in enumerate(past)) + self.conv_bias)
            found = u @ self.w_x
            low, b, c = found[:, : self.rank], found[:, self.rank : -self.d_state], found[:, -self.d_state :]
            delta = torch.log1p(torch.exp(low @ self.w_dt + self.dt_bias))[..., None]
            h = torch.exp(delta * a) * h + delta * b[:, None] * u[..., None]
            y = (h * c[:, None]).sum(-1) + self.d * u
            outs.append(y * silu(both[:, inner:]) @ self.w_out)
        return torch.stack(outs, dim=1)


@Mamba.property(
    "the weights of the contract", hint="Is the class made from MambaWeights, and does it leave __init__ as it is?"
)
def _(ask, rng):
    ask.parameters()
    ask.parameters(width=2, rank=1)


@Mamba.property(
    "one token: projections, two SiLUs, the skip d",
    hint="Which half of x @ w_in is u, and where do the two SiLUs stand?",
)
def _(ask, rng):
    ask(2 * tensor(rng, 1, 1, 4))
    ask(2 * tensor(rng, 3, 1, 4))


@Mamba.property(
    "several tokens: the convolution looks back only",
    hint="How many zeros stand before the first token, and which column of conv meets the token itself?",
)
def _(ask, rng):
    ask(2 * tensor(rng, 1, 3, 4))
    ask(2 * tensor(rng, 2, 7, 4))


@Mamba.property("other sizes", hint="Which sizes do you read off the weights?")
def _(ask, rng):
    ask(2 * tensor(rng, 2, 5, 3), make={"d_model": 3, "d_inner": 4, "d_state": 5, "width": 4, "rank": 1})
    ask(2 * tensor(rng, 1, 4, 4), make={**SIZES, "width": 1})


@Mamba.property(
    "gradients reach every weight and the input",
    hint="Where does the computation leave torch: detach, .data, .item(), NumPy?",
)
def _(ask, rng):
    ask.gradients(2 * tensor(rng, 1, 4, 4))


@Mamba.property(
    "all at once: float32, a batch, a long text", hint="Which float type do tensors have that you make yourself?"
)
def _(ask, rng):
    ask(2 * tensor(rng, 3, 60, 4).float(), make={**SIZES, "d_inner": 5, "rank": 3})


class Usual(Weights):
    """The layer in the usual way. The mistakes override one of its methods; as it stands, it is right."""

    def halves(self, both):
        return both.chunk(2, dim=-1)

    def padded(self, u):
        return nn.functional.pad(u.mT, (self.conv.shape[1] - 1, 0))

    def kernel(self):
        return self.conv[:, None]

    def bias(self):
        return self.conv_bias

    def after_convolution(self, u):
        return nn.functional.silu(u)

    def step(self, low):
        return nn.functional.softplus(low @ self.w_dt + self.dt_bias)

    def decays(self):
        return -self.a_log.exp()

    def parts(self, found):
        return found.split([self.rank, self.d_state, self.d_state], -1)

    def skip(self, u):
        return self.d * u

    def gated(self, y, gate):
        return y * nn.functional.silu(gate)

    def forward(self, x):
        u, gate = self.halves(x @ self.w_in)
        u = nn.functional.conv1d(self.padded(u), self.kernel(), self.bias(), groups=len(self.conv))[..., : x.shape[1]]
        u = self.after_convolution(u.mT)
        low, b, c = self.parts(u @ self.w_x)
        delta, a, ys = self.step(low), self.decays(), []
        h = x.new_zeros(len(x), *self.a_log.shape)
        for t in range(x.shape[1]):
            h = torch.exp(delta[:, t, :, None] * a) * h + (delta[:, t] * u[:, t])[..., None] * b[:, t, None]
            ys.append((h * c[:, t, None]).sum(-1))
        return self.gated(torch.stack(ys, 1) + self.skip(u), gate) @ self.w_out


@Mamba.mistake("u and gate are exchanged: u is the first half.")
class _(Usual):
    def halves(self, both):
        return both.chunk(2, dim=-1)[::-1]


@Mamba.mistake("The convolution sees later tokens: all its zeros stand before the text.")
class _(Usual):
    def padded(self, u):
        width = self.conv.shape[1]
        return nn.functional.pad(u.mT, ((width - 1) // 2, width - 1 - (width - 1) // 2))


@Mamba.mistake("The token itself does not meet the last column of conv: a turned kernel, or zeros behind the text.")
class _(Usual):
    def kernel(self):
        return self.conv[:, None].flip(-1)


@Mamba.mistake("conv_bias is missing.")
class _(Usual):
    def bias(self):
        return None


@Mamba.mistake("SiLU is missing after the convolution.")
class _(Usual):
    def after_convolution(self, u):
        return u


@Mamba.mistake("The step is not made positive: softplus is missing.")
class _(Usual):
    def step(self, low):
        return low @ self.w_dt + self.dt_bias


@Mamba.mistake("dt_bias is missing from the step.")
class _(Usual):
    def step(self, low):
        return nn.functional.softplus(low @ self.w_dt)


@Mamba.mistake("a is positive: the minus before exp(a_log) is missing.")
class _(Usual):
    def decays(self):
        return self.a_log.exp()


@Mamba.mistake("a is -exp(a_log), not -a_log.")
class _(Usual):
    def decays(self):
        return -self.a_log


@Mamba.mistake("b and c are exchanged: after low come the columns of b.")
class _(Usual):
    def parts(self, found):
        low, b, c = super().parts(found)
        return low, c, b


@Mamba.mistake("The columns of low come first in u @ w_x, then those of b and c.")
class _(Usual):
    def parts(self, found):
        b, c, low = found.split([self.d_state, self.d_state, self.rank], -1)
        return low, b, c


@Mamba.mistake("The skip d is missing.")
class _(Usual):
    def skip(self, u):
        return 0 * u


@Mamba.mistake("The gate has no SiLU.")
class _(Usual):
    def gated(self, y, gate):
        return y * gate


@Mamba.mistake("The gate has a sigmoid only: SiLU is the gate times its sigmoid.")
class _(Usual):
    def gated(self, y, gate):
        return y * gate.sigmoid()


@Mamba.mistake("SiLU belongs to the gate, not to y.")
class _(Usual):
    def gated(self, y, gate):
        return nn.functional.silu(y) * gate


@Mamba.mistake("The gate is not used.")
class _(Usual):
    def gated(self, y, gate):
        return y
