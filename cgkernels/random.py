"""The noise contract in plain PyTorch: counter-based uniforms, normals and exponentials.

    (w0, w1, w2, w3) = Philox4x32-10(key = seed, counter = (element // 4, index low, index high, c))
    c = 2^24 stream + step
    u = (w + 0.5) 2^-32,    normals = (r cos, r sin) of r = sqrt(-2 ln u), angle = 2 pi u'
    with (u, u') from (w0, w1) for elements 4q, 4q + 1 and from (w2, w3) for 4q + 2, 4q + 3.
    exponentials = -ln u, of one word each.

seed is a 64-bit number; index the 64-bit number of the sample, row + 2^32 draw; element counts
within one sample in logical (C, H, W) order, whatever the memory layout. A number therefore depends
on (seed, index, step, stream, element) and on nothing else: not on the batch, the device, the
memory format or the dtype, which only rounds it. `device.py` computes the same words in a kernel
and normals within 4 ulp of these, which are computed in float64 and rounded to float32. Float32
exponentials decide which token is drawn: they are the same bits everywhere.

Source   Philox: J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
         Box, Muller, "A note on the generation of random normal deviates", 1958.
"""

import math

import torch
from torch import Tensor

from cgkernels.checks import (
    FLOATS,
    as_index,
    as_seed,
    as_step,
    check_dtype,
    check_int,
    check_noise_size,
    check_sizes,
)

# The purpose of a number: part of its counter, so that no two uses share numbers.
STREAM_INITIAL = 0  # the state from which a sampler starts
STREAM_SAMPLER = 1  # the noise of sampler steps
STREAM_TOKENS = 2  # token sampling
STREAM_TRAINING = 3  # training: step 0 the noise, step 1 the timestep
STREAM_CONDITION_DROPOUT = 4
STREAM_LANGEVIN = 5
STREAM_LATENTS = 6
STREAM_DROPOUT = 7
STREAM_DATA = 8  # data sets: the order of an epoch, partners
STREAM_AUGMENTATION = 9
STREAM_POOL = 10  # adversarial training: the pool of images from before
STREAM_PENALTY = 11  # gradient penalties: places between real and drawn
STREAM_MEASURES = 12  # measures of samples: which rows they take

_MASK = 0xFFFFFFFF
_FLOATS = (*FLOATS, torch.float64)

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor], rounds: int = 10) -> Words:
    """Philox4x32 words; every number is a 32-bit word held in int64, counters broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 wraps where the product exceeds 63 bits; its bits are right all the same.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((b >> 32) & _MASK) ^ c1 ^ k0, b & _MASK
        c2, c3 = ((a >> 32) & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def words(quads: int, *, seed: Tensor, index: Tensor, step: Tensor, stream: int) -> Words:
    """The words of elements 0 .. 4 quads - 1 of each sample: four (B, quads) int64 tensors.

    seed is () and step (B,), both int64; index is (B,) int64.
    """
    element = torch.arange(quads, device=index.device).expand(index.shape[0], quads)
    counter = (
        element,
        (index & _MASK)[:, None],
        ((index >> 32) & _MASK)[:, None],
        (stream * 2**24 + step)[:, None],
    )
    return philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))


def uniform(
    shape: tuple[int, ...],
    *,
    seed: int | Tensor,
    index: Tensor | None = None,
    step: int | Tensor,
    stream: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniforms of shape (B, *event), always inside (0, 1); arguments as in `normal`."""
    check_dtype(dtype, _FLOATS)
    numbers, n = _event_words(shape, seed, index, step, stream, device)
    u = torch.stack([(w.double() + 0.5) * 2.0**-32 for w in numbers], -1).flatten(1)[:, :n]
    # Rounding to a narrower dtype must reach neither 0 nor 1.
    info = torch.finfo(dtype)
    u = u.clamp(info.smallest_normal * info.eps, 1 - info.eps / 2)
    return u.to(dtype).reshape(shape).contiguous()


def normal(
    shape: tuple[int, ...],
    *,
    seed: int | Tensor,
    index: Tensor | None = None,
    step: int | Tensor,
    stream: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normals of shape (B, *event), contiguous: the definition of `philox_normal`.

    seed: int or one-element int64 tensor. index: (B,) int64 numbers of the samples, default
    0 .. B - 1. step: int or integer tensor () or (B,), in [0, 2^24): what must change, where seed
    and index stay, from draw to draw. stream: the purpose, 0 .. 255. device: of what is made, where
    seed and index are no tensors; else theirs. No default dtype and no autocast changes a number.

    Raises ValueError or TypeError for an argument that does not fit, by name.
    """
    check_dtype(dtype, _FLOATS)
    numbers, n = _event_words(shape, seed, index, step, stream, device)
    z = torch.stack([*_box_muller(*numbers[:2]), *_box_muller(*numbers[2:])], -1)
    z = z.flatten(1)[:, :n]
    if dtype != torch.float64:
        z = z.float()  # half types round the float32 value, as a kernel does
    return z.to(dtype).reshape(shape).contiguous()


def exponential(
    shape: tuple[int, ...],
    *,
    seed: int | Tensor,
    index: Tensor | None = None,
    step: int | Tensor,
    stream: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard exponentials -ln u of shape (B, *event); float32 or float64, arguments as `normal`.

    They lie in [2^-33, 22.9], and keep their full relative precision at the small end, where u is
    next to 1. -ln of one is a Gumbel variable.
    """
    check_dtype(dtype, (torch.float32, torch.float64))
    numbers, n = _event_words(shape, seed, index, step, stream, device)
    w = torch.stack(numbers, -1).flatten(1)[:, :n]
    if dtype == torch.float64:
        e = -((w.double() + 0.5) * 2.0**-32).log()
    else:
        e = _exponential_float32(w)
    return e.reshape(shape).contiguous()


def _exponential_float32(w: Tensor) -> Tensor:
    """-ln u within 3 ulp. Each operation is rounded for itself, so that all devices agree.

    u = m 2^-k with m in [sqrt(1/2), sqrt(2)), and ln m = x - x^2 / 2 + x^3 P(x) at x = m - 1, where
    for k = 0 x is taken from the distance to 2^32, which float32 holds and w near 2^32 does not.
    """
    near_one = w >= 0xB504F334  # u >= sqrt(1/2)
    bits = (w.float() + 0.5).view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    mantissa = (bits - (exponent << 23)).view(torch.float32)
    distance = ((w ^ _MASK).float() + 0.5) * 2.0**-32
    x = torch.where(near_one, -distance, mantissa - 1)
    k = torch.where(near_one, 0, 32 - exponent).float()
    p = torch.full_like(x, -0.07859611511230469)
    for coefficient in (
        0.12881647050380707, -0.13128754496574402, 0.14181192219257355, -0.16624553501605988,
        0.2000228613615036, -0.25000810623168945, 0.33333316445350647, -0.5,
    ):  # fmt: skip
        p = p * x + coefficient
    log_m = x * x * p + x
    return k * 0.693145751953125 + (k * 1.4286068203094172e-06 - log_m)


def exp_of(x: Tensor) -> Tensor:
    """e^x for x <= 0. In float32 within 1 ulp, and the same bits on all devices.

    x = n ln 2 + r, and e^r = 1 + r + r^2 P(r); below 2^-126 it is 0.
    """
    if x.dtype == torch.float64:
        return x.exp()
    x = x.clamp(min=-88)
    n = (x * 1.4426950216293335 + 0.5).floor()
    r = (x - n * 0.693145751953125) - n * 1.4286068203094172e-06
    p = torch.full_like(r, 0.0013814539415761828)
    for coefficient in (
        0.00836874544620514, 0.04166838899254799, 0.1666652113199234, 0.4999999403953552
    ):  # fmt: skip
        p = p * r + coefficient
    power = ((n.int() + 127) << 23).view(torch.float32)
    return (r * r * p + r + 1) * power


def _event_words(
    shape: tuple[int, ...],
    seed: int | Tensor,
    index: Tensor | None,
    step: int | Tensor,
    stream: int,
    device: torch.device | str | None,
) -> tuple[Words, int]:
    """Words for all elements of each sample, four (B, quads), and how many elements it has."""
    check_sizes("shape", shape)
    check_noise_size("shape", tuple(shape))
    check_int("stream", stream, 0, 255)
    rows, n = shape[0], math.prod(shape[1:])
    if device is None and isinstance(index, Tensor):
        device = index.device
    seed, device = as_seed(seed, device)
    index = as_index(index, rows, device)
    step = as_step("step", step, rows, device, 2**24)
    return words(-(-n // 4), seed=seed, index=index, step=step, stream=stream), n


def _box_muller(w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Two float64 normals from two words."""
    radius = ((w.double() + 0.5) * 2.0**-32).log().mul(-2).sqrt()
    # The quadrant is taken off in integers: near a zero of cos or sin the angle in radians would
    # be rounded by as much as the result itself.
    quadrant = (v + 2**29) >> 30
    angle = ((v - (quadrant << 30)).double() + 0.5) * (2 * math.pi * 2.0**-32)
    cos, sin = angle.cos(), angle.sin()
    odd = (quadrant & 1).bool()
    x = torch.where(odd, sin, cos)
    y = torch.where(odd, cos, sin)
    x = torch.where(((quadrant + 1) & 2).bool(), -x, x)
    y = torch.where((quadrant & 2).bool(), -y, y)
    return radius * x, radius * y
