"""Language models of the package transformers, read: fields of our config, tensors by our names.

What decides is read from the modules as they are, not from how their config once made them: sizes
from weights, frequencies from buffers. What is left in the source afterwards is refused by name.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cgm.networks.fused_linear import alterations

# Language models that are read, by class: the prefix of their classes.
_SOURCES = {
    "GPT2LMHeadModel": "GPT2", "LlamaForCausalLM": "Llama", "MistralForCausalLM": "Mistral",
    "Qwen2ForCausalLM": "Qwen2", "Qwen3ForCausalLM": "Qwen3",
}  # fmt: skip
# The classes of their modules, but activations.
_GPT2_PARTS = ("LMHeadModel", "Model", "Block", "Attention", "MLP")
_LLAMA_PARTS = (
    "ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding",
)  # fmt: skip
_TORCH_PARTS = (nn.Embedding, nn.Linear, nn.ModuleList, nn.LayerNorm, nn.Dropout)
_GELUS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh",
}  # fmt: skip
_SILUS = {"silu": "swiglu", "swish": "swiglu"}
# Fields that other models of transformers obey; the values that change nothing.
_WITHOUT_EFFECT = {
    "partial_rotary_factor": (None, 1.0), "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,), "is_causal": (None, True),
    "add_cross_attention": (None, False),
}  # fmt: skip
_ROPES = ("default", "linear", "dynamic", "yarn", "llama3")

# The parts of a block of GPT-2, whose matrices are (in, out), and of ours.
GPT2 = {
    "ln_1": "norm1", "ln_2": "norm2", "attn.c_attn": "qkv", "attn.c_proj": "proj",
    "mlp.c_fc": "up", "mlp.c_proj": "down",
}  # fmt: skip
# The parts of ours, and of those like Llama, which stand one below the other in ours.
_LLAMA = {
    "norm1": ("input_layernorm",), "norm2": ("post_attention_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "proj": ("self_attn.o_proj",), "up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}  # fmt: skip
_QK_NORM = {"q_norm": ("self_attn.q_norm",), "k_norm": ("self_attn.k_norm",)}


def read_transformers(source: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields of TransformerConfig, and the tensors of the network: see `from_transformers`."""
    kind = _kind(source)
    for name, values in _WITHOUT_EFFECT.items():
        if getattr(source.config, name, None) not in values:
            raise ValueError(
                f"source must have no {name} in its config, got {getattr(source.config, name)}"
            )
    for name, module in source.named_modules():
        if why := _unread(module):
            raise ValueError(f"source must be as transformers made it, but {name} {why}")
    if source.config.num_hidden_layers < 1:
        raise ValueError("source must have at least one layer, got none")
    state = _weights(source)
    fields, tensors = (_gpt2 if kind == "GPT2" else _llama)(source, kind, state)
    vocabulary, width = tensors["embedding.weight"].shape
    head = state.pop("lm_head.weight")
    fields |= {"vocabulary": vocabulary, "width": width}
    fields["tied"] = source.lm_head.weight is source.get_input_embeddings().weight
    if not fields["tied"]:
        tensors["head.weight"] = head
        fields["outputs"] = 0 if head.shape[0] == vocabulary else head.shape[0]
    if bias := state.pop("lm_head.bias", None) is not None:
        tensors["head.bias"] = source.lm_head.bias.detach()
    fields["head_bias"] = bias
    if state:
        raise ValueError(
            f"source must have no weights but those of its class, got {', '.join(state)}"
        )
    return fields, tensors


def _kind(source: Any) -> str:
    """The prefix of its classes, of all of its modules."""
    if not isinstance(source, nn.Module):
        raise TypeError(f"source must be a model of transformers, got {type(source).__name__}")
    kind = _SOURCES.get(type(source).__name__, "")
    home = f"transformers.models.{kind.lower()}.modeling_{kind.lower()}"
    if not kind or type(source).__module__ != home:
        raise ValueError(
            f"source must be one of {', '.join(_SOURCES)} of transformers, with nothing around it, "
            f"got {type(source).__module__}.{type(source).__name__}"
        )
    names = vars(sys.modules[home])
    parts = _GPT2_PARTS if kind == "GPT2" else _LLAMA_PARTS
    plain = {*_TORCH_PARTS, *(names[kind + part] for part in parts)}
    if kind == "GPT2":
        plain.add(names["Conv1D"])
    # Which activations they are is told where they are read.
    plain |= {type(m) for name, m in source.named_modules() if name.endswith((".act", ".act_fn"))}
    for name, why in alterations(source, plain):
        raise ValueError(f"source must be as transformers made it, but {name or 'it'} {why}")
    return kind


def _unread(module: nn.Module) -> str:
    """What a module of the right class does that its tensors do not tell; mostly nothing."""
    if getattr(module, "max_norm", None) is not None:
        return f"has max_norm {module.max_norm}"
    if not getattr(module, "is_causal", True):
        return "is not causal"
    if isinstance(module, nn.LayerNorm) and (module.weight is None or module.bias is None):
        return "has no weight or no bias"
    return ""


def _weights(source: Any) -> dict[str, Tensor]:
    """All of them, of one floating dtype on one device."""
    state = {name: tensor.detach() for name, tensor in source.state_dict().items()}
    for what in ("dtype", "device"):
        found = sorted({str(getattr(tensor, what)) for tensor in state.values()})
        if len(found) > 1:
            raise ValueError(f"source must have one {what} for all weights, got {', '.join(found)}")
    first = next(iter(state.values()))
    if not first.is_floating_point() or first.is_meta:
        raise ValueError(
            f"source must have its weights as numbers, got {first.dtype} on {first.device}"
        )
    return state


def _gpt2(
    source: Any, kind: str, state: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    blocks = list(source.transformer.h)
    attentions = [block.attn for block in blocks]
    for attention in attentions:
        if not attention.scale_attn_weights or attention.scale_attn_by_inverse_layer_idx:
            raise ValueError(
                "source must scale attention by 1 / sqrt(D) alone: scale_attn_weights without "
                "scale_attn_by_inverse_layer_idx"
            )
    norms = [source.transformer.ln_f, *(n for block in blocks for n in (block.ln_1, block.ln_2))]
    fields = {
        "layers": len(blocks), "heads": _one("n_head", (a.num_heads for a in attentions)),
        "hidden": blocks[0].mlp.c_fc.weight.shape[1], "norm": "layer",
        "eps": _one("layer_norm_epsilon", (norm.eps for norm in norms)),
        "activation": _activation("activation_function", [b.mlp.act for b in blocks], _GELUS),
        "length": state["transformer.wpe.weight"].shape[0], "positions": "learned", "bias": True,
    }  # fmt: skip
    tensors = {"positions.weight": state.pop("transformer.wpe.weight")}
    tensors["embedding.weight"] = state.pop("transformer.wte.weight")
    tensors |= {
        f"norm.{part}": state.pop(f"transformer.ln_f.{part}") for part in ("weight", "bias")
    }
    for i in range(len(blocks)):
        parts = {ours: (theirs,) for theirs, ours in GPT2.items()}
        taken = _block(state, f"transformer.h.{i}", f"blocks.{i}", parts)
        tensors |= {name: t.mT if t.dim() == 2 else t for name, t in taken.items()}
    return fields, tensors


def _llama(
    source: Any, kind: str, state: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    blocks = list(source.model.layers[: source.config.num_hidden_layers])
    attentions, first = [block.self_attn for block in blocks], blocks[0]
    head_dim = _one("head_dim", (a.head_dim for a in attentions))
    _one("scaling of attention", (head_dim**-0.5, *(a.scaling for a in attentions)))
    norms = [
        source.model.norm,
        *(n for block in blocks for n in (block.input_layernorm, block.post_attention_layernorm)),
    ]
    parts: dict[str, tuple[str, ...]] = dict(_LLAMA)
    if kind == "Qwen3":
        parts |= _QK_NORM
        norms += [n for a in attentions for n in (a.q_norm, a.k_norm)]
    fields = {
        "layers": len(blocks), "head_dim": head_dim, "qk_norm": kind == "Qwen3",
        "heads": first.self_attn.q_proj.weight.shape[0] // head_dim,
        "kv_heads": first.self_attn.k_proj.weight.shape[0] // head_dim,
        "hidden": first.mlp.gate_proj.weight.shape[0], "norm": "rms",
        "eps": _one("rms_norm_eps", (norm.variance_epsilon for norm in norms)),
        "activation": _activation("hidden_act", [b.mlp.act_fn for b in blocks], _SILUS),
        "windows": _windows(source.config, kind, len(blocks)),
        **_rope(source.model.rotary_emb, source.config, head_dim),
    }  # fmt: skip
    tensors = {"embedding.weight": state.pop("model.embed_tokens.weight")}
    tensors["norm.weight"] = state.pop("model.norm.weight")
    for i in range(len(blocks)):
        tensors |= _block(state, f"model.layers.{i}", f"blocks.{i}", parts)
    biased = any(
        name.endswith(("proj.bias", "qkv.bias", "up.bias", "down.bias")) for name in tensors
    )
    if biased:  # one that is missing is zero
        for name, weight in list(tensors.items()):
            if name.endswith(("qkv.weight", "proj.weight", "up.weight", "down.weight")):
                tensors.setdefault(
                    name.replace("weight", "bias"), weight.new_zeros(weight.shape[0])
                )
    return {**fields, "bias": biased}, tensors


def _block(
    state: dict[str, Tensor], theirs: str, ours: str, parts: Mapping[str, tuple[str, ...]]
) -> dict[str, Tensor]:
    """The tensors of a block by our names, taken out of `state`."""
    taken = {}
    for name, sources in parts.items():
        for kind in ("weight", "bias"):
            found = [state.pop(f"{theirs}.{source}.{kind}", None) for source in sources]
            present = [tensor for tensor in found if tensor is not None]
            if present and len(present) < len(found):
                raise ValueError(f"source must have a {kind} in all of {theirs}.{sources} or none")
            if present:
                taken[f"{ours}.{name}.{kind}"] = torch.cat(present)
    return taken


def _one(name: str, values: Iterable[Any]) -> Any:
    """The value that all layers have."""
    found = sorted(set(values))
    if len(found) != 1:
        raise ValueError(f"source must have one {name} in all layers, got {found}")
    return found[0]


def _activation(field: str, modules: list[Any], known: dict[str, str]) -> str:
    """Ours, of their activation modules."""
    from_name = sys.modules["transformers.activations"].ACT2FN
    ours = {type(from_name[name]): value for name, value in known.items() if name in from_name}
    found = {ours.get(type(module), type(module).__name__) for module in modules}
    if len(found) != 1 or not found <= set(known.values()):
        raise ValueError(
            f"{field} must be one of {', '.join(known)}, got {', '.join(sorted(found))}"
        )
    return str(found.pop())


def _windows(config: Any, kind: str, layers: int) -> tuple[int, ...]:
    window = getattr(config, "sliding_window", None)
    if kind == "Mistral":
        types = ["full_attention" if window is None else "sliding_attention"] * layers
    elif kind == "Llama":
        types = ["full_attention"] * layers
    else:
        types = list(config.layer_types[:layers])
    for given in getattr(config, "layer_types", None) or types:
        if given not in types:
            raise ValueError(f"source must have layer_types that {kind} obeys, got {given}")
    if unknown := set(types) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types must be full or sliding attention, got {unknown.pop()}")
    if "sliding_attention" not in types:
        return ()
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"sliding_window must be a positive number of tokens, got {window}")
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


def _rope(rotary: Any, config: Any, head_dim: int) -> dict[str, Any]:
    """Fields of the rotation; version 4 of transformers has `rope_scaling`, 5 `rope_parameters`."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rotary.rope_type not in _ROPES:
        raise ValueError(f"rope_type must be one of {', '.join(_ROPES)}, got {rotary.rope_type!r}")
    dynamic = rotary.rope_type == "dynamic"
    # Of a dynamic one the buffer is that of the longest sequence that it has seen.
    frequencies = rotary.original_inv_freq if dynamic else rotary.inv_freq
    if rope.get("partial_rotary_factor", 1.0) != 1 or len(frequencies) != head_dim // 2:
        raise ValueError(
            "partial_rotary_factor must be 1: heads are rotated as a whole, got "
            f"{len(frequencies)} frequencies for {head_dim} dimensions"
        )
    length = trained = config.max_position_embeddings
    if dynamic:
        length = int(trained * rope["factor"])
    return {
        "length": length, "positions": "rotary",
        "rope_frequencies": tuple(frequencies.float().tolist()),
        "rope_gain": float(rotary.attention_scaling),
        "rope_dynamic": (float(rope["factor"]), trained) if dynamic else (),
    }  # fmt: skip
