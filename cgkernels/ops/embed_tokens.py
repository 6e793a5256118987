"""The start of a token step: the embedding of each row's newest token, its position included.

    out[r] = embedding[tokens[b, p] + offsets[p]] + places[p],   p = position[r],   b = r mod B

Shapes   tokens: (B, N); position: (R,), R a multiple of B; offsets: (N,); embedding: (V, W);
         places: (P, W); out: (R, W).
Dtypes   embedding, places and out float32, float16 or bfloat16 (float64 on CPU); added in float32;
         tokens, offsets int64, position int32 or int64.
Backward in embedding and places, in plain PyTorch, as often as one likes.
Source   learned positions: arXiv:1705.03122; several rows of one token are the two halves of
         classifier-free guidance, arXiv:2207.12598.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cgkernels._triton import tl, triton
from cgkernels.checks import (
    check_float,
    check_int64,
    check_integers,
    check_same_device,
    check_shape,
)
from cgkernels.library import define_op, needs_function, using_reference
from cgkernels.rows import compute_dtype


# 1. Reference -------------------------------------------------------------------------------------
def embed_tokens_ref(
    tokens: Tensor, position: Tensor, embedding: Tensor, offsets: Tensor | None,
    places: Tensor | None,
) -> Tensor:  # fmt: skip
    token, column, known = _lookup_ref(tokens, position, offsets, embedding, places)
    out = F.embedding(token, embedding).to(compute_dtype(embedding))
    if places is not None:
        out = out + F.embedding(column.clamp(max=places.shape[0] - 1), places)
    return out.masked_fill(~known[:, None], torch.nan).to(embedding.dtype)


def embed_tokens_bwd_ref(
    wanted: Sequence[bool], dout: Tensor,
    tokens: Tensor, position: Tensor, embedding: Tensor, offsets: Tensor | None,
    places: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of embedding and places where wanted, None elsewhere.

    As in PyTorch: of all rows with one token, in their order.
    """
    token, column, known = _lookup_ref(tokens, position, offsets, embedding, places)
    dout = dout.masked_fill(~known[:, None], 0).to(compute_dtype(dout))
    return tuple(
        _embedding_bwd_ref(dout, row, table).to(table.dtype) if want and table is not None else None
        for want, row, table in zip(wanted, (token, column), (embedding, places), strict=True)
    )


def _embedding_bwd_ref(dout: Tensor, row: Tensor, table: Tensor) -> Tensor:
    if dout.numel() == 0:  # of which the derivative of PyTorch's function has no derivative
        return dout.sum(0).repeat(table.shape[0], 1)
    return torch.ops.aten.embedding_dense_backward(dout, row, table.shape[0], -1, False)


def _lookup_ref(
    tokens: Tensor, position: Tensor, offsets: Tensor | None, embedding: Tensor,
    places: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Token and column of each row, and whether the tables have both; in range in any case."""
    column = position.long()  # (R,)
    known = (column >= 0) & (column < tokens.shape[1])
    if places is not None:
        known &= column < places.shape[0]
    token = column = column.clamp(0, tokens.shape[1] - 1)
    if column.shape[0]:
        columns = column.view(-1, tokens.shape[0]).t()  # (B, R / B)
        token = tokens.gather(1, columns).t().flatten()  # (R,)
    if offsets is not None:
        token = token + offsets[column]
    known &= (token >= 0) & (token < embedding.shape[0])
    return token.clamp(0, embedding.shape[0] - 1), column, known


# 2. Kernels ---------------------------------------------------------------------------------------
@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    out_ptr, tokens_ptr, token_strides, position_ptr, position_stride, embedding_ptr,
    embedding_stride, offsets_ptr, offsets_stride, places_ptr, places_stride, batch, columns,
    vocabulary, known_places, width, blocks, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK numbers of a row."""
    row = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(position_ptr + row.to(tl.int64) * position_stride).to(tl.int64)
    known = (at >= 0) & (at < columns)
    if places_ptr is not None:
        known = known & (at < known_places)
    at = tl.where(known, at, 0)
    place = (row % batch).to(tl.int64) * token_strides[0] + at * token_strides[1]
    token = tl.load(tokens_ptr + place)
    if offsets_ptr is not None:
        token += tl.load(offsets_ptr + at * offsets_stride)
    known = known & (token >= 0) & (token < vocabulary)
    mask = d < tl.where(known, width, 0)
    token = tl.where(known, token, 0)
    x = tl.load(embedding_ptr + token * embedding_stride + d, mask=mask, other=float("nan"))
    x = x.to(tl.float32)
    if places_ptr is not None:
        x += tl.load(places_ptr + at * places_stride + d, mask=mask, other=0.0).to(tl.float32)
    out = out_ptr + row.to(tl.int64) * width + d
    tl.store(out, x.to(out_ptr.dtype.element_ty), mask=d < width)


# 3. Launchers -------------------------------------------------------------------------------------
def _launch_config(width: int) -> dict[str, Any]:
    """Eight numbers a thread are one 128-bit access in half types, two in float32."""
    block = min(1024, max(128, triton.next_power_of_2(width)))
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


def _launch(
    tokens: Tensor, position: Tensor, embedding: Tensor, offsets: Tensor | None,
    places: Tensor | None,
) -> Tensor:  # fmt: skip
    out = _fake(tokens, position, embedding, offsets, places)
    if out.numel() == 0:
        return out
    rows, width = out.shape
    config = _launch_config(width)
    blocks = triton.cdiv(width, config["BLOCK"])
    embedding = embedding if embedding.stride(1) == 1 else embedding.contiguous()
    places = places if places is None or places.stride(1) == 1 else places.contiguous()
    _kernel[(rows * blocks,)](
        out, tokens, tokens.stride(), position, position.stride(0), embedding, embedding.stride(0),
        *(item for t in (offsets, places) for item in (t, 0 if t is None else t.stride(0))),
        *tokens.shape, embedding.shape[0], 0 if places is None else places.shape[0], width, blocks,
        enable_fp_fusion=True, **config,
    )  # fmt: skip
    return out


# 4. Registration ----------------------------------------------------------------------------------
def _fake(
    tokens: Tensor, position: Tensor, embedding: Tensor, offsets: Tensor | None,
    places: Tensor | None,
) -> Tensor:  # fmt: skip
    return embedding.new_empty(position.shape[0], embedding.shape[1])


def _cpu(
    tokens: Tensor, position: Tensor, embedding: Tensor, offsets: Tensor | None,
    places: Tensor | None,
) -> Tensor:  # fmt: skip
    """As the reference, in few steps where all rows stand at one position and have a token."""
    at = position.tolist()
    last = min(t.shape[n] for t, n in ((tokens, 1), (places, 0)) if t is not None) - 1
    if at and at.count(at[0]) == len(at) and 0 <= at[0] <= last:
        token = tokens[:, at[0]]
        token = token if offsets is None else token + offsets[at[0]]
        known = token.tolist()
        if min(known) >= 0 and max(known) < embedding.shape[0]:
            token = token if len(at) == len(known) else token.repeat(len(at) // len(known))
            out = embedding.index_select(0, token)
            return out if places is None else out.add_(places[at[0]])
    return embed_tokens_ref(tokens, position, embedding, offsets, places).contiguous()


_fwd = define_op(
    "embed_tokens",
    "(Tensor tokens, Tensor position, Tensor embedding, Tensor? offsets, Tensor? places) -> Tensor",
    cuda=_launch,
    cpu=_cpu,
    fake=_fake,
)


# 5. Public function -------------------------------------------------------------------------------
class _EmbedTokens(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Tensor | None) -> Tensor:
        return _fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *_, embedding, _, places = ctx.needs_input_grad
        wanted = (embedding, places)
        dembedding, dplaces = embed_tokens_bwd_ref(wanted, dout, *ctx.saved_tensors)
        return None, None, dembedding, None, dplaces


def embed_tokens(
    tokens: Tensor,
    position: Tensor,
    embedding: Tensor,
    *,
    offsets: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Embeddings of one token of each row, plus the vector of its position.

    What a step of decoding starts with, in one launch that reads its position from the device, so
    that a graph of the step can be replayed: `sample_logits_` writes the tokens and counts the
    positions on. A token outside the embedding, as the -1 of a draw without a distribution, makes a
    row of NaN; so does, on a GPU and in a compiled graph, where values cannot be refused, a
    position outside tokens or places.

    Args:
        tokens: (B, N) int64, any strides, N > 0.
        position: (R,) int32 or int64, the column of each row's token and its row of places. R is a
            multiple of B: row r takes its token from row r mod B.
        embedding: (V, W) float32, float16 or bfloat16 (float64 on the CPU).
        offsets: (N,) int64, added to the tokens of each column; None: nothing.
        places: (P, W), as embedding; None: nothing is added.

    Returns:
        (R, W) in embedding's dtype, contiguous; differentiable in embedding and places.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.

    Example:
        >>> tokens, table = torch.tensor([[2, 0], [1, 1]]), torch.eye(3)
        >>> embed_tokens(tokens, torch.tensor([0, 1]), table)
        tensor([[0., 0., 1.],
                [0., 1., 0.]])
    """
    check_int64(tokens=tokens)
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens must have shape (B, N > 0), got {tuple(tokens.shape)}")
    rows, columns = tokens.shape
    check_float(embedding=embedding)
    if embedding.dim() != 2 or embedding.shape[0] == 0:
        raise ValueError(f"embedding must have shape (V > 0, W), got {tuple(embedding.shape)}")
    if places is not None:
        check_float(places=places)
        if places.dim() != 2 or places.shape[0] == 0 or places.shape[1] != embedding.shape[1]:
            raise ValueError(
                f"places must have shape (P > 0, {embedding.shape[1]}), got {tuple(places.shape)}"
            )
        if places.dtype != embedding.dtype:
            raise TypeError(
                f"places must have embedding's dtype {embedding.dtype}, got {places.dtype}"
            )
        check_same_device(embedding=embedding, places=places)
    check_same_device(embedding=embedding, tokens=tokens)
    last = (columns if places is None else min(columns, places.shape[0])) - 1
    count = position.shape[0] if isinstance(position, Tensor) and position.dim() == 1 else rows
    if count % rows if rows else count:
        raise ValueError(f"position must have a multiple of {rows} entries, got {count}")
    check_integers("position", position, (count,), tokens.device, 0, last)
    if offsets is not None:
        check_int64(offsets=offsets)
        check_shape("offsets", offsets, (columns,))
        check_same_device(tokens=tokens, offsets=offsets)
    args = (tokens, position, embedding, offsets, places)
    if using_reference():
        return embed_tokens_ref(*args)
    run: Callable[..., Tensor] = _EmbedTokens.apply if needs_function(embedding, places) else _fwd
    return run(*args)
