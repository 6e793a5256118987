"""U-Net for denoising: residual blocks with FiLM, self-attention at low resolution.

Shapes   x (B, C, H, W) -> (B, C_out, H, W); any H, W.
Source   Ho et al., arXiv:2006.11239 (residual blocks, GroupNorm, SiLU, attention at low
         resolution); Dhariwal, Nichol, arXiv:2105.05233 (scale and shift from the embedding);
         Vaswani et al., arXiv:1706.03762 (sinusoidal embedding, attention).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cgm.networks.layers import depth_to_space, space_to_depth

KeysValues = tuple[Tensor, Tensor]


class ResidualBlock(nn.Module):
    """x + conv(silu((1 + scale) norm(conv(silu(norm(x)))) + shift)), scale and shift from FiLM.

    Without FiLM both are 0.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = group_norm(in_channels), group_norm(out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, film: Tensor | None = None) -> Tensor:
        """film is (B, 2 out_channels): scale, then shift."""
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if film is not None:
            scale, shift = film[:, :, None, None].chunk(2, dim=1)
            h = torch.addcmul(shift, h, 1 + scale)
        return self.skip(x) + self.conv2(F.silu(h))


class Attention(nn.Module):
    """x + attention of the pixels over the pixels, or over condition tokens."""

    def __init__(self, channels: int, heads: int, *, tokens: bool = False) -> None:
        super().__init__()
        self.heads, self.norm = heads, group_norm(channels)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key_value = None if tokens else nn.Conv2d(channels, 2 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, keys_values: KeysValues | None = None) -> Tensor:
        """keys_values are (B, heads, M, channels / heads) each, or None for self-attention."""
        h = self.norm(x)
        query = self._split(self.query(h))
        if self.key_value is not None:
            key, value = map(self._split, self.key_value(h).chunk(2, dim=1))
        else:
            assert keys_values is not None
            key, value = keys_values
        h = F.scaled_dot_product_attention(query, key, value)
        return x + self.out(h.transpose(2, 3).reshape(x.shape))

    def _split(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, heads, H W, C / heads)."""
        return x.unflatten(1, (self.heads, -1)).flatten(3).transpose(2, 3)


class UNet(nn.Module):
    """U-Net that takes its embeddings as FiLM vectors.

    All scales and shifts of all blocks are one vector, the sum of a part of the timestep and a part
    of the class. Both are linear in what they come from, so that a sampler makes the first for all
    its steps in one batch, and the second once. So it does with the keys and values of condition
    tokens. Within the loop only `forward` runs.

    Args:
        in_channels, out_channels: of x and of the result.
        width: channels at full resolution, even and at least 4.
        width_multipliers: times this at each resolution, half of the one above.
        blocks: residual blocks of a resolution.
        attention_depth: self-attention in this many of the lowest resolutions.
        heads: of all attentions.
        patch: side of the squares of pixels that enter as one; H and W must be divisible by it.
        num_classes: classes with an embedding, 0 for none; class num_classes means "no class".
        vocabulary, token_length: of condition tokens, 0 for none; token `vocabulary` is padding.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        width: int,
        width_multipliers: tuple[int, ...],
        blocks: int,
        attention_depth: int,
        heads: int,
        patch: int,
        num_classes: int = 0,
        vocabulary: int = 0,
        token_length: int = 0,
    ) -> None:
        super().__init__()
        widths = [width * m for m in width_multipliers]
        if width < 4 or width % 2:
            raise ValueError(f"width must be even and at least 4, got {width}")
        if any(w % heads for w in widths):
            raise ValueError(f"heads must divide the widths {widths}, got {heads}")
        self.patch = patch
        self.conv_in = nn.Conv2d(in_channels * patch**2, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.downsample, self.upsample = nn.ModuleList(), nn.ModuleList()
        skips, current = [width], width
        self.film_sizes: list[int] = []

        def stage(in_width: int, out_width: int, level: int) -> nn.ModuleDict:
            self.film_sizes.append(2 * out_width)
            parts: dict[str, nn.Module] = {"block": ResidualBlock(in_width, out_width)}
            if level >= len(widths) - attention_depth:
                parts["attention"] = Attention(out_width, heads)
                if vocabulary:
                    parts["cross"] = Attention(out_width, heads, tokens=True)
            return nn.ModuleDict(parts)

        for level, level_width in enumerate(widths):
            for _ in range(blocks):
                self.down.append(stage(current, level_width, level))
                current = level_width
                skips.append(current)
            if level < len(widths) - 1:
                self.downsample.append(nn.Conv2d(current, current, 3, stride=2, padding=1))
                skips.append(current)
        self.middle = stage(current, current, len(widths) - 1)
        for level, level_width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(stage(current + skips.pop(), level_width, level))
                current = level_width
            if level > 0:
                self.upsample.append(nn.Conv2d(current, current, 3, padding=1))
        self.blocks, self.depth = blocks, len(widths)
        self.norm_out = group_norm(current)
        self.conv_out = zero_init(nn.Conv2d(current, out_channels * patch**2, 3, padding=1))

        hidden, film = 2 * width, sum(self.film_sizes)
        self.frequencies = width
        self.time = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, film)
        )  # fmt: skip
        self.classes = nn.Embedding(num_classes + 1, film) if num_classes else None
        if self.classes is not None:
            nn.init.normal_(self.classes.weight, std=0.02)
        if vocabulary:
            crosses = [s["cross"] for s in self._stages() if "cross" in s]
            if not crosses:
                raise ValueError("attention_depth must be positive where tokens are the condition")
            self.tokens = nn.Embedding(vocabulary + 1, hidden)
            self.positions = nn.Parameter(torch.randn(token_length, hidden) * 0.02)
            self.token_norm = nn.LayerNorm(hidden)
            self.key_value = nn.Linear(hidden, sum(2 * c.query.out_channels for c in crosses))
            self.cross_heads = [(c.heads, 2 * c.query.out_channels) for c in crosses]

    def _stages(self):
        return [*self.down, self.middle, *self.up]

    def time_film(self, t: Tensor) -> Tensor:
        """FiLM vectors (S, F) of timesteps (S,)."""
        half = self.frequencies // 2
        number = torch.arange(half, dtype=torch.float32, device=t.device)
        rates = torch.exp(-math.log(10000) / half * number)
        angles = t.float()[:, None] * rates
        dtype = next(self.time.parameters()).dtype
        return self.time(torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype))

    def class_film(self, classes: Tensor) -> Tensor:
        """FiLM vectors (B, F) of class ids (B,); id num_classes is "no class"."""
        assert self.classes is not None
        return self.classes(classes)

    def token_context(self, tokens: Tensor) -> list[KeysValues]:
        """Keys and values of condition tokens (B, M) for every cross-attention."""
        h = self.token_norm(self.tokens(tokens) + self.positions[: tokens.shape[1]])
        context = []
        for part, (heads, _) in zip(
            self.key_value(h).split([size for _, size in self.cross_heads], dim=2),
            self.cross_heads,
            strict=True,
        ):
            key, value = part.unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
            context.append((key, value))
        return context

    def forward(
        self,
        x: Tensor,
        film: Tensor | None = None,
        context: list[KeysValues] | None = None,
        *,
        t: Tensor | None = None,
        classes: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """The prediction for x (B, C, H, W), film (B, F) and the context of `token_context`.

        Or for timesteps t (B,) and classes (B,) or tokens (B, M), of which both are made: as in
        training, where all weights should act in one call of the module (`fully_shard`).
        """
        if film is None:
            assert t is not None
            film = self.time_film(t)
            film = film if classes is None else film + self.class_film(classes)
            context = None if tokens is None else self.token_context(tokens)
        films = iter(film.split(self.film_sizes, dim=1))
        contexts = iter(context or ())

        def run(stage, h: Tensor) -> Tensor:
            h = stage["block"](h, next(films))
            if "attention" in stage:
                h = stage["attention"](h)
            if "cross" in stage:
                h = stage["cross"](h, next(contexts))
            return h

        h = self.conv_in(space_to_depth(x, self.patch) if self.patch > 1 else x)
        skips = [h]
        for i, stage in enumerate(self.down):
            h = run(stage, h)
            skips.append(h)
            level, last = divmod(i + 1, self.blocks)
            if last == 0 and level < self.depth:
                h = self.downsample[level - 1](h)
                skips.append(h)
        h = run(self.middle, h)
        for i, stage in enumerate(self.up):
            skip = skips.pop()
            h = run(stage, torch.cat([h, skip], dim=1))
            level, last = divmod(i + 1, self.blocks + 1)
            if last == 0 and level < self.depth:
                h = F.interpolate(h, size=skips[-1].shape[2:], mode="nearest")
                h = self.upsample[level - 1](h)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return depth_to_space(h, self.patch) if self.patch > 1 else h


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with up to 32 groups of at least 4 channels."""
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels // g >= 4)
    return nn.GroupNorm(groups, channels)


def zero_init(module):
    """Start as zero: a residual block as the identity, the network as no prediction."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
