"""Decoder-only transformer: pre-norm blocks of causal attention and an MLP.

    x <- x + proj(attention(rope(qkv(norm(x)))));   x <- x + down(act(up(norm(x))))

Shapes   tokens (B, T) -> logits (B, T, outputs).
Source   Vaswani et al., arXiv:1706.03762; GPT-2 (LayerNorm, GELU, learned positions); Llama,
         arXiv:2302.13971 (RMSNorm, SwiGLU, rotary positions, arXiv:2104.09864); grouped queries,
         arXiv:2305.13245; sliding windows: Mistral, arXiv:2310.06825; normalized queries and
         keys: Qwen3, arXiv:2505.09388.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import cgkernels
from cgkernels.rows import compute_dtype
from cgm.model import Config, Count, Natural, NotNegative, Positive
from cgm.networks.fused_linear import (
    MOST_ROWS,
    Int8Linear,
    Norm,
    PackedLinear,
    activate,
    alterations,
    called_linear,
    fused_linear,
    hooks_of_all_modules,
)
from cgm.networks.transformers_weights import read_transformers

Rope = tuple[Tensor, Tensor]  # cos, sin, each (positions, D / 2)


@dataclass(frozen=True)
class TransformerConfig(Config):
    """Sizes and kinds of the parts."""

    # Different tokens that come in.
    vocabulary: Count
    # Most tokens of a sequence.
    length: Count
    # Different tokens that go out; 0: those that come in.
    outputs: Natural = 0
    # Blocks.
    layers: Count = 4
    # Width of the residual stream.
    width: Count = 128
    # Query heads.
    heads: Count = 4
    # Key and value heads, a divisor of `heads`; 0: as many as query heads.
    kv_heads: Natural = 0
    # Width of a head; 0: `width / heads`.
    head_dim: Natural = 0
    # RMSNorm of each query and key before they are rotated.
    qk_norm: bool = False
    # Of each layer, how many tokens a query sees, itself included, 0: all; (): all in every layer.
    windows: tuple[Natural, ...] = ()
    # Width of the MLP.
    hidden: Count = 256
    # Normalization.
    norm: Literal["rms", "layer"] = "rms"
    # Added inside the square root of the normalization.
    eps: NotNegative = 1e-5
    # Activation of the MLP; gelu_tanh is GELU by tanh, swiglu has a gate.
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    # How positions enter: rotation of queries and keys, or a learned vector each.
    positions: Literal["rotary", "learned"] = "rotary"
    # Rotary: neighboring dimensions are a pair, instead of the two halves.
    interleaved: bool = False
    # Rotary: base of the wavelengths.
    rope_base: Positive = 10000.0
    # Rotary: radians per position of each pair; (): those of rope_base.
    rope_frequencies: tuple[NotNegative, ...] = ()
    # Rotary: cos and sin are multiplied by it.
    rope_gain: Positive = 1.0
    # Rotary: (factor, length) of frequencies that fall as a sequence grows beyond `length`, so that
    # factor times that length has the base grown by factor; (): they do not.
    rope_dynamic: tuple[Positive, ...] = ()
    # Biases of the linear layers in the blocks.
    bias: bool = False
    # Bias of the output layer.
    head_bias: bool = False
    # The output layer is the token embedding.
    tied: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.head_dim and self.width % self.heads:
            raise ValueError(f"heads must divide width {self.width}, got {self.heads}")
        if len(self.windows) not in (0, self.layers):
            raise ValueError(
                f"windows must be () or a number for each of {self.layers} layers, got "
                f"{self.windows}"
            )
        if len(self.rope_frequencies) not in (0, self.head_size // 2):
            raise ValueError(
                f"rope_frequencies must be () or of {self.head_size // 2} pairs, got "
                f"{len(self.rope_frequencies)}"
            )
        if len(self.rope_dynamic) not in (0, 2):
            raise ValueError(
                f"rope_dynamic must be () or (factor, length), got {self.rope_dynamic}"
            )
        if self.heads % max(1, self.kv_heads):
            raise ValueError(f"kv_heads must divide heads {self.heads}, got {self.kv_heads}")
        if self.tied and self.outputs not in (0, self.vocabulary):
            raise ValueError(f"outputs must be 0 where tied, got {self.outputs}")
        if self.rope_dynamic and self.head_size < 4:
            raise ValueError(f"rope_dynamic must be () for heads of {self.head_size} dimensions")
        if self.positions == "rotary" and self.head_size % 2:
            raise ValueError(
                f"heads must leave an even width to each for rotary positions, got {self.head_size}"
            )

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.head_dim or self.width // self.heads

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads


class Block(nn.Module):
    """One layer; window: how many tokens a query sees, None: all."""

    def __init__(self, config: TransformerConfig, window: int | None = None) -> None:
        super().__init__()
        self.config, self.window = config, window
        heads = config.heads + 2 * config.key_heads
        gated = config.activation == "swiglu"
        self.norm1, self.norm2 = (Norm(config.norm, config.width, config.eps) for _ in range(2))
        self.qkv = nn.Linear(config.width, heads * config.head_size, bias=config.bias)
        self.proj = nn.Linear(config.heads * config.head_size, config.width, bias=config.bias)
        self.up = nn.Linear(config.width, config.hidden * (1 + gated), bias=config.bias)
        self.down = nn.Linear(config.hidden, config.width, bias=config.bias)
        self.q_norm, self.k_norm = (
            Norm("rms", config.head_size, config.eps) if config.qk_norm else None for _ in range(2)
        )

    def heads_of(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, D), keys and values (B, T, H_kv, D) of the output of `qkv`."""
        c = self.config
        sizes = (c.heads, c.key_heads, c.key_heads)
        q, k, v = qkv.unflatten(-1, (-1, c.head_size)).split(sizes, dim=-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def forward(self, x: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, W), causal over T, with the rope of these positions: output, keys, values."""
        q, k, v = self.heads_of(self.qkv(self.norm1(x)))
        if rope is not None:
            q, k = (rotate(t, *rope, interleaved=self.config.interleaved) for t in (q, k))
        out = cgkernels.prefill_attention(q, k, v, window=self.window)
        x = x + self.proj(out.flatten(2))
        return x + self.down(activate(self.up(self.norm2(x)), self.config.activation)), k, v

    def step(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor,
        counters: Tensor | None = None,
        linear: Callable[..., Tensor] = fused_linear,
        **attention: Any,
    ) -> Tensor:
        """x (B, W), the next token of each row, whose keys and values are added to the caches.

        linear: `fused_linear` or `called_linear`. attention: of `cgkernels.decode_attention`.
        """
        qkv = linear(x, self.qkv, self.norm1, counters=counters)
        q, k, v = self.heads_of(qkv[:, None])
        out = cgkernels.decode_attention(
            q, keys, values, lengths, k_new=k, v_new=v, counters=counters, window=self.window,
            **attention,
        )  # fmt: skip
        assert isinstance(out, Tensor)  # no logarithms of sums were asked for
        x = linear(out.flatten(1), self.proj, residual=x, counters=counters)
        h = linear(x, self.up, self.norm2, self.config.activation, counters=counters)
        return linear(h, self.down, residual=x, counters=counters)


class Transformer(nn.Module):
    """Embedding, blocks, final norm and output layer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = (
            nn.Embedding(config.length, config.width) if config.positions == "learned" else None
        )
        windows = config.windows or (0,) * config.layers
        self.blocks = nn.ModuleList(Block(config, window or None) for window in windows)
        self.norm = Norm(config.norm, config.width, config.eps)
        outputs = config.outputs or config.vocabulary
        self.head = nn.Linear(config.width, outputs, bias=config.head_bias)
        if config.tied:
            self.head.weight = self.embedding.weight
        self._initialize()

    def __getstate__(self) -> dict[str, Any]:
        """For copies: they are not compiled, as those of any compiled module are not."""
        return {name: value for name, value in super().__getstate__().items() if name != "step"}

    def _initialize(self) -> None:
        """Normal 0.02; the layers that add to the residual stream less, by its depth (GPT-2)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                adds = name.endswith(("proj.weight", "down.weight"))
                scale = 0.02 / math.sqrt(2 * self.config.layers) if adds else 0.02
                nn.init.normal_(parameter, std=scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def step(
        self,
        tokens: Tensor,
        offsets: Tensor | None,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor,
        prefix_keys: Tensor,
        prefix_values: Tensor,
        *,
        starts: Tensor | None = None,
        called: bool = False,
        counters: Tensor | None = None,
        **attention: Any,
    ) -> Tensor:
        """Logits (R, outputs) after one more token of each row: five launches a layer and two.

        tokens: (B, N) values of all that are drawn, of which row r takes that of row r mod B in
        column lengths[r], with offsets (N,) added for the token. Caches (layers, R, S, H_kv, D)
        hold `lengths` tokens of each row and take this one; prefixes are (layers, P, M, H_kv, D).
        starts: (R,), the tokens of each row's prefix; None: M. called: modules are called, not only
        read, in more launches: see `reads_tensors`. counters: as `step_counters` makes them, or
        None. attention: further arguments of `cgkernels.decode_attention`.
        """
        linear = called_linear if called else fused_linear
        if called or (starts is not None and self.positions is not None):
            at = lengths + (prefix_keys.shape[2] if starts is None else starts)
            x = self._embed_newest(tokens, offsets, lengths, at)
        else:
            places = None
            if self.positions is not None:
                places = self.positions.weight[prefix_keys.shape[2] :]
            weight = self.embedding.weight
            x = cgkernels.embed_tokens(tokens, lengths, weight, offsets=offsets, places=places)
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x = block.step(
                x, keys[i], values[i], lengths, counters, linear,
                prefix_k=prefix_keys[i], prefix_v=prefix_values[i],
                rope_interleaved=self.config.interleaved, **attention,
            )  # fmt: skip
        return linear(x, self.head, self.norm, counters=counters)

    def _embed_newest(
        self, tokens: Tensor, offsets: Tensor | None, lengths: Tensor, at: Tensor
    ) -> Tensor:
        """`cgkernels.embed_tokens` by calling the modules, with positions `at` (R,)."""
        token = tokens.gather(1, lengths.view(-1, len(tokens)).t()).t().flatten()
        token = token if offsets is None else token + offsets[lengths]
        x = self.embedding(token.clamp_min(0))
        if self.positions is not None:  # added in float32, as that op does
            wide = compute_dtype(x)
            x = (x.to(wide) + self.positions(at).to(wide)).to(x.dtype)
        return x.masked_fill((token < 0)[:, None], torch.nan)

    def reads_tensors(self) -> bool:
        """Whether token steps may read the tensors of the modules instead of calling them.

        They may not where something was added to a module that calls would heed: an adapter or
        a quantized layer in its place, a hook, a parametrization.

        Raises:
            ValueError: that is a block or the network itself, which no step calls.
        """
        altered = dict(alterations(self, _PLAIN))
        for name, why in altered.items():
            if _is_whole(name):
                raise ValueError(
                    f"network must be plain where token steps do not call it, but "
                    f"{name or 'the network'} {why}"
                )
        return not altered and not hooks_of_all_modules()

    def step_counters(self, rows: int) -> Tensor:
        """Zeros for all launches of a step of so many rows, which leave them at zero."""
        c = self.config
        outputs = (
            (c.heads + 2 * c.key_heads) * c.head_size, c.width, 2 * c.hidden,
            c.outputs or c.vocabulary,
        )  # fmt: skip
        tiles = math.ceil(min(rows, MOST_ROWS) / 16) * math.ceil(max(outputs) / 16)
        device = next(self.parameters()).device
        return torch.zeros(max(tiles, rows * c.heads), dtype=torch.int32, device=device)

    def int8(self) -> "Transformer":
        """A twin for sampling and likelihoods, with weights of 8 bits in all linear layers."""
        return self._with_linear(Int8Linear)

    def pack(self) -> "Transformer":
        """A twin for `step` with its linear layers packed for a CPU; itself if that is compiled."""
        return self if "step" in vars(self) else self._with_linear(PackedLinear)

    def _with_linear(self, kind: Callable[[nn.Linear], nn.Module]) -> "Transformer":
        """A twin with other linear layers; all else is shared."""
        for name, why in alterations(self, _PLAIN):
            raise ValueError(
                f"network must be plain for {kind.__name__}, but {name or 'the network'} {why}"
            )
        twin = copy.deepcopy(self, {id(p): p for p in self.parameters()})
        vars(twin).pop("step", None)  # a compiled one runs with the weights it was made for
        for parent in (twin, *twin.blocks):
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    setattr(parent, name, kind(child))
        return twin

    def rope_table(self, coordinates: Tensor, lengths: Tensor | None = None) -> Rope:
        """(cos, sin), each (T, D / 2) float32, of positions (T,) or coordinates (T, axes).

        With several axes each takes its share of the pairs, the first axis the first ones.
        lengths: (T,), tokens of the sequence when each position is rotated, for frequencies that
        fall with it (`rope_dynamic`); None: all T.
        """
        c = self.config
        coordinates = coordinates[:, None] if coordinates.dim() == 1 else coordinates
        pairs, axes = c.head_size // 2, coordinates.shape[1]
        if pairs % axes:
            raise ValueError(f"{axes} coordinates must share {pairs} pairs of dimensions evenly")
        if axes > 1 and (c.rope_frequencies or c.rope_dynamic):
            raise ValueError(f"coordinates must have one axis with rope_frequencies, got {axes}")
        device = coordinates.device
        if c.rope_frequencies:
            frequencies = torch.tensor(c.rope_frequencies, dtype=torch.float32, device=device)
        else:
            powers = torch.arange(pairs // axes, dtype=torch.float32, device=device)
            frequencies = c.rope_base ** -(powers / (pairs // axes))
        if c.rope_dynamic:
            factor, trained = c.rope_dynamic
            if lengths is None:
                lengths = torch.full_like(coordinates[:, 0], coordinates.shape[0])
            growth = factor * (lengths.double() / trained).clamp_min(1) - (factor - 1)
            powers = torch.arange(pairs, dtype=torch.float32, device=device) / (pairs - 1)
            frequencies = (frequencies * growth[:, None] ** -powers).float()[:, None]
        angles = (coordinates.float()[:, :, None] * frequencies).flatten(1)
        return angles.cos() * c.rope_gain, angles.sin() * c.rope_gain

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, T, W) of tokens (B, T) from the first position on.

        Raises:
            ValueError: more tokens than learned positions.
        """
        x = self.embedding(tokens)
        if self.positions is None:
            return x
        if tokens.shape[1] > self.config.length:
            raise ValueError(
                f"tokens must be at most {self.config.length} in a row, got {tokens.shape[1]}"
            )
        return x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))

    def forward(self, tokens: Tensor, rope: Rope | None = None) -> Tensor:
        """Logits (B, T, outputs) of tokens (B, T); rope defaults to positions 0 .. T - 1."""
        if rope is None and self.config.positions == "rotary":
            rope = self.rope_table(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.prefill(tokens, rope)[0]))

    def prefill(self, tokens: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (B, T, W) of tokens (B, T); keys, values (layers, B, T, H_kv, D)."""
        x, keys, values = self.embed(tokens), [], []
        for block in self.blocks:
            x, k, v = block(x, rope)
            keys.append(k)
            values.append(v)
        return x, torch.stack(keys), torch.stack(values)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotary embedding of x (B, T, H, D) by (T, D / 2): pairs (i, i + D / 2), or (2 i, 2 i + 1)."""
    cos, sin = (t[:, None].to(x.dtype) for t in (cos, sin))
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


# The classes of an unaltered network.
_PLAIN = (Transformer, Block, Norm, nn.Linear, nn.Embedding, nn.ModuleList, Int8Linear)


def _is_whole(name: str) -> bool:
    """Whether a submodule of this name is no part of a block but a block, or all of them."""
    return name in ("", "blocks") or name.removeprefix("blocks.").isdigit()


def from_transformers(source: Any) -> Transformer:
    """A Transformer with the weights of a language model of transformers (4.57 and 5 were tried).

    GPT2LMHeadModel, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM:
    grouped keys, biases, heads of any width, normalized queries and keys, windows, output layers
    tied or not, and rope types default, linear, dynamic, yarn and llama3. It has the dtype and the
    device of the source, and copies of its weights; every weight of the source is used.

    With dynamic rope, logits are those of a source that has seen no longer sequence before, and
    beyond its trained length tokens are those of its `generate` with a cache: keys keep the
    rotation of the length at which they were made.

    Not served: rope type longrope and partial rotation, attention scaled by anything else than
    1 / sqrt(D), cross-attention, gated MLPs with another activation than SiLU, plain ones with
    another than a GELU; quantized and sharded models; anything wrapped, hooked or replaced in it,
    such as adapters (merge them first) and `torch.compile(model)` (give the model itself).

    Raises:
        ValueError: one of these, by name; weights of several dtypes.
        TypeError: no language model of these classes.
    """
    fields, tensors = read_transformers(source)
    first = tensors["embedding.weight"]
    with torch.device("meta"):
        network = Transformer(TransformerConfig(**fields)).to(first.dtype)
    network.to_empty(device=first.device)
    if network.config.tied:
        network.head.weight = network.embedding.weight  # to_empty parts them
        tensors["head.weight"] = first
    shapes = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes.get(name):
            raise ValueError(
                f"source must have weights of the sizes in its config, but those of {name} are "
                f"{tuple(tensor.shape)}, not {shapes.get(name)}"
            )
    network.load_state_dict(tensors)
    return network.eval()
