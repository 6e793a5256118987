"""The kernel of `norm_linear`, for at most 64 rows of x."""

from cgkernels._triton import tl, triton
from cgkernels.device import is_last_program, launch_next, tanh, wait_for_previous


@triton.jit
def _weight_rows(first, channels, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows of the weight in a tile, their mask, and the output channels that come of them.

    With swiglu gate and up of a channel are neighbors in the tile.
    """
    column = first + tl.arange(0, BLOCK_N)
    if ACTIVATION == 3:
        channel = first // 2 + tl.arange(0, BLOCK_N // 2)
        return column // 2 + (column % 2) * channels, column // 2 < channels, channel
    else:
        return column, column < channels, column


@triton.jit
def _prefetch(
    weight_ptr, weight_stride, first_row, channels, first, end, ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Asks for a tile of the weight, from feature `first` to `end`, to be brought to the L2 cache.

    That reads nothing, and so is right whatever the launch before may still be writing.
    """
    EACH: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth  # in a line of L2
    row, mask, _ = _weight_rows(first_row, channels, ACTIVATION, BLOCK_N)
    row_ptr = weight_ptr + tl.where(mask, row, 0).to(tl.int64)[:, None] * weight_stride
    for start in range(first, end, 16 * EACH):
        k = tl.minimum(start + tl.arange(0, 16) * EACH, end - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l",
            [(row_ptr + k[None, :]).to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _epilogue(
    out_ptr, scales_ptr, bias_ptr, residual_ptr, residual_stride, y, row, row_mask, first,
    channels, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scale, bias, activation and residual of a tile of products [16, BLOCK_N], and its store."""
    weight_row, weight_mask, channel = _weight_rows(first, channels, ACTIVATION, BLOCK_N)
    if scales_ptr is not None:
        y = y * tl.load(scales_ptr + weight_row, mask=weight_mask, other=0.0)[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + weight_row, mask=weight_mask, other=0.0)
        y += bias.to(tl.float32)[None, :]
    if ACTIVATION == 1:  # gelu
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == 2:  # gelu_tanh
        y = 0.5 * y * (1.0 + tanh(0.7978845608028654 * (y + 0.044715 * y * y * y)))
    elif ACTIVATION == 3:  # swiglu
        gate, up = tl.split(y.reshape(16, BLOCK_N // 2, 2))
        y = gate * tl.sigmoid(gate) * up
    mask = row_mask[:, None] & (channel < channels)[None, :]
    row = row.to(tl.int64)[:, None]
    if residual_ptr is not None:
        at = residual_ptr + row * residual_stride + channel[None, :]
        y += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    at = out_ptr + row * channels + channel[None, :]
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _kernel(
    out_ptr, partial_ptr, count_ptr, x_ptr, x_stride, weight_ptr, weight_stride, scales_ptr,
    norm_weight_ptr, norm_bias_ptr, bias_ptr, residual_ptr, residual_stride, rows, channels,
    features, eps,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per 16 rows of x, BLOCK_N rows of the weight and SPLIT of their elements.

    Programs that share a tile of the weight are neighbors: it comes from memory once, and from the
    L2 cache for the others. Each takes the statistics of its rows itself. Of several splits the
    program that is done last adds up all of them, in their order.
    """
    program, tiles = tl.program_id(0), (rows + 15) // 16
    tile, split, block = program % tiles, program // tiles % SPLITS, program // tiles // SPLITS
    if PDL:
        launch_next()
        end = tl.minimum(split * SPLIT + SPLIT, features)
        _prefetch(
            weight_ptr, weight_stride, block * BLOCK_N, channels, split * SPLIT, end, ACTIVATION,
            BLOCK_N,
        )  # fmt: skip
        wait_for_previous()
    row = tile * 16 + tl.arange(0, 16)
    row_mask = row < rows
    x_row_ptr = x_ptr + row.to(tl.int64)[:, None] * x_stride
    mean = tl.zeros((16,), tl.float32)
    rest, rstd = mean, mean
    if NORM == 2:
        total = tl.zeros((16, BLOCK_K), tl.float32)
        for start in tl.range(0, features, BLOCK_K, num_stages=STAGES):
            k = start + tl.arange(0, BLOCK_K)
            mask = row_mask[:, None] & (k < features)[None, :]
            total += tl.load(x_row_ptr + k[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(total, 1) / features
    if NORM != 0:
        squares = tl.zeros((16, BLOCK_K), tl.float32)
        distances = squares
        for start in tl.range(0, features, BLOCK_K, num_stages=STAGES):
            k = start + tl.arange(0, BLOCK_K)
            mask = row_mask[:, None] & (k < features)[None, :]
            x = tl.load(x_row_ptr + k[None, :], mask=mask, other=0.0).to(tl.float32)
            if NORM == 2:
                x = tl.where(mask, x - mean[:, None], 0.0)
                distances += x
            squares += x * x
        rest = tl.sum(distances, 1) / features  # of a mean so large that its last place counts
        rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, 1) / features - rest * rest + eps)

    weight_row, weight_mask, _ = _weight_rows(block * BLOCK_N, channels, ACTIVATION, BLOCK_N)
    weight_row_ptr = weight_ptr + weight_row.to(tl.int64)[:, None] * weight_stride
    y = tl.zeros((16, BLOCK_N), tl.float32)
    first = split * SPLIT
    for start in tl.range(first, tl.minimum(first + SPLIT, features), BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < features
        mask = weight_mask[:, None] & inside[None, :]
        w = tl.load(weight_row_ptr + k[None, :], mask=mask, other=0)  # [BLOCK_N, BLOCK_K]
        mask = row_mask[:, None] & inside[None, :]
        x = tl.load(x_row_ptr + k[None, :], mask=mask, other=0.0)  # [16, BLOCK_K]
        if NORM != 0:
            h = x.to(tl.float32)
            h = (h - mean[:, None] - rest[:, None] if NORM == 2 else h) * rstd[:, None]
            if norm_weight_ptr is not None:
                gain = tl.load(norm_weight_ptr + k, mask=inside, other=0.0)
                h *= gain.to(tl.float32)[None, :]
            if norm_bias_ptr is not None:
                shift = tl.load(norm_bias_ptr + k, mask=inside, other=0.0)
                h += shift.to(tl.float32)[None, :]
            x = h.to(x.dtype)
        y = tl.dot(x, tl.trans(w.to(x.dtype)), y, input_precision="ieee")

    if SPLITS > 1:
        group = block * tiles + tile
        lane = tl.arange(0, 16)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        part_ptr = partial_ptr + group * (SPLITS * 16 * BLOCK_N) + lane
        tl.store(part_ptr + split * (16 * BLOCK_N), y)
        if is_last_program(count_ptr + group, SPLITS):
            y = tl.zeros((16, BLOCK_N), tl.float32)
            for i in tl.static_range(SPLITS):
                y += tl.load(part_ptr + i * (16 * BLOCK_N), cache_modifier=".cg")
            _epilogue(
                out_ptr, scales_ptr, bias_ptr, residual_ptr, residual_stride, y, row, row_mask,
                block * BLOCK_N, channels, ACTIVATION, BLOCK_N,
            )  # fmt: skip
            tl.store(count_ptr + group, 0)  # as the next launch must find it
    else:
        _epilogue(
            out_ptr, scales_ptr, bias_ptr, residual_ptr, residual_stride, y, row, row_mask,
            block * BLOCK_N, channels, ACTIVATION, BLOCK_N,
        )  # fmt: skip
