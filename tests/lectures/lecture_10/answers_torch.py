"""Answers to the exercises of lecture 10 in PyTorch: a step of training and a layer, as in answers.py."""

import math

import torch
from torch.nn import functional as F

from attention.linear import MambaWeights, selective_scan_torch
from tests.lectures.collect import collect

RIGHT, WRONG, right, wrong = collect()


# --- 10B -------------------------------------------------------------------------------------------------------------


@right("10B")
def with_kl_and_logs(features, optimiser, q, k):
    with torch.no_grad():
        p = F.softmax(torch.einsum("bid,bjd->bij", q, k) / math.sqrt(q.size(-1)), -1)
    w = torch.einsum("bim,bjm->bij", features.of_q(q), features.of_k(k))
    log_w = w.log() - w.sum(-1, keepdim=True).log()
    loss = F.kl_div(log_w, p, reduction="sum") - (p * p.clamp_min(1e-300).log()).sum()
    loss = loss / (q.shape[0] * q.shape[1])
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    return float(loss)


@right("10B")
def with_cross_entropy(features, optimiser, q, k):
    p = ((q @ k.transpose(1, 2)) * q.shape[-1] ** -0.5).softmax(-1).flatten(0, 1)
    w = (features.of_q(q) @ features.of_k(k).transpose(1, 2)).flatten(0, 1)
    loss = F.cross_entropy(w.log(), p.detach())
    for parameter in features.parameters():
        parameter.grad = None
    loss.backward()
    optimiser.step()
    return loss.detach().item()


def imitate(features, optimiser, q, k, scale=None, zero=True, backward=True, step=True, give=float):
    p = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)
    w = features.of_q(q) @ features.of_k(k).mT
    loss = -(p * (w / w.sum(-1, keepdim=True)).log()).sum(-1).mean()
    if zero:
        optimiser.zero_grad()
    if backward:
        loss.backward()
    if step:
        optimiser.step()
    return give(loss)


@wrong("10B", "not scaled")
def no_scale(features, optimiser, q, k):
    return imitate(features, optimiser, q, k, scale=1.0)


@wrong("10B", "one step")
def scale_five_percent_off(features, optimiser, q, k):
    return imitate(features, optimiser, q, k, scale=1.05 * q.shape[-1] ** -0.5)


@wrong("10B", "zero_grad before backward")
def gradients_pile_up(features, optimiser, q, k):
    return imitate(features, optimiser, q, k, zero=False)


@wrong("10B", "one step")
def never_steps(features, optimiser, q, k):
    return imitate(features, optimiser, q, k, step=False)


@wrong("10B", "the mean over all rows of a batch")
def divided_by_the_tokens(features, optimiser, q, k):
    p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    w = features.of_q(q) @ features.of_k(k).mT
    loss = -(p * (w / w.sum(-1, keepdim=True)).log()).sum() / q.shape[1]
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


@wrong("10B", "all at once")
def softmax_by_hand(features, optimiser, q, k):
    s = (q @ k.mT * q.shape[-1] ** -0.5).exp()
    p = s / s.sum(-1, keepdim=True)
    w = features.of_q(q) @ features.of_k(k).mT
    loss = -(p * (w / w.sum(-1, keepdim=True)).log()).sum(-1).mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


# --- 10E -------------------------------------------------------------------------------------------------------------


@right("10E")
class WithAConvolutionByHand(MambaWeights):
    def convolve(self, u):
        width, n = self.conv.shape[1], u.shape[1]
        padded = torch.cat([u.new_zeros(len(u), width - 1, u.shape[2]), u], dim=1)
        return sum(padded[:, i : i + n] * self.conv[:, i] for i in range(width)) + self.conv_bias

    def step(self, low):
        return F.softplus(low @ self.w_dt + self.dt_bias)

    def a(self):
        return -torch.exp(self.a_log)

    def gate(self, y, z):
        return y * z * torch.sigmoid(z)

    def forward(self, x):
        both = x @ self.w_in
        u, z = torch.tensor_split(both, 2, dim=-1)
        u = self.convolve(u)
        u = u * torch.sigmoid(u)
        rest = u @ self.w_x
        low, b, c = rest[..., : self.rank], rest[..., self.rank : self.rank + self.d_state], rest[..., -self.d_state :]
        y = selective_scan_torch(u, self.step(low), self.a(), b, c, self.d)
        return self.gate(y, z) @ self.w_out


@right("10E")
class WithTorchsConvolution(WithAConvolutionByHand):
    def convolve(self, u):
        n, width = u.shape[1], self.conv.shape[1]
        u = F.conv1d(u.transpose(1, 2), self.conv.unsqueeze(1), self.conv_bias, padding=width - 1, groups=u.shape[2])
        return u[..., :n].transpose(1, 2)


@wrong("10E", "a parameter too many")
class OneMore(WithAConvolutionByHand):
    def __init__(self, *sizes, **more):
        super().__init__(*sizes, **more)
        self.norm = torch.nn.RMSNorm(4)


@wrong("10E", "a turned kernel")
class Turned(WithAConvolutionByHand):
    def convolve(self, u):
        width, n = self.conv.shape[1], u.shape[1]
        padded = torch.cat([u.new_zeros(len(u), width - 1, u.shape[2]), u], dim=1)
        return sum(padded[:, i : i + n] * self.conv[:, width - 1 - i] for i in range(width)) + self.conv_bias


@wrong("10E", "one token")
class StepFivePercentLarge(WithAConvolutionByHand):
    def step(self, low):
        return 1.05 * super().step(low)


@wrong("10E", "several tokens")
class SeesTheFuture(WithTorchsConvolution):
    def convolve(self, u):
        u = F.conv1d(
            F.pad(u.mT, (self.conv.shape[1] - 1, self.conv.shape[1] - 1)), self.conv[:, None], self.conv_bias,
            groups=u.shape[2],
        )  # fmt: skip
        first = (u.shape[-1] - 1) // 4
        return u[..., first : first + u.shape[-1] - self.conv.shape[1] + 1].mT


@wrong("10E", "The gate has no SiLU")
class PlainGate(WithAConvolutionByHand):
    def gate(self, y, z):
        return y * z


@wrong("10E", "not -a_log")
class LogForgotten(WithAConvolutionByHand):
    def a(self):
        return -self.a_log


@wrong("10E", "gradients reach every weight")
class Detached(WithAConvolutionByHand):
    def step(self, low):
        return super().step(low.detach())


@wrong("10E", "other sizes")
class WidthOfThree(WithAConvolutionByHand):
    def convolve(self, u):
        padded = torch.cat([u.new_zeros(len(u), 2, u.shape[2]), u], dim=1)
        kernel = F.pad(self.conv, (3, 0))[:, -3:]
        return sum(padded[:, i : i + u.shape[1]] * kernel[:, i] for i in range(3)) + self.conv_bias


@wrong("10E", "all at once")
class ZerosInDouble(WithAConvolutionByHand):
    def convolve(self, u):
        zeros = torch.zeros(len(u), self.conv.shape[1] - 1, u.shape[2], dtype=torch.float64)
        padded = torch.cat([zeros, u], dim=1)
        return sum(padded[:, i : i + u.shape[1]] * self.conv[:, i] for i in range(self.conv.shape[1])) + self.conv_bias
