"""`decode_attention`: what it is measured on, what it launches, how it is tuned.

Shapes are those of the live keys, (B, T, Hkv, D), which one new token of each row is the last of.
The calls of FlexAttention, flash-attn and FlashInfer follow their documentation; none of them has
run yet.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import cgkernels
from benchmarks.harness.case import Inputs, OpCase, Provider, Size, Sweep
from benchmarks.harness.ceilings import Call
from benchmarks.harness.inputs import normal
from benchmarks.harness.plain import sdpa
from benchmarks.harness.tuning import Config, early, tuned
from cgkernels.ops.decode_attention.launch import _launch_append, _launch_fwd
from cgkernels.testing import Launch

_SPARE = 128  # slots of a cache that are not used yet
_PREFIX = 1024  # tokens that all rows share
_PAGE = 16  # tokens

_HEADS = {
    "b1_t256": Size((1, 256, 12, 64), "GPT-2 small", cpu=True),
    "b8_t256": Size((8, 256, 12, 64), "GPT-2 small", cpu=True),
    "b64_t256": Size((64, 256, 12, 64), "GPT-2 small"),
    "b1_t1024": Size((1, 1024, 12, 64), "GPT-2 small", cpu=True),
    "b8_t1024": Size((8, 1024, 12, 64), "GPT-2 small", first=True),
    "b64_t1024": Size((64, 1024, 12, 64), "GPT-2 small", first=True),
    "b1_t8192": Size((1, 8192, 12, 64), "GPT-2 small"),
    "b8_t8192": Size((8, 8192, 12, 64), "GPT-2 small"),
    "large_b1_t1024": Size((1, 1024, 32, 128), "Llama-2 7B"),
    "large_b8_t1024": Size((8, 1024, 32, 128), "Llama-2 7B"),
    "large_b1_t8192": Size((1, 8192, 32, 128), "Llama-2 7B"),
    "large_b64_t1024": Size((64, 1024, 32, 128), "Llama-2 7B"),
}

_GROUPS = {
    "b1_t256": Size((1, 256, 8, 128), "Llama-3 8B", cpu=True),
    "b1_t1024": Size((1, 1024, 8, 128), "Llama-3 8B"),
    "b8_t1024": Size((8, 1024, 8, 128), "Llama-3 8B", first=True),
    "b64_t1024": Size((64, 1024, 8, 128), "Llama-3 8B"),
    "b1_t8192": Size((1, 8192, 8, 128), "Llama-3 8B"),
    "b8_t8192": Size((8, 8192, 8, 128), "Llama-3 8B"),
}

_SUFFIXES = {
    "b8_t64": Size((8, 64, 12, 64), "GPT-2 small", cpu=True),
    "b64_t64": Size((64, 64, 12, 64), "GPT-2 small", first=True),
    "b64_t512": Size((64, 512, 12, 64), "GPT-2 small", first=True),
    "b64_t1024": Size((64, 1024, 12, 64), "GPT-2 small"),
}

_CONTEXT = Sweep("context", tuple((4, t, 6, 64) for t in (256, 512, 1024, 2048, 4096)), 16, axis=1)


# One token behind a cache -------------------------------------------------------------------------
def _decode_inputs(shape, dtype, generator, device, *, group=1, prefix=0):
    """The last live slot is written by every call, so that each call does the same.

    With a prefix, the caches hold it in front of every row, as without sharing; own_ and prefix_
    are the same tokens in two parts.
    """
    rows, length, heads, size = shape
    end, capacity = prefix + length, prefix + length + _SPARE
    angles = torch.outer(torch.arange(capacity), 1e4 ** -torch.linspace(0, 1, size // 2))

    def tokens(count, n=heads, rows=rows):
        return normal((rows, count, n, size), dtype, generator, device)

    made: Inputs = {
        "q": tokens(1, heads * group), "k_cache": tokens(capacity), "v_cache": tokens(capacity),
        "lengths": torch.full((rows,), end - 1, device=device), "k_new": tokens(1),
        "v_new": tokens(1), "cos": angles.cos().to(device), "sin": angles.sin().to(device),
        "end": end,
    }  # fmt: skip
    if prefix:
        for name in "kv":
            whole = made[f"{name}_cache"]
            whole[:, :prefix] = whole[:1, :prefix].clone()
            made[f"prefix_{name}"] = whole[:1, :prefix].clone()
            made[f"own_{name}"] = whole[:, prefix:].clone()
        made["own_lengths"] = made["lengths"] - prefix
    return made


def _decode(q, k_cache, v_cache, lengths, k_new, v_new, cos, sin, **rest):
    return cgkernels.decode_attention(
        q, k_cache, v_cache, lengths, k_new=k_new, v_new=v_new, rope=(cos, sin)
    )


def _decode_shared(
    q, k_new, v_new, cos, sin, own_k, own_v, own_lengths, prefix_k, prefix_v, **rest
):
    return cgkernels.decode_attention(
        q, own_k, own_v, own_lengths, k_new=k_new, v_new=v_new, rope=(cos, sin),
        prefix_k=prefix_k, prefix_v=prefix_v,
    )  # fmt: skip


def _appended(q, k_cache, v_cache, k_new, v_new, cos, sin, end, **rest):
    """Rotated queries, and the live parts of the caches with the new token in them."""
    c, s = cos[end - 1], sin[end - 1]

    def rotated(x):
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * c - b * s, b * c + a * s], -1).to(x.dtype)

    k_cache[:, end - 1 : end] = rotated(k_new)
    v_cache[:, end - 1 : end] = v_new
    return rotated(q), k_cache[:, :end], v_cache[:, :end]


def _plain_decode(attend: Callable[..., Tensor] = sdpa, **inputs):
    """The host knows how long the rows are, all alike, and slices the cache: no mask."""
    q, k, v = (t.transpose(1, 2) for t in _appended(**inputs))
    return attend(q, k, v).transpose(1, 2)


def _decode_cost(shape, size, *, group=1, prefix=0):
    rows, length, heads, head_size = shape
    stored = 2 * (rows * length + prefix) * heads * head_size
    once = 2 * rows * heads * (group + 2) * head_size  # q and out; new keys and values, twice
    return (stored + once) * size, 4 * rows * group * heads * (length + prefix) * head_size


def _with_backend(backend: SDPBackend, sets: Sequence[Inputs]) -> list[Call]:
    def call(**inputs):
        with sdpa_kernel(backend):
            return _plain_decode(**inputs)

    return [partial(call, **inputs) for inputs in sets]


def _flex(stages: int, sets: Sequence[Inputs]) -> list[Call]:
    """Its decoding kernel; how many stages its default has on a GPU depends on the version."""
    from torch.nn.attention.flex_attention import flex_attention

    def attend(q, k, v):
        options: Any = {"num_stages": stages}
        return flex_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], kernel_options=options)

    step = torch.compile(partial(_plain_decode, attend), dynamic=False)
    return [partial(step, **inputs) for inputs in sets]


def _flash_attn(sets: Sequence[Inputs]) -> list[Call]:
    from flash_attn import flash_attn_with_kvcache

    def made(q, k_cache, v_cache, lengths, k_new, v_new, cos, sin, **rest):
        return partial(
            flash_attn_with_kvcache, q, k_cache, v_cache, k=k_new, v=v_new,
            rotary_cos=cos.to(q.dtype), rotary_sin=sin.to(q.dtype),
            cache_seqlens=lengths.int(), causal=True, rotary_interleaved=False,
        )  # fmt: skip

    return [made(**inputs) for inputs in sets]


def _flashinfer(sets: Sequence[Inputs]) -> list[Call]:
    """Behind a rotation and an append in plain PyTorch: its decoding kernels do neither.

    The cache in pages of a few tokens, planned once, as for all layers of a model.
    """
    import flashinfer

    rows, capacity, heads, size = sets[0]["k_cache"].shape
    q_heads, end, device = sets[0]["q"].shape[2], sets[0]["end"], sets[0]["q"].device
    dtype, grouped = sets[0]["q"].dtype, q_heads > heads

    def single(**inputs):
        q, k, v = _appended(**inputs)
        out = flashinfer.single_decode_with_kv_cache(
            q[0, 0], k[0], v[0], kv_layout="NHD", use_tensor_cores=grouped
        )
        return out[None, None]

    if rows == 1:
        return [partial(single, **inputs) for inputs in sets]
    pages, live = capacity // _PAGE, math.ceil(end / _PAGE)
    workspace = torch.zeros(128 << 20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=grouped
    )
    first = torch.arange(rows, dtype=torch.int32, device=device)
    used = torch.arange(live, dtype=torch.int32, device=device)
    last = torch.full_like(first, (end - 1) % _PAGE + 1)
    wrapper.plan(
        torch.arange(rows + 1, dtype=torch.int32, device=device) * live,
        (first[:, None] * pages + used).flatten(), last, q_heads, heads, size, _PAGE,
        q_data_type=dtype, kv_data_type=dtype,
    )  # fmt: skip

    def batch(**inputs):
        q = _appended(**inputs)[0]
        paged = tuple(inputs[n].view(-1, _PAGE, heads, size) for n in ("k_cache", "v_cache"))
        return wrapper.run(q[:, 0], paged)[:, None]

    return [partial(batch, **inputs) for inputs in sets]


_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def _decode_peers() -> dict[str, Provider]:
    return {
        **{
            f"sdpa-{name}": Provider(partial(_with_backend, backend), cuda=True)
            for name, backend in _BACKENDS.items()
        },
        "compile-flex-1": Provider(partial(_flex, 1), cuda=True),
        "compile-flex-3": Provider(partial(_flex, 3), cuda=True),
        "flash_attn": Provider(_flash_attn, needs="flash_attn", cuda=True),
        "flashinfer": Provider(_flashinfer, needs="flashinfer", cuda=True),
    }


def _shared_peers() -> dict[str, Provider]:
    def unshared(sets: Sequence[Inputs]) -> list[Call]:
        return [partial(_decode, **inputs) for inputs in sets]

    return {"unshared": Provider(unshared), **_decode_peers()}


CASES = [
    OpCase("append", _decode_inputs, _decode, _plain_decode, _decode_cost,
           peers=_decode_peers, sizes=_HEADS, sweep=_CONTEXT),
    OpCase("append, groups of 4", partial(_decode_inputs, group=4), _decode, _plain_decode,
           partial(_decode_cost, group=4), peers=_decode_peers, sizes=_GROUPS, sweep=_CONTEXT),
    OpCase(f"append, {_PREFIX} tokens shared", partial(_decode_inputs, prefix=_PREFIX),
           _decode_shared, _plain_decode, partial(_decode_cost, prefix=_PREFIX),
           peers=_shared_peers, sizes=_SUFFIXES, sweep=_CONTEXT),
]  # fmt: skip


# Launches -----------------------------------------------------------------------------------------
def launches() -> Iterator[Launch]:
    """A few: it is the same kernel with less to do."""
    for label, bits, inputs in meta_inputs():
        if label.startswith(("D 64 ", "prefix", "16 queries")):
            yield Launch(label, partial(_launch_fwd, *inputs.values()), bits)


def append_launches() -> Iterator[Launch]:
    for label, bits, inputs in meta_inputs():
        q, (kv_heads, head_size) = inputs["q"], inputs["k_cache"].shape[2:]
        new = q.new_empty(q.shape[0], q.shape[1], kv_heads, head_size)
        counters = inputs["lengths"].new_empty(q.shape[:3].numel())
        values = [*inputs.values()]
        values[4:4] = [new, new, None if label.startswith("prefix") else counters]
        yield Launch(label, partial(_launch_append, *values), bits)


def meta_inputs():
    """(label, bits of loads and stores, arguments but the new tokens in the order of the op)."""

    def inputs(dtype, head_size, queries=1, heads=(12, 12), heads_first=False, **options):
        rows, (q_heads, kv_heads) = 8, heads
        q = torch.empty(rows, queries, q_heads, head_size, dtype=dtype, device="meta")
        cache = q.new_empty(rows, 1024, kv_heads, head_size)
        if heads_first:
            cache = q.new_empty(rows, kv_heads, 1024, head_size).transpose(1, 2)
        absent = ("cos", "sin", "position", "prefix_k", "prefix_v", "prefix_length", "prefix_id")
        return {
            "q": q, "k_cache": cache, "v_cache": cache, "lengths": integers(rows),
            **dict.fromkeys(absent), "left_pad": None, "interleaved": False, "window": 2**30,
            "softcap": 0.0, "scale": 0.125, **options,
        }  # fmt: skip

    def integers(*shape):
        return torch.empty(*shape, dtype=torch.int32, device="meta")

    def shared(dtype, heads, head_size):
        prefix = torch.empty(2, 1024, heads, head_size, dtype=dtype, device="meta")
        return {
            "prefix_k": prefix, "prefix_v": prefix, "prefix_length": integers(2),
            "prefix_id": integers(8),
        }  # fmt: skip

    yield f"D 64 {torch.float16}", 128, inputs(torch.float16, 64)
    for dtype in (torch.float32, torch.bfloat16):
        for head_size in (64, 128, 256):
            yield f"D {head_size} {dtype}", 128, inputs(dtype, head_size)
        yield f"heads first {dtype}", 128, inputs(dtype, 64, heads_first=True)
        grouped = inputs(dtype, 128, heads=(32, 8), **shared(dtype, 8, 128))
        yield f"prefix {dtype}", 0, grouped  # scans of prefix_id are narrow
    half = torch.bfloat16
    for head_size, bits in ((32, 64), (80, 128), (96, 128), (100, 64)):
        yield f"D {head_size}", bits, inputs(half, head_size)
    table = torch.empty(4096, 32, device="meta")
    for interleaved in (False, True):
        rope = {"cos": table, "sin": table, "interleaved": interleaved, "position": integers(8, 1)}
        label = "interleaved" if interleaved else "half-split"
        yield f"{label} rotary", 0, inputs(half, 64, **rope)
    everything = {
        "cos": table, "sin": table, "left_pad": integers(8), "window": 512, "softcap": 50.0,
    }  # fmt: skip
    for head_size in (64, 256):
        prefix = shared(half, 4, head_size)
        several = inputs(half, head_size, 16, (32, 4), **everything, **prefix)
        yield f"16 queries, everything, D {head_size}", 0, several


LAUNCHES = {
    "decode_attention_fwd": launches,
    "decode_attention_append": append_launches,
}


# Tuning -------------------------------------------------------------------------------------------
def _splits(head_size: int, itemsize: int) -> Iterator[Config]:
    """Splits of 16 to 256 KiB of keys and values, in blocks of 2 to 32 KiB of each."""
    token = itemsize << (head_size - 1).bit_length()
    for split, block in product((64, 128, 256, 512), (16, 32, 64, 128)):
        fits = block < split and 2 << 10 <= block * token <= 32 << 10
        if fits and 16 << 10 <= 2 * split * token <= 256 << 10:
            for stages, warps in product((2, 3), (4, 8)):
                sizes = {"SPLIT": split, "BLOCK": block, "STAGES": stages, "num_warps": warps}
                yield from early(sizes, warps == 4)


TUNABLE = tuned(_launch_append, _splits)
