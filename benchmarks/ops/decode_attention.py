"""What `decode_attention` launches: compiled without a GPU, judged on one."""

from collections.abc import Iterator
from functools import partial

import torch

from cgkernels.ops.decode_attention.launch import _launch_append, _launch_fwd
from cgkernels.testing import Launch


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
