"""What `embed_tokens` launches: compiled without a GPU, judged on one."""

from collections.abc import Iterator
from functools import partial

import torch

from cgkernels.ops.embed_tokens import _launch
from cgkernels.testing import Launch


def launches() -> Iterator[Launch]:
    tokens = torch.empty(8, 256, dtype=torch.int64, device="meta")
    position, offsets = tokens.new_empty(16), tokens.new_empty(256)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        embedding = torch.empty(16384, 768, dtype=dtype, device="meta")
        places = embedding[:256]
        run = partial(_launch, tokens, position[:8], embedding, None, places)
        yield Launch(f"learned positions {dtype}", run, 128)
        run = partial(_launch, tokens, position, embedding, offsets, None)
        yield Launch(f"two rows each, offsets {dtype}", run, 128)
    every = (embedding[:, ::2], offsets, places[:, ::2])
    yield Launch("strided", partial(_launch, tokens[:, 1:], position[::2].int(), *every))


LAUNCHES = {
    "embed_tokens": launches,
}
