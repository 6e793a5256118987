"""Decoder-only transformer: pre-norm blocks of causal attention and an MLP.

    x <- x + proj(attention(rope(qkv(norm(x)))));   x <- x + down(act(up(norm(x))))

Shapes   tokens (B, T) -> logits (B, T, outputs).
Source   Vaswani et al., arXiv:1706.03762; GPT-2 (LayerNorm, GELU, learned positions); Llama,
         arXiv:2302.13971 (RMSNorm, SwiGLU, rotary positions, arXiv:2104.09864); grouped queries,
         arXiv:2305.13245.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cgkernels
from cgm.model import check_choices, check_positive

Rope = tuple[Tensor, Tensor]  # cos, sin, each (positions, D / 2)
_ROWS = 64  # of one launch of norm_linear


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and kinds of the parts."""

    # Different tokens that come in.
    vocabulary: int
    # Most tokens of a sequence.
    length: int
    # Different tokens that go out; 0: those that come in.
    outputs: int = 0
    # Blocks.
    layers: int = 4
    # Width of the residual stream.
    width: int = 128
    # Query heads.
    heads: int = 4
    # Key and value heads, a divisor of `heads`; 0: as many as query heads.
    kv_heads: int = 0
    # Width of the MLP.
    hidden: int = 256
    # Normalization.
    norm: Literal["rms", "layer"] = "rms"
    # Added inside the square root of the normalization.
    eps: float = 1e-5
    # Activation of the MLP; gelu_tanh is GELU by tanh, swiglu has a gate.
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    # How positions enter: rotation of queries and keys, or a learned vector each.
    positions: Literal["rotary", "learned"] = "rotary"
    # Rotary: neighboring dimensions are a pair, instead of the two halves.
    interleaved: bool = False
    # Rotary: base of the wavelengths.
    rope_base: float = 10000.0
    # Biases of the linear layers.
    bias: bool = False
    # The output layer is the token embedding.
    tied: bool = False

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(self, "vocabulary", "length", "layers", "width", "heads", "hidden")
        if self.width % self.heads:
            raise ValueError(f"heads must divide width {self.width}, got {self.heads}")
        if self.kv_heads < 0 or self.heads % max(1, self.kv_heads):
            raise ValueError(f"kv_heads must divide heads {self.heads}, got {self.kv_heads}")
        if self.tied and self.outputs not in (0, self.vocabulary):
            raise ValueError(f"outputs must be 0 where tied, got {self.outputs}")
        if self.positions == "rotary" and self.head_size % 2:
            raise ValueError(
                f"heads must leave an even width to each for rotary positions, got {self.head_size}"
            )

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, in float32."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.kind, self.eps = config.norm, config.eps
        self.weight = nn.Parameter(torch.ones(config.width))
        self.bias = nn.Parameter(torch.zeros(config.width)) if config.norm == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., W) normalized."""
        if self.kind == "layer":
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Int8Linear(nn.Module):
    """A linear layer with weights of 8 bits: W = scales[:, None] * weight, rounded to nearest."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        wide = linear.weight.detach().float()
        scales = wide.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        self.weight = nn.Buffer((wide / scales[:, None]).round().to(torch.int8))
        self.scales = nn.Buffer(scales)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) times the weight, plus the bias."""
        return F.linear(x, (self.weight * self.scales[:, None]).to(x.dtype), self.bias)


class PackedLinear(nn.Module):
    """A linear layer for `fused_linear` alone, its weight packed by `cgkernels.pack_weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = cgkernels.pack_weight(linear.weight), linear.bias

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, of which a packed weight knows neither: as it was before."""
        state = dict(vars(self))
        if self.weight.is_mkldnn:
            state["weight"] = self.weight.to_dense()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.weight = cgkernels.pack_weight(self.weight)


def fused_linear(
    x: Tensor,
    linear: nn.Linear | Int8Linear | PackedLinear,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """act(linear(norm(x))) + residual of rows (B, K), each with the same bits in any batch.

    That holds for the rows of one `cgkernels.norm_linear`, at most 64: more go through it in turn.
    """
    scales = linear.scales if isinstance(linear, Int8Linear) else None
    options: dict[str, Any] = {
        "bias": linear.bias, "scales": scales, "activation": activation, "counters": counters,
    }  # fmt: skip
    if norm is not None:
        options |= {
            "norm": norm.kind, "norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps,
        }  # fmt: skip
    if len(x) <= _ROWS:
        return cgkernels.norm_linear(x, linear.weight, residual=residual, **options)
    residuals = [None] * len(x) if residual is None else residual.split(_ROWS)
    parts = zip(x.split(_ROWS), residuals, strict=False)
    return torch.cat(
        [cgkernels.norm_linear(x, linear.weight, residual=r, **options) for x, r in parts]
    )


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        heads = config.heads + 2 * config.key_heads
        gated = config.activation == "swiglu"
        self.norm1, self.norm2 = Norm(config), Norm(config)
        self.qkv = nn.Linear(config.width, heads * config.head_size, bias=config.bias)
        self.proj = nn.Linear(config.width, config.width, bias=config.bias)
        self.up = nn.Linear(config.width, config.hidden * (1 + gated), bias=config.bias)
        self.down = nn.Linear(config.hidden, config.width, bias=config.bias)

    def heads_of(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, D), keys and values (B, T, H_kv, D) of the output of `qkv`."""
        c = self.config
        sizes = (c.heads, c.key_heads, c.key_heads)
        return tuple(qkv.unflatten(-1, (-1, c.head_size)).split(sizes, dim=-2))  # type: ignore[return-value]

    def forward(self, x: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, W), causal over T, with the rope of these positions: output, keys, values."""
        q, k, v = self.heads_of(self.qkv(self.norm1(x)))
        if rope is not None:
            q, k = (rotate(t, *rope, interleaved=self.config.interleaved) for t in (q, k))
        out = cgkernels.prefill_attention(q, k, v)
        x = x + self.proj(out.flatten(2))
        return x + self.down(self.activate(self.up(self.norm2(x)))), k, v

    def step(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor,
        counters: Tensor | None = None,
        **attention: Any,
    ) -> Tensor:
        """x (B, W), the next token of each row, whose keys and values are added to the caches.

        attention: of `cgkernels.decode_attention`.
        """
        qkv = fused_linear(x, self.qkv, self.norm1, counters=counters)
        q, k, v = self.heads_of(qkv[:, None])
        out = cgkernels.decode_attention(
            q, keys, values, lengths, k_new=k, v_new=v, counters=counters, **attention
        )
        assert isinstance(out, Tensor)  # no logarithms of sums were asked for
        x = fused_linear(out.flatten(1), self.proj, residual=x, counters=counters)
        h = fused_linear(x, self.up, self.norm2, self.config.activation, counters=counters)
        return fused_linear(h, self.down, residual=x, counters=counters)

    def activate(self, h: Tensor) -> Tensor:
        """The activation; of swiglu the first half is the gate."""
        if self.config.activation == "swiglu":
            gate, value = h.chunk(2, dim=-1)
            return F.silu(gate) * value
        return F.gelu(h, approximate="tanh" if self.config.activation == "gelu_tanh" else "none")


class Transformer(nn.Module):
    """Embedding, blocks, final norm and output layer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = (
            nn.Embedding(config.length, config.width) if config.positions == "learned" else None
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = Norm(config)
        self.head = nn.Linear(config.width, config.outputs or config.vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self._initialize()

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
        counters: Tensor | None = None,
        **attention: Any,
    ) -> Tensor:
        """Logits (R, outputs) after one more token of each row: five launches a layer and two.

        tokens: (B, N) values of all that are drawn, of which row r takes that of row r mod B in
        column lengths[r], with offsets (N,) added for the token. Caches (layers, R, S, H_kv, D)
        hold `lengths` tokens of each row and take this one; prefixes are (layers, P, M, H_kv, D).
        counters: as `step_counters` makes them, or None. attention: further arguments of
        `cgkernels.decode_attention`.
        """
        places = None if self.positions is None else self.positions.weight[prefix_keys.shape[2] :]
        weight = self.embedding.weight
        x = cgkernels.embed_tokens(tokens, lengths, weight, offsets=offsets, places=places)
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x = block.step(
                x, keys[i], values[i], lengths, counters,
                prefix_k=prefix_keys[i], prefix_v=prefix_values[i],
                rope_interleaved=self.config.interleaved, **attention,
            )  # fmt: skip
        return fused_linear(x, self.head, self.norm, counters=counters)

    def step_counters(self, rows: int) -> Tensor:
        """Zeros for all launches of a step of so many rows, which leave them at zero."""
        c = self.config
        outputs = (
            (c.heads + 2 * c.key_heads) * c.head_size, c.width, 2 * c.hidden,
            c.outputs or c.vocabulary,
        )  # fmt: skip
        tiles = math.ceil(min(rows, _ROWS) / 16) * math.ceil(max(outputs) / 16)
        device = self.embedding.weight.device
        return torch.zeros(max(tiles, rows * c.heads), dtype=torch.int32, device=device)

    def int8(self) -> "Transformer":
        """A twin for sampling and likelihoods, with weights of 8 bits in all linear layers."""
        return self._with_linear(Int8Linear)

    def pack(self) -> "Transformer":
        """A twin for `step` with its linear layers packed for a CPU; itself if that is compiled."""
        return self if "step" in vars(self) else self._with_linear(PackedLinear)

    def _with_linear(self, kind: Callable[[nn.Linear], nn.Module]) -> "Transformer":
        """A twin with other linear layers; all else is shared."""
        twin = copy.deepcopy(self, {id(p): p for p in self.parameters()})
        vars(twin).pop("step", None)  # a compiled one runs with the weights it was made for
        for parent in (twin, *twin.blocks):
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    setattr(parent, name, kind(child))
        return twin

    def rope_table(self, coordinates: Tensor) -> Rope:
        """(cos, sin), each (T, D / 2) float32, of positions (T,) or coordinates (T, axes).

        With several axes each takes its share of the pairs, the first axis the first ones.
        """
        coordinates = coordinates.reshape(len(coordinates), -1).float()
        pairs, axes = self.config.head_size // 2, coordinates.shape[1]
        if pairs % axes:
            raise ValueError(f"{axes} coordinates must share {pairs} pairs of dimensions evenly")
        powers = torch.arange(pairs // axes, dtype=torch.float32, device=coordinates.device)
        powers = powers / (pairs // axes)
        angles = (coordinates[:, :, None] * self.config.rope_base**-powers).flatten(1)
        return angles.cos(), angles.sin()

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, T, W) of tokens (B, T) from the first position on."""
        x = self.embedding(tokens)
        if self.positions is None:
            return x
        return x + self.positions.weight[: tokens.shape[1]]

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


# Weights of others --------------------------------------------------------------------------------
def from_transformers(source: Any) -> Transformer:
    """A Transformer with the weights of a GPT-2 or Llama language model of transformers.

    Raises:
        ValueError: another architecture, or a variant of these that this network does not have.
    """
    kind, state = source.config.model_type, source.state_dict()
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"source must be a gpt2 or a llama of transformers, got {kind!r}")
    config, tensors = (_gpt2 if kind == "gpt2" else _llama)(source.config, state)
    network = Transformer(config)
    if config.tied:
        tensors["head.weight"] = tensors["embedding.weight"]
    network.load_state_dict(tensors)
    return network.eval()


# The parts of a block of GPT-2, whose matrices are (in, out), and of ours.
GPT2 = {
    "ln_1": "norm1", "ln_2": "norm2", "attn.c_attn": "qkv", "attn.c_proj": "proj",
    "mlp.c_fc": "up", "mlp.c_proj": "down",
}  # fmt: skip


def _gpt2(c: Any, state: dict[str, Tensor]) -> tuple[TransformerConfig, dict[str, Tensor]]:
    if c.activation_function not in ("gelu_new", "gelu_pytorch_tanh", "gelu"):
        raise ValueError(f"activation_function must be a GELU, got {c.activation_function!r}")
    if not c.scale_attn_weights or c.scale_attn_by_inverse_layer_idx or c.add_cross_attention:
        raise ValueError("attention must be scaled by 1 / sqrt(D) alone, without cross-attention")
    config = TransformerConfig(
        vocabulary=c.vocab_size, length=c.n_positions, layers=c.n_layer, width=c.n_embd,
        heads=c.n_head, hidden=c.n_inner or 4 * c.n_embd, norm="layer", eps=c.layer_norm_epsilon,
        activation="gelu" if c.activation_function == "gelu" else "gelu_tanh",
        positions="learned", bias=True, tied=True,
    )  # fmt: skip
    tensors = {
        "embedding.weight": state["transformer.wte.weight"],
        "positions.weight": state["transformer.wpe.weight"],
    }
    for i, (theirs, ours), kind in product(range(c.n_layer), GPT2.items(), ("weight", "bias")):
        value = state[f"transformer.h.{i}.{theirs}.{kind}"]
        tensors[f"blocks.{i}.{ours}.{kind}"] = value.mT if value.dim() == 2 else value
    for part in ("weight", "bias"):
        tensors[f"norm.{part}"] = state[f"transformer.ln_f.{part}"]
    return config, tensors


def _llama(c: Any, state: dict[str, Tensor]) -> tuple[TransformerConfig, dict[str, Tensor]]:
    rope = getattr(c, "rope_parameters", None) or {
        "rope_type": "default",
        "rope_theta": c.rope_theta,
    }
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type must be default, got {rope['rope_type']!r}")
    if c.hidden_act != "silu" or c.attention_bias or c.mlp_bias:
        raise ValueError("hidden_act must be silu, and the linear layers without bias")
    if (getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads) * (
        c.num_attention_heads
    ) != c.hidden_size:
        raise ValueError(f"heads must fill hidden_size, got head_dim {c.head_dim}")
    config = TransformerConfig(
        vocabulary=c.vocab_size, length=c.max_position_embeddings, layers=c.num_hidden_layers,
        width=c.hidden_size, heads=c.num_attention_heads, kv_heads=c.num_key_value_heads,
        hidden=c.intermediate_size, eps=c.rms_norm_eps, rope_base=rope["rope_theta"],
        tied=c.tie_word_embeddings,
    )  # fmt: skip
    tensors = {"embedding.weight": state["model.embed_tokens.weight"]}
    tensors["norm.weight"] = state["model.norm.weight"]
    if not config.tied:
        tensors["head.weight"] = state["lm_head.weight"]
    for i in range(config.layers):
        theirs, ours = f"model.layers.{i}", f"blocks.{i}"
        parts = {
            "norm1": ("input_layernorm",),
            "norm2": ("post_attention_layernorm",),
            "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "proj": ("self_attn.o_proj",),
            "up": ("mlp.gate_proj", "mlp.up_proj"),
            "down": ("mlp.down_proj",),
        }
        for name, sources in parts.items():
            tensors[f"{ours}.{name}.weight"] = torch.cat(
                [state[f"{theirs}.{source}.weight"] for source in sources]
            )
    return config, tensors
