"""`embed_tokens`: what it is measured on, what it launches, how it is tuned.

Shapes are (rows, V, W), for embeddings of V tokens in W numbers.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

import cgkernels
from benchmarks.harness.case import Inputs, OpCase, Size, Sweep
from benchmarks.harness.inputs import normal
from benchmarks.harness.tuning import Config, row_blocks, tuned
from cgkernels.ops.embed_tokens import _launch
from cgkernels.testing import Launch

_COLUMNS = 1024  # tokens of a row

_EMBEDDINGS = {
    f"b{rows}_{vocabulary}x{width}": Size((rows, vocabulary, width), model, cpu, first=rows == 64)
    for vocabulary, width, model, cpu in (
        (50257, 768, "GPT-2 small", False),
        (1024, 384, "six layers of 384", True),
    )
    for rows in (1, 8, 64)
}


def _embedding_inputs(shape, dtype, generator, device, *, learned):
    rows, vocabulary, width = shape
    tokens = torch.randint(vocabulary, (rows, _COLUMNS), generator=generator)
    made: Inputs = {
        "tokens": tokens.to(device),
        "position": torch.full((rows,), 500, device=device),
        "embedding": normal((vocabulary, width), dtype, generator, device),
    }
    if learned:
        made["places"] = normal((_COLUMNS, width), dtype, generator, device)
    return made


def _plain_embedding(tokens, position, embedding, places=None):
    x = F.embedding(tokens.gather(1, position[:, None])[:, 0], embedding)
    return x if places is None else x + F.embedding(position, places)


def _embedding_cost(shape, size, *, learned):
    rows, _, width = shape
    return rows * ((3 if learned else 2) * width * size + 16), rows * width * learned


def _embedding(variant: str, *, learned: bool) -> OpCase:
    return OpCase(
        variant, partial(_embedding_inputs, learned=learned), cgkernels.embed_tokens,
        _plain_embedding, partial(_embedding_cost, learned=learned), sizes=_EMBEDDINGS,
        sweep=Sweep("rows", tuple((n, 1024, 768) for n in (64, 128, 256, 512, 1024)), 16),
    )  # fmt: skip


CASES = [
    _embedding("", learned=False), _embedding("learned positions", learned=True),
]  # fmt: skip


# Launches -----------------------------------------------------------------------------------------
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


# Tuning -------------------------------------------------------------------------------------------
def _vector_blocks(width: int) -> Iterator[Config]:
    """As elementwise kernels have, of one vector."""
    yield from row_blocks(width, dense=True)


TUNABLE = tuned(_launch, _vector_blocks)
