"""A small model in the manner of the attention models, to be trained as --model windowed_model.py:WindowedHyperprior."""

import torch
import torch.nn.functional as F
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.models import CompressionModel
from torch import Tensor, nn


class WindowAttention(nn.Module):
    """Self-attention within windows of p x p, with a learned bias for each relative position (Swin Transformer, eq. 4); with a
    shift, the windows lie half a window further, and what wraps around the image's edge is masked."""

    def __init__(self, channels: int, heads: int, window: int, shifted: bool):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, window // 2 if shifted else 0
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        at = torch.cartesian_prod(torch.arange(window), torch.arange(window))  # [p * p, 2]
        apart = at[:, None] - at[None, :] + window - 1  # [p * p, p * p, 2]
        self.register_buffer("relative_position", apart[..., 0] * (2 * window - 1) + apart[..., 1], persistent=False)

    def windows(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, windows, p * p, C]."""
        B, H, W, C = x.shape
        p = self.window
        return x.view(B, H // p, p, W // p, p, C).transpose(2, 3).reshape(B, -1, p * p, C)

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C]
        B, H, W, C = x.shape
        p, s = self.window, self.shift
        rolled = torch.roll(x, (-s, -s), (1, 2))
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(2, 3) for t in self.qkv(self.windows(rolled)).chunk(3, dim=-1)
        )  # [B, windows, heads, p * p, C / heads]
        bias = self.relative_position_bias_table[self.relative_position].permute(2, 0, 1)  # [heads, p * p, p * p]
        if s:
            rows, columns = ((torch.arange(n, device=x.device) >= n - s).long() for n in (H, W))
            region = self.windows((2 * rows[:, None] + columns).view(1, H, W, 1)).squeeze(-1)  # [1, windows, p * p]
            other = region[..., :, None] != region[..., None, :]
            bias = bias.masked_fill(other[:, :, None], -100.0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype).expand(B, -1, -1, -1, -1) if s else bias)
        y = y.transpose(2, 3).flatten(-2).view(B, H // p, W // p, p, p, C).transpose(2, 3).reshape(B, H, W, C)
        return torch.roll(self.proj(y), (s, s), (1, 2))


class SwinBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on [B, C, H, W]."""

    def __init__(self, channels: int, heads: int, window: int, shifted: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, heads, window, shifted)
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1)
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x.movedim(-1, 1)


def down(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 5, stride=2, padding=2)


def up(inputs: int, outputs: int) -> nn.Module:
    return nn.ConvTranspose2d(inputs, outputs, 5, stride=2, padding=2, output_padding=1)


class WindowedHyperprior(CompressionModel):
    """A mean and scale hyperprior with a pair of blocks, of still and of shifted windows, at 1/8 and 1/16 of the image's size.
    An image's sides have to be multiples of 64, and with larger windows of 16 * window."""

    def __init__(self, N: int = 16, M: int = 24, window: int = 4, heads: int = 2):
        super().__init__()

        def blocks(channels: int) -> list[nn.Module]:
            return [SwinBlock(channels, heads, window, shifted) for shifted in (False, True)]

        self.g_a = nn.Sequential(
            down(3, N), nn.GELU(), down(N, N), nn.GELU(), down(N, N), *blocks(N), down(N, M), *blocks(M)
        )  # fmt: skip
        self.g_s = nn.Sequential(
            *blocks(M), up(M, N), *blocks(N), up(N, N), nn.GELU(), up(N, N), nn.GELU(), up(N, 3)
        )  # fmt: skip
        self.h_a = nn.Sequential(down(M, N), nn.GELU(), down(N, N))
        self.h_s = nn.Sequential(up(N, N), nn.GELU(), up(N, 2 * M))
        self.entropy_bottleneck = EntropyBottleneck(N)
        self.gaussian_conditional = GaussianConditional(None)

    def forward(self, x: Tensor) -> dict:
        y = self.g_a(x)
        z_hat, z_likelihoods = self.entropy_bottleneck(self.h_a(y))
        scales, means = self.h_s(z_hat).chunk(2, 1)
        y_hat, y_likelihoods = self.gaussian_conditional(y, scales, means=means)
        return {"x_hat": self.g_s(y_hat), "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}

    def compress(self, x: Tensor) -> dict:
        y = self.g_a(x)
        z = self.h_a(y)
        z_strings = self.entropy_bottleneck.compress(z)
        z_hat = self.entropy_bottleneck.decompress(z_strings, z.shape[-2:])
        scales, means = self.h_s(z_hat).chunk(2, 1)
        indexes = self.gaussian_conditional.build_indexes(scales)
        return {"strings": [self.gaussian_conditional.compress(y, indexes, means=means), z_strings], "shape": z.shape[-2:]}

    def decompress(self, strings: list, shape: torch.Size) -> dict:
        z_hat = self.entropy_bottleneck.decompress(strings[1], shape)
        scales, means = self.h_s(z_hat).chunk(2, 1)
        indexes = self.gaussian_conditional.build_indexes(scales)
        y_hat = self.gaussian_conditional.decompress(strings[0], indexes, means=means)
        return {"x_hat": self.g_s(y_hat).clamp(0, 1)}
