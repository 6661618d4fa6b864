"""Positions that the properties of several lectures hand to a layer."""

import torch


class Turned:
    """Positions that turn each pair of columns by the place: enough of RoPE to see where it stands."""

    def rotate(self, x, positions):
        half = x.shape[-1] // 2
        angles = positions.to(x.dtype)[:, None] * torch.arange(1, half + 1, dtype=x.dtype)
        a, b, cos, sin = x[..., :half], x[..., half:], angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
