"""Triton functions shared by the kernels: noise, rows of tensors, sums and moments of parts.

The noise agrees with `random.py`: every word is equal, every normal within 4 ulp of float32. Only
32-bit integer and float32 arithmetic is used. The polynomials are minimax fits made for this file;
explicit fused multiply-adds keep them independent of the compiler's contraction of a b + c.
"""

from cgkernels import random
from cgkernels._triton import tl, triton

# Streams of `random.py`, as kernels must see global constants.
STREAM_SAMPLER = tl.constexpr(random.STREAM_SAMPLER)
STREAM_TOKENS = tl.constexpr(random.STREAM_TOKENS)
STREAM_TRAINING = tl.constexpr(random.STREAM_TRAINING)
STREAM_LATENTS = tl.constexpr(random.STREAM_LATENTS)

_TO_UNIT = tl.constexpr(2.0**-32)  # from a word of 32 bits to [0, 1)


@triton.jit
def philox_words(seed, index, step, quad, STREAM: tl.constexpr):
    """The four Philox4x32-10 words of elements 4 quad .. 4 quad + 3.

    Each counter word is cast to 32 bits: 64-bit words would select Philox4x64 without a word.
    """
    c1 = (index & 0xFFFFFFFF).to(tl.uint32)
    c2 = ((index >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c3 = (tl.full((), STREAM << 24, tl.int64) + step).to(tl.uint32)
    return tl.philox(seed, quad.to(tl.uint32), c1, c2, c3)


@triton.jit
def _radius(w):
    """sqrt(-2 ln u), u = (w + 0.5) 2^-32, with full relative precision at both ends.

    u = m 2^-k with m in [sqrt(1/2), sqrt(2)), and ln m = x - x^2 / 2 + x^3 P(x) at x = m - 1, where
    for k = 0 x is taken from the distance to 2^32, which float32 holds and w near 2^32 does not.
    """
    near_one = w >= 0xB504F334  # u >= sqrt(1/2)
    value = w.to(tl.float32) + 0.5
    bits = value.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    distance = ((w ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * _TO_UNIT
    x = tl.where(near_one, -distance, mantissa - 1.0)
    k = tl.where(near_one, 0, 32 - exponent).to(tl.float32)
    p = tl.fma(x, -0.07859611511230469, 0.12881647050380707)
    p = tl.fma(x, p, -0.13128754496574402)
    p = tl.fma(x, p, 0.14181192219257355)
    p = tl.fma(x, p, -0.16624553501605988)
    p = tl.fma(x, p, 0.2000228613615036)
    p = tl.fma(x, p, -0.25000810623168945)
    p = tl.fma(x, p, 0.33333316445350647)
    square = x * x
    log_m = tl.fma(square, tl.fma(x, p, -0.5), x)
    minus_log_u = tl.fma(k, 0.693145751953125, tl.fma(k, 1.4286068203094172e-06, -log_m))
    return tl.sqrt_rn(2.0 * minus_log_u)


@triton.jit
def _cos_sin(w):
    """cos and sin of 2 pi (w + 0.5) 2^-32; the quadrant is taken off in integers."""
    quadrant = (w + 0x20000000) >> 30
    rest = (w - (quadrant << 30)).to(tl.int32, bitcast=True)
    t = (rest.to(tl.float32) + 0.5) * _TO_UNIT  # turns, in [-1/8, 1/8]
    square = t * t
    sin = tl.fma(square, -75.40206909179688, 81.5925521850586)
    sin = tl.fma(square, sin, -41.3416633605957)
    # 2 pi in two float32 parts: its rounding alone would cost half an ulp.
    sin = tl.fma(t, 6.2831854820251465, t * tl.fma(square, sin, -1.7484555e-7))
    cos = tl.fma(square, 59.22040557861328, -85.44285583496094)
    cos = tl.fma(square, cos, 64.93931579589844)
    cos = tl.fma(square, cos, -19.739208221435547)
    cos = tl.fma(square, cos, 1.0)
    odd = (quadrant & 1) != 0
    x = tl.where(odd, sin, cos)
    y = tl.where(odd, cos, sin)
    x = tl.where(((quadrant + 1) & 2) != 0, -x, x)
    y = tl.where((quadrant & 2) != 0, -y, y)
    return x, y


@triton.jit
def four_normals(w0, w1, w2, w3):
    """Four standard normals from four words (Box-Muller, cosine first)."""
    r, s = _radius(w0), _radius(w2)
    cos_r, sin_r = _cos_sin(w1)
    cos_s, sin_s = _cos_sin(w3)
    return r * cos_r, r * sin_r, s * cos_s, s * sin_s


@triton.jit
def normal_block(seed, index, step, first, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    """Normals of elements first .. first + BLOCK - 1, one Philox per four; 4 divides first."""
    quad = first // 4 + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = philox_words(seed, index, step, quad, STREAM)
    z0, z1, z2, z3 = four_normals(w0, w1, w2, w3)
    return tl.join(tl.join(z0, z2), tl.join(z1, z3)).reshape(BLOCK)


@triton.jit
def normal_at(seed, index, step, element, STREAM: tl.constexpr):
    """Normals of any elements, one Philox each: for walks that leave the numbering."""
    w0, w1, w2, w3 = philox_words(seed, index, step, element // 4, STREAM)
    second = (element & 2) != 0
    radius = _radius(tl.where(second, w2, w0))
    cos, sin = _cos_sin(tl.where(second, w3, w1))
    return radius * tl.where((element & 1) != 0, sin, cos)


@triton.jit
def exponential_of(w):
    """-ln u of a word, in the bits of `random.exponential`; launch with enable_fp_fusion=False.

    As in `_radius`, but every product and sum is rounded for itself, as plain PyTorch rounds them.
    """
    near_one = w >= 0xB504F334
    value = w.to(tl.float32) + 0.5
    bits = value.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    distance = ((w ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * _TO_UNIT
    x = tl.where(near_one, -distance, mantissa - 1.0)
    k = tl.where(near_one, 0, 32 - exponent).to(tl.float32)
    p = x * -0.07859611511230469 + 0.12881647050380707
    p = p * x - 0.13128754496574402
    p = p * x + 0.14181192219257355
    p = p * x - 0.16624553501605988
    p = p * x + 0.2000228613615036
    p = p * x - 0.25000810623168945
    p = p * x + 0.33333316445350647
    log_m = x * x * (p * x - 0.5) + x
    return k * 0.693145751953125 + (k * 1.4286068203094172e-06 - log_m)


@triton.jit
def exponential_block(seed, index, step, first, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    """Exponentials of elements first .. first + BLOCK - 1, one Philox per four; 4 divides first."""
    quad = first // 4 + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = philox_words(seed, index, step, quad, STREAM)
    return exponential_of(tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK))


@triton.jit
def exp_of(x):
    """e^x for x <= 88 within 1 ulp; below 2^-126 it is 0.

    For x <= 0 in the bits of `random.exp_of`, where it is launched with enable_fp_fusion=False.
    x = n ln 2 + r, and e^r = 1 + r + r^2 P(r).
    """
    x = tl.maximum(x, -88.0, propagate_nan=tl.PropagateNan.ALL)
    n = tl.floor(x * 1.4426950216293335 + 0.5)
    r = (x - n * 0.693145751953125) - n * 1.4286068203094172e-06
    p = r * 0.0013814539415761828 + 0.00836874544620514
    p = p * r + 0.04166838899254799
    p = p * r + 0.1666652113199234
    p = p * r + 0.4999999403953552
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return (r * r * p + r + 1.0) * power


@triton.jit
def expm1_and_minus(x):
    """e^x - 1 and e^x - 1 - x, which cancel near 0: there by the series x^2 / 2 + x^3 / 6 + .."""
    p = tl.fma(x, 2.755731922398589e-07, 2.7557319223985893e-06)  # 1 / 10!, 1 / 9!
    p = tl.fma(x, p, 2.48015873015873e-05)
    p = tl.fma(x, p, 0.0001984126984126984)
    p = tl.fma(x, p, 0.001388888888888889)
    p = tl.fma(x, p, 0.008333333333333333)
    p = tl.fma(x, p, 0.041666666666666664)
    p = tl.fma(x, p, 0.16666666666666666)
    p = tl.fma(x, p, 0.5) * (x * x)
    near, power = tl.abs(x) < 1, tl.exp(x) - 1
    return tl.where(near, x + p, power), tl.where(near, p, power - x)


@triton.jit
def block_of_row(blocks, numel, BLOCK: tl.constexpr):
    """Row, first position, positions and mask of this program, one of `blocks` in a row."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    first = (program % blocks + numel * 0) * BLOCK  # 64 bits only where numel has them
    lane = tl.arange(0, BLOCK)
    return row, first, first + lane, lane < numel - first  # the sum may wrap where masked


@triton.jit
def element_of(position, channels, pixels, CHANNELS_LAST: tl.constexpr):
    """The element number (logical C, H, W order) of a position in the order of iteration."""
    if CHANNELS_LAST:
        return (position % channels) * pixels + position // channels
    else:
        return position


@triton.jit
def normal_of(
    seed, index, step, first, element, STREAM: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Normals of a block of positions: `normal_block` where their elements are consecutive."""
    if CHANNELS_LAST:
        return normal_at(seed, index, step, element, STREAM)
    else:
        return normal_block(seed, index, step, first, STREAM, BLOCK)


@triton.jit
def row_offset(strides, row, position, element, pixels, DENSE: tl.constexpr):
    """Offset in a (B, C, pixels) tensor with these strides of an element of a row.

    DENSE says that within a row memory follows the order of iteration.
    """
    if DENSE:
        return row * strides[0] + position
    else:
        channel, pixel = (element // pixels).to(tl.int64), (element % pixels).to(tl.int64)
        return row * strides[0] + channel * strides[1] + pixel * strides[2]


@triton.jit
def load_row(ptr, strides, row, position, element, pixels, mask, DENSE: tl.constexpr):
    """A block of a row (`row_offset`) in float32, 0 where masked."""
    offset = row_offset(strides, row, position, element, pixels, DENSE)
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_row(ptr, strides, value, row, position, element, pixels, mask, DENSE: tl.constexpr):
    """Stores a block of a row (`row_offset`) in the dtype of the tensor."""
    offset = row_offset(strides, row, position, element, pixels, DENSE)
    tl.store(ptr + offset, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def table_row(table_ptr, t, timesteps):
    """(alpha, sigma) of a timestep; NaN outside the table, which must not look like a result."""
    inside = (t >= 0) & (t < timesteps)
    alpha = tl.load(table_ptr + 2 * t, mask=inside, other=float("nan"))
    sigma = tl.load(table_ptr + 2 * t + 1, mask=inside, other=float("nan"))
    return alpha, sigma


@triton.jit
def target_coefficients(alpha, sigma, TARGET: tl.constexpr):
    """(p0, p1) of target = p0 x0 + p1 z; TARGET is the position in `targets.TARGETS`."""
    if TARGET == 0:  # epsilon
        p0, p1 = alpha * 0, alpha * 0 + 1
    elif TARGET == 1:  # x0
        p0, p1 = alpha * 0 + 1, alpha * 0
    elif TARGET == 2:  # v
        p0, p1 = -sigma, alpha
    else:  # flow
        p0, p1 = alpha * 0 - 1, alpha * 0 + 1
    return p0, p1


@triton.jit
def tanh(x, EXACT: tl.constexpr = False):
    """tanh in float32, with full relative precision near zero.

    Below 0.4 the series of Taylor, whose next term is under 4e-9 of the sum. EXACT: above, by an
    exponential that is better than the GPU's own.
    """
    square = x * x
    p = tl.fma(square, 0.003592128036572481, -0.008863235529902197)
    p = tl.fma(square, p, 0.021869488536155203)
    p = tl.fma(square, p, -0.05396825396825397)
    p = tl.fma(square, p, 0.13333333333333333)
    p = tl.fma(square, p, -0.3333333333333333)
    small = tl.fma(x * square, p, x)
    decay = exp_of(-2.0 * tl.abs(x)) if EXACT else tl.exp(-2.0 * tl.abs(x))
    large = 1.0 - 2.0 * decay / (1.0 + decay)
    large = tl.where(x < 0, -large, large)
    return tl.where(tl.abs(x) < 0.4, small, large)


# Work that is split among programs, and merged ----------------------------------------------------
@triton.jit
def is_last_program(count_ptr, programs):
    """Whether all other programs that count at this address have counted.

    Then what they stored before can be read, past the L1 cache (cache_modifier=".cg").
    """
    tl.debug_barrier()  # all threads have stored before one of them counts
    return tl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1


@triton.jit
def load_parts(part_ptr, part, parts):
    """Results of other programs of this launch, 0 beyond the last."""
    return tl.load(part_ptr + part, mask=part < parts, other=0.0, cache_modifier=".cg")


@triton.jit
def sum_of_parts(part_ptr, parts, BLOCK: tl.constexpr):
    """Sum of float32 partial sums that lie side by side, in one order whoever made them."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, parts, BLOCK):
        total += load_parts(part_ptr, start + tl.arange(0, BLOCK), parts)
    return tl.sum(total, 0)


@triton.jit
def merged_moments(mean, rest, m2, count, total):
    """Mean, in two summands, and M2 = sum (x - mean)^2 of all columns: Chan's formula.

    mean, rest, m2: [ROWS, PARTS], of parts that have count [1, PARTS] values each and total
    together; the mean of a part is mean + rest. A rough mean is taken off first, of few digits so
    that this rounds as little as can be; what is left is averaged.
    """
    rough = (tl.sum(mean * count, 1) / total).to(tl.bfloat16).to(tl.float32)
    off = tl.where(count > 0, (mean - rough[:, None]) + rest, 0.0)
    rest = tl.sum(off * count, 1) / total
    off = tl.where(count > 0, off - rest[:, None], 0.0)
    return rough, rest, tl.sum(m2 + count * off * off, 1)


# Programmatic dependent launch (PTX ISA: griddepcontrol) ------------------------------------------
@triton.jit
def launch_next():
    """Once all programs are here or done, the next launch may start, if it is one that waits."""
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous():
    """Until all that the launch before has written is there: before any other read or write.

    Every program of a launch with launch_pdl must come here: then it, too, has waited for all that
    came before it.
    """
    tl.extra.cuda.gdc_wait()
