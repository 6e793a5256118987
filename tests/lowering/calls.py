"""Calls of every op on meta tensors of any sizes, forward and backward: what they would launch."""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

import cgkernels as cg
from benchmarks.models.recording import launch_of, recording
from cgkernels.testing import Launch

META = torch.device("meta")
HALF, FULL = torch.bfloat16, torch.float32


def launches(*sizes: tuple[int, ...]) -> list[tuple[str, Launch]]:
    """(op, launch) of all that is called with four sizes each: images, channels, height, width.

    Of other ops they are rows, features or tokens, and so on.
    """
    found = {}
    for size in sizes:
        for number, call in enumerate(_CALLS):
            for what, run in enumerate(call(*size)):
                with recording() as calls:
                    run()
                for key, args in calls.items():
                    found.setdefault(key, (args, f"{call.__name__}{number}.{what} of {size}:"))
    return [launch_of(key, args, label) for key, (args, label) in found.items()]


def _empty(*shape: int, dtype: torch.dtype = FULL, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META).requires_grad_(grad)


def _integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _images(shape: tuple[int, ...], layout: str, dtype: torch.dtype = HALF) -> Tensor:
    """Leaves of another layout: channels_last, or every second row and column of a larger one."""
    if layout == "sliced":
        n, c, h, w = shape
        return _empty(n, c, 2 * h, 2 * w, dtype=dtype)[:, :, ::2, ::2].detach().requires_grad_()
    if layout == "last":
        made = torch.empty(shape, dtype=dtype, device=META, memory_format=torch.channels_last)
        return made.requires_grad_()
    return _empty(*shape, dtype=dtype, grad=True)


LAYOUTS = ("contiguous", "last", "sliced")


def _backward(results: Tensor | tuple[Tensor, ...]) -> None:
    results = results if isinstance(results, tuple) else (results,)
    sum(r.sum() for r in results if r.requires_grad).backward()  # type: ignore[union-attr]


def _elementwise(n: int, c: int, h: int, w: int) -> Iterator:
    shape = (n, c, h, w)
    for layout in LAYOUTS:
        x, y = _images(shape, layout), _images(shape, layout, FULL)
        noise = {"table": _empty(n, 2), "t": _integers(n), "seed": _integers()}
        yield lambda x=x, o=noise: _backward(cg.add_noise(x, **o))
        yield lambda x=x, y=y, o=noise: _backward(cg.diffusion_loss(x, y, **o, target="v"))
        step = {"table": _empty(n, 12), "step": _integers(n), "seed": _integers()}
        more = {"scale": _empty(n), "h1": y, "h2": x}
        yield lambda x=x, y=y, o=step, m=more: _backward(
            cg.guided_step(x, y, y, **o, **m, return_x0=True)
        )
        with torch.no_grad():
            a, b, twin = (_images(shape, layout).detach() for _ in range(3))
        variance = {**step, "log_variance": b}
        yield lambda a=a, b=b, t=twin, o=variance: cg.guided_step_(a, b, b, **o, h1=b, twin=t)
        yield lambda x=x, y=y: _backward(
            cg.sample_and_kl(x, y, seed=_integers(), step=_integers(n))
        )
        prior = {"prior_mean": x, "prior_log_variance": y}
        yield lambda x=x, y=y, o=prior: _backward(
            cg.sample_and_kl(x, y, **o, seed=_integers(), step=1, free_bits=0.1)
        )
    for format in (torch.contiguous_format, torch.channels_last):
        yield lambda f=format: cg.philox_normal(
            shape, seed=_integers(), index=_integers(n), step=0, dtype=HALF, memory_format=f
        )


def _coupling(n: int, c: int, h: int, w: int) -> Iterator:
    for layout, mask in product(LAYOUTS, ("first", "last", "even", "odd")):
        if mask in ("first", "last") and c < 2:
            continue
        channels = {"first": c // 2, "last": c - c // 2}.get(mask, c)
        y = _images((n, c, h, w), layout)
        params = _images((n, 2 * channels, h, w), layout)
        yield lambda y=y, p=params, m=mask: _backward(cg.affine_coupling(y, p, mask=m))
        yield lambda y=y, p=params, m=mask: _backward(
            cg.affine_coupling(y, p, mask=m, inverse=True)
        )
        shift = _images((n, channels, h, w), layout)
        yield lambda y=y, p=shift, m=mask: _backward(
            cg.affine_coupling(y, p, mask=m, additive=True)
        )


def _norm(n: int, c: int, h: int, w: int) -> Iterator:
    for layout, over_batch in product(LAYOUTS, (False, True)):
        if h * w * (n if over_batch else 1) == 1:
            continue  # refused: one value has no variance
        x, residual = (_images((n, c, h, w), layout) for _ in range(2))
        affine = [_empty(c, grad=True) for _ in range(2)]
        pads = (0, 1) if min(h, w) > 1 else (0,)
        for pad in pads:
            options = {"pad": pad, "over_batch": over_batch, "activation": "relu"}
            yield lambda x=x, a=affine, r=residual, o=options: _backward(
                cg.instance_norm_act(x, *a, residual=r, **o)
            )
            out, second = (
                _images((n, c, h + 2 * pad, w + 2 * pad), layout).detach() for _ in range(2)
            )
            yield lambda x=x, y=out, z=second, o=options: _backward(
                cg.instance_norm_act_(y, x, second=z, second_activation="leaky_relu", **o)[:2]
            )


def _convolutions(n: int, c: int, h: int, w: int) -> Iterator:
    for layout, kernel, dtype in product(LAYOUTS, (1, 3, 4), (HALF, FULL)):
        x, padding = _images((n, c, h, w), layout, dtype).detach(), min(2, kernel - 1)
        weight, bias = _empty(5, c, kernel, kernel, dtype=dtype), _empty(5, dtype=dtype)
        yield lambda x=x, w=weight, p=padding: cg.conv2d_stats(x, w, stride=1, padding=p)
        yield lambda x=x, w=weight, p=padding: cg.conv2d_stats(x, w, stride=2, padding=p)
        two = _empty(5, 2 * c, kernel, kernel, dtype=dtype)
        yield lambda x=x, w=two, b=bias, p=padding: cg.pair_conv2d(x, x, w, b, padding=p)
        yield lambda x=x, w=weight, p=padding: cg.pair_conv2d(x, None, w, stride=1, padding=p)
        for loss, target, p in ((None, None, padding), ("hinge", "real", 0), ("lsgan", "fake", 0),
                                ("vanilla", "real", padding), ("wgan", "fake", 0)):  # fmt: skip
            if min(h, w) + 2 * p >= kernel:
                yield lambda x=x, w=weight[:1], b=bias[:1], o=(loss, target, p): cg.patch_head_loss(
                    x, w, b, loss=o[0], target=o[1], padding=o[2]
                )


def _linear(n: int, c: int, h: int, w: int) -> Iterator:
    """n x h rows, c features, w channels."""
    for dtype, norm, activation in product(
        (HALF, FULL), (None, "rms", "layer"), (None, "gelu", "swiglu")
    ):
        x, rows = _empty(min(64, n * h), c, dtype=dtype), w * (1 + (activation == "swiglu"))
        weight, gain = (
            _empty(rows, c, dtype=dtype),
            None if norm is None else _empty(c, dtype=dtype),
        )
        residual, bias = _empty(len(x), w, dtype=dtype), _empty(rows, dtype=dtype)
        options = {"norm": norm, "norm_weight": gain, "activation": activation, "bias": bias}
        count = _integers(max(1, -(-len(x) // 16) * -(-rows // 16)), dtype=torch.int32)
        yield lambda a=(x, weight), r=residual, o=options: cg.norm_linear(*a, residual=r, **o)
        yield lambda a=(x, weight), k=count, o=options: cg.norm_linear(*a, counters=k, **o)


def _tokens(n: int, c: int, h: int, w: int) -> Iterator:
    """n rows, c tokens or classes, h x w numbers."""
    classes = min(c * h, 2**22)
    for dtype, guided in product((HALF, FULL), (False, True)):
        logits = _empty(n, classes, dtype=dtype, grad=True)
        both = {"uncond": logits, "scale": _empty(n)} if guided else {}
        filters = {"temperature": _empty(n), "top_k": _integers(n), "top_p": _empty(n)}
        given = {**both, **filters, "min_p": 0.1, "seed": _integers()}
        yield lambda x=logits, o=given: _backward(
            cg.sample_logits(x, **o, position=_integers(n))[1]
        )
        yield lambda x=logits: cg.sample_logits(
            x.detach(), seed=_integers(), position=0, top_p_rule="hf"
        )
        written = (_integers(n, w), _empty(n, w), _integers(n, h))
        given = {k: v.detach() if isinstance(v, Tensor) else v for k, v in given.items()}
        written = (*written, logits.detach())
        yield lambda a=written, o=given: cg.sample_logits_(*a, **o)
        table, places = _empty(c, w, dtype=dtype), _empty(h, w, dtype=dtype)
        tokens, position = _integers(n, h), _integers(n * (1 + guided), dtype=torch.int32)
        yield lambda a=(tokens, position, table): cg.embed_tokens(*a)
        options = {"offsets": _integers(h), "places": places}
        yield lambda a=(tokens, position, table), o=options: cg.embed_tokens(*a, **o)


def _attention(n: int, c: int, h: int, w: int) -> Iterator:
    """n rows, a cache of c tokens, h key heads, a prefix of w tokens."""
    heads = min(h, 8)
    for dtype, queries, head, group in ((HALF, 1, 64, 1), (HALF, 1, 16, 7), (FULL, 1, 1, 1),
                                        (FULL, 2, 8, 1), (HALF, 3, 256, 2)):  # fmt: skip
        if queries > c:
            continue
        q, new = (_empty(n, queries, heads * g, head, dtype=dtype) for g in (group, 1))
        cache, length = _empty(n, c, heads, head, dtype=dtype), _integers(n, dtype=torch.int32)
        yield lambda a=(q, cache, cache, length): cg.decode_attention(*a)
        tables = _empty(w, max(1, head // 2)), _empty(w, max(1, head // 2))
        rope = {"rope": tables} if head > 1 else {}
        appended = {"k_new": new, "v_new": new, "window": 3, "softcap": 2.0, **rope}
        count = _integers(n * queries * heads * group, dtype=torch.int32)
        yield lambda a=(q, cache, cache, length), o=appended, k=count: cg.decode_attention(
            *a,
            **o,
            counters=k,
            left_pad=a[-1],
            position=_integers(*a[0].shape[:2], dtype=torch.int32),
        )
        for prefixes in (1, n):
            prefix = _empty(prefixes, w, heads, head, dtype=dtype)
            given = {"prefix_k": prefix, "prefix_v": prefix, "prefix_id": length, **appended}
            yield lambda a=(q, cache, cache, length), o=given: cg.decode_attention(*a, **o)


_CALLS = (_elementwise, _coupling, _norm, _convolutions, _linear, _tokens, _attention)
