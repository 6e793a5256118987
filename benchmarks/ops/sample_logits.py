"""What `sample_logits` launches: compiled without a GPU, judged on one."""

from collections.abc import Iterator
from functools import partial

import torch

from cgkernels.ops.sample_logits.launch import _launch_bwd, _launch_fwd, _launch_inplace
from cgkernels.testing import Launch


def launches() -> Iterator[Launch]:
    for name, logits, uncond, scale, filters, bits in meta_inputs():
        seed = torch.empty((), dtype=torch.int64, device="meta")
        index = torch.empty(logits.shape[0], dtype=torch.int64, device="meta")
        args = (logits, uncond, scale, *filters, seed, index, index)
        yield Launch(name, partial(_launch_fwd, *args), bits)


def inplace_launches() -> Iterator[Launch]:
    """Both extremes: it is the same kernel with another end."""
    for name, logits, uncond, scale, filters, bits in meta_inputs():
        if name.startswith(("guided, all filters 16384", "all filters 256", "top-p of hf")):
            number = filters[0]
            seed = torch.empty((), dtype=torch.int64, device="meta")
            tokens = seed.new_empty(logits.shape[0], 256)
            log_probs = number.new_empty(tokens.shape)
            counts = seed.new_empty(3, logits.shape[0]).t()
            args = (tokens, log_probs, counts, logits, uncond, scale, *filters, seed, counts[:, 0])
            yield Launch(name, partial(_launch_inplace, *args), bits)


def bwd_launches() -> Iterator[Launch]:
    for name, logits, uncond, scale, filters, bits in meta_inputs():
        token = torch.empty(logits.shape[0], dtype=torch.int64, device="meta")
        args = (filters[0], token, logits, uncond, scale, *filters)
        yield Launch(name, partial(_launch_bwd, *args), bits)


def meta_inputs():
    rows = 64
    number = torch.empty(rows, device="meta")
    k = torch.empty(rows, dtype=torch.int64, device="meta")
    plain = (number, None, None, None, "mass_before")
    every = (number, k, number, number, "mass_before")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        every_size = (256, 2048, 8192, 16384, 32000)
        for vocabulary in every_size if dtype == torch.float32 else (16384, 32000):
            x = torch.empty(rows, vocabulary, dtype=dtype, device="meta")
            # Shorter rows do not give a 128-bit access to each thread.
            bits = 128 if vocabulary >= 2048 else 0
            yield f"all filters {vocabulary} {dtype}", x, None, None, every, bits
            if vocabulary in (16384, 32000):
                yield f"no filter {vocabulary} {dtype}", x, None, None, plain, bits
                yield f"guided, all filters {vocabulary} {dtype}", x, x, number, every, bits
        top_k = (number, k, None, None, "mass_before")
        yield f"guided, top-k 16384 {dtype}", *((x[:, :16384],) * 2), number, top_k, 128
    hf = (number, None, number, None, "hf")
    odd = torch.empty(rows, 10007, device="meta")
    yield "top-p of hf, odd size", odd, None, None, hf, 0
    yield "all filters, short odd rows", odd[:, :99], None, None, every, 0


LAUNCHES = {
    "sample_logits_fwd": launches,
    "sample_logits_": inplace_launches,
    "sample_logits_bwd": bwd_launches,
}
