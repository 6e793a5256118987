"""Made-up calls of every public function of cgkernels, held to its reference."""

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cgkernels
from cgkernels import random, samplers
from tests.fuzz import call, is_plain

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = st.sampled_from([1, 2, 3, 0, 4, 5, 8, 17])
SEEDS = st.one_of(st.integers(-(2**63), 2**64 - 1), st.sampled_from([0, 2**63, torch.tensor(5)]))
NUMBERS = st.sampled_from([1.0, 0.0, 2, 0.3, -1.5, 7.5, 1e-30, 1e30, -0.0])


# Tensors ------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Maker:
    """Draws the arguments of one call: all tensors of one kind of values."""

    draw: Callable
    dtype: torch.dtype
    values: str  # ordinary, zero, tiny, huge, one nan, one inf
    strange: bool  # strides
    seed: int = 0

    def pick(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def size(self) -> int:
        return self.draw(SIZES)

    def maybe(self, make: Callable[[], Any]) -> Any:
        return make() if self.draw(st.booleans()) else None

    def floats(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """A tensor of this shape, with values and strides as drawn for the call."""
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        dtype = self.dtype if dtype is None else dtype
        x = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        info = torch.finfo(dtype)
        x = x * {"zero": 0.0, "tiny": info.tiny, "huge": info.max / 8}.get(self.values, 1.0)
        x = x.clamp(-info.max, info.max)
        if self.values.startswith("one ") and x.numel():
            at = torch.randint(x.numel(), (1,), generator=generator)
            x.view(-1)[at] = float(self.values.removeprefix("one "))
        return self.laid_out(x.to(dtype))

    def weights(self, *shape: int) -> Tensor:
        """Ordinary values: no padding is multiplied by them, and in plain PyTorch it is."""
        return dataclasses.replace(self, values="ordinary", seed=self.seed + 1).floats(*shape)

    def laid_out(self, x: Tensor) -> Tensor:
        """The values in other strides; expanded and overlapping, where they repeat."""
        if not self.strange or x.dim() == 0:
            return x
        kind = self.pick("plain", "transposed", "sliced", "channels_last", "expanded", "windows")
        if kind == "transposed":
            return (
                x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
            )
        if kind == "sliced":
            return torch.stack([x, x + 1], -1).flatten(-2)[..., ::2]
        if kind == "channels_last" and x.dim() == 4:
            return x.contiguous(memory_format=torch.channels_last)
        if kind == "expanded" and x.shape[0]:
            return x[:1].expand(x.shape)
        if kind == "windows" and x.dim() >= 2 and x.numel():
            steps = [
                1 if n == max(x.shape) else s for n, s in zip(x.shape, x.stride(), strict=True)
            ]
            return x.flatten().as_strided(
                x.shape, [min(s, t) for s, t in zip(steps, x.stride(), strict=True)]
            )
        return x

    def ids(self, *shape: int, high: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Whole numbers from 0 to high - 1."""
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        return self.laid_out(torch.randint(max(1, high), shape, generator=generator).to(dtype))

    def index(self, rows: int) -> Tensor | None:
        return self.maybe(lambda: self.ids(rows, high=2**40))

    def step(self, rows: int, limit: int) -> int | Tensor:
        return self.pick(0, limit - 1, torch.tensor(0), self.ids(rows, high=limit))

    def per_row(self, rows: int, numbers: st.SearchStrategy = NUMBERS) -> float | Tensor:
        number = self.draw(numbers)
        return self.pick(number, torch.tensor(float(number)), torch.full((rows,), float(number)))

    def event(self, most: int = 3) -> tuple[int, ...]:
        return tuple(self.draw(st.lists(SIZES, max_size=most)))

    def image(self) -> tuple[int, ...]:
        return self.size(), self.pick(1, 2, 3, 5), self.pick(1, 2, 4, 7), self.pick(1, 3, 4, 6)


# Calls --------------------------------------------------------------------------------------------
def add_noise(m: Maker) -> dict[str, Any]:
    x0 = m.floats(m.size(), *m.event())
    return {
        "x0": x0, "table": torch.rand(3, 2), "t": m.step(len(x0), 3), "seed": m.draw(SEEDS),
        "index": m.index(len(x0)), "target": m.pick("epsilon", "x0", "v", "flow"),
    }  # fmt: skip


def diffusion_loss(m: Maker) -> dict[str, Any]:
    made = add_noise(m)
    weight = m.maybe(lambda: torch.rand(len(made["x0"])))
    return {"pred": m.floats(*made["x0"].shape, dtype=m.pick(*DTYPES)), **made, "weight": weight}


def affine_coupling(m: Maker) -> dict[str, Any]:
    shape, mask, additive = m.image(), m.pick("first", "last", "even", "odd"), m.pick(False, True)
    half = shape[1] // 2
    touched = {"first": half, "last": shape[1] - half}.get(mask, shape[1])
    params = m.floats(shape[0], touched * (1 if additive else 2), *shape[2:])
    return {
        "y": m.floats(*shape), "params": params, "mask": mask, "limit": m.pick(2.0, 0.5, 80),
        "additive": additive, "inverse": m.pick(False, True),
    }  # fmt: skip


def conv2d_stats(m: Maker) -> dict[str, Any]:
    x, k = m.floats(*m.image()), m.pick(1, 3, 4)
    return {
        "x": x, "weight": m.weights(m.pick(1, 2, 5), x.shape[1], k, k), "stride": m.pick(1, 2),
        "padding": m.pick(0, 1, 2),
    }  # fmt: skip


def pair_conv2d(m: Maker) -> dict[str, Any]:
    x, k, outputs = m.floats(*m.image()), m.pick(1, 3, 4), m.pick(1, 2, 5)
    y = m.maybe(lambda: m.floats(len(x), m.pick(1, 2), *x.shape[2:]))
    channels = x.shape[1] + (0 if y is None else y.shape[1])
    return {
        "x": x, "y": y, "weight": m.weights(outputs, channels, k, k),
        "bias": m.maybe(lambda: m.floats(outputs)), "stride": m.pick(1, 2),
        "padding": m.pick(*range(k)), "slope": m.pick(0.2, 0, 1, 3.0),
    }  # fmt: skip


def patch_head_loss(m: Maker) -> dict[str, Any]:
    x, k = m.floats(*m.image()), m.pick(1, 3, 4)
    loss = m.pick("lsgan", "vanilla", "nonsaturating", "hinge", "wgan", None)
    return {
        "x": x, "weight": m.weights(1, x.shape[1], k, k), "bias": m.maybe(lambda: m.floats(1)),
        "loss": loss, "target": loss and m.pick("real", "fake", "generator"),
        "padding": m.pick(*range(k)),
    }  # fmt: skip


def patch_loss(m: Maker) -> dict[str, Any]:
    loss = m.pick("lsgan", "vanilla", "nonsaturating", "hinge", "wgan")
    target = m.pick("real", "fake", "generator")
    return {"logits": m.floats(*m.event()), "loss": loss, "target": target}


def instance_norm_act(m: Maker) -> dict[str, Any]:
    shape = m.image()
    activation = m.pick(None, "relu", "leaky_relu")
    return {
        "x": m.floats(*shape), "weight": m.maybe(lambda: m.floats(shape[1])),
        "bias": m.maybe(lambda: m.floats(shape[1])), "eps": m.pick(1e-5, 0.1, 1),
        "activation": activation, "slope": 0.1 if activation == "leaky_relu" else None,
        "residual": m.maybe(lambda: m.floats(*shape)), "pad": m.pick(0, 0, 1, 2),
        "over_batch": m.pick(False, True), "return_stats": m.pick(False, True),
    }  # fmt: skip


def instance_norm_act_(m: Maker) -> dict[str, Any]:
    made = instance_norm_act(m)
    del made["return_stats"]
    n, c, h, w = made["x"].shape
    out = (n, c, h + 2 * made["pad"], w + 2 * made["pad"])
    second = m.maybe(lambda: m.floats(*out))
    also = None if second is None else m.pick(None, "relu")
    return {"out": m.floats(*out), **made, "second": second, "second_activation": also}


def norm_linear(m: Maker) -> dict[str, Any]:
    features, outputs = m.pick(1, 3, 8, 33), m.pick(1, 2, 16)
    x = m.floats(*m.event(2), features)
    norm, activation = m.pick(None, "rms", "layer"), m.pick(None, "gelu", "gelu_tanh", "swiglu")
    rows = outputs * 2 if activation == "swiglu" else outputs
    weight, scales = m.floats(rows, features), None
    kind = m.pick("float", "float", "int8", "packed")
    if kind == "int8":
        weight = m.ids(rows, features, high=100, dtype=torch.int8)
        scales = torch.rand(rows)
    elif kind == "packed":
        weight = cgkernels.pack_weight(weight)
    return {
        "x": x, "weight": weight, "norm": norm, "scales": scales, "activation": activation,
        "norm_weight": m.maybe(lambda: m.floats(features)) if norm else None,
        "norm_bias": m.maybe(lambda: m.floats(features)) if norm == "layer" else None,
        "bias": m.maybe(lambda: m.floats(rows)), "eps": m.pick(1e-5, 0.1, 1),
        "residual": m.maybe(lambda: m.floats(*x.shape[:-1], outputs)),
        "counters": m.pick(None, None, torch.zeros(100, dtype=torch.int32)),
    }  # fmt: skip


def pack_weight(m: Maker) -> dict[str, Any]:
    return {"weight": m.floats(m.size(), m.size())}


def philox_normal(m: Maker) -> dict[str, Any]:
    shape = (m.size(), *m.event())
    last = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return {
        "shape": shape, "seed": m.draw(SEEDS), "index": m.index(shape[0]),
        "step": m.step(shape[0], 2**24), "stream": m.pick(0, 7, 255), "dtype": m.dtype,
        "device": m.pick(None, "cpu", torch.device("cpu")),
        "memory_format": m.pick(torch.contiguous_format, last),
    }  # fmt: skip


def stream(m: Maker) -> dict[str, Any]:
    made = philox_normal(m)
    del made["memory_format"]
    return made


def sample_and_kl(m: Maker) -> dict[str, Any]:
    mean, prior = m.floats(m.size(), *m.event()), m.pick(False, True)
    like = lambda: m.floats(*mean.shape, dtype=m.pick(*DTYPES))  # noqa: E731
    return {
        "mean": mean, "log_variance": like(), "prior_mean": like() if prior else None,
        "prior_log_variance": like() if prior else None, "seed": m.draw(SEEDS),
        "index": m.index(len(mean)), "step": m.step(len(mean), 2**24),
        "free_bits": m.pick(0.0, 0.5, 2),
    }  # fmt: skip


def sample_logits(m: Maker) -> dict[str, Any]:
    rows, vocabulary = m.size(), m.pick(1, 2, 7, 40, 300)
    uncond = m.maybe(lambda: m.floats(rows, vocabulary, dtype=m.pick(*DTYPES)))
    both = uncond is None and m.pick(False, True)
    shares = st.sampled_from([0.0, 0.5, 0.9, 1, 1e-6])
    return {
        "logits": m.floats(2 * rows if both else rows, vocabulary, scale=3.0), "uncond": uncond,
        "scale": m.per_row(rows) if both or uncond is not None else None,
        "temperature": m.per_row(rows, st.sampled_from([1.0, 0, 0.5, 1e-30, 1e30])),
        "top_k": m.pick(None, 1, 3, 500, torch.tensor(2), m.ids(rows, high=9) + 1),
        "top_p": m.maybe(lambda: m.per_row(rows, shares)),
        "min_p": m.maybe(lambda: m.per_row(rows, shares)),
        "top_p_rule": m.pick("mass_before", "hf"), "seed": m.draw(SEEDS), "index": m.index(rows),
        "position": m.step(rows, 2**24),
    }  # fmt: skip


def sample_logits_(m: Maker) -> dict[str, Any]:
    made = sample_logits(m)
    del made["position"]
    rows = len(made["logits"]) // (1 if made["uncond"] is not None or made["scale"] is None else 2)
    wide = any(t is not None and t.dtype == torch.float64 for t in (made["logits"], made["uncond"]))
    length = m.size()
    log_probs = m.floats(rows, length, dtype=torch.float64 if wide else torch.float32)
    return {
        "tokens": m.ids(rows, length, high=9), "log_probs": log_probs,
        "counts": m.ids(rows, m.size(), high=length), **made,
    }  # fmt: skip


def guided_step(m: Maker) -> dict[str, Any]:
    x = m.floats(m.size(), *m.event())
    like = lambda: m.floats(*x.shape, dtype=m.pick(*DTYPES))  # noqa: E731
    uncond = m.maybe(like)
    table = torch.randn(2, 12, generator=torch.Generator().manual_seed(m.seed))
    table[:, 8:10] = torch.tensor(m.pick((-torch.inf, torch.inf), (-1.0, 1.0)))
    both = uncond is None and m.pick(False, True)
    return {
        "x": x, "cond": m.floats(2 * len(x), *x.shape[1:]) if both else like(), "uncond": uncond,
        "table": table, "step": m.step(len(x), 2), "scale": m.per_row(len(x)),
        "log_variance": m.maybe(like), "h1": m.maybe(like), "h2": m.maybe(like),
        "seed": m.draw(SEEDS), "index": m.index(len(x)), "return_x0": m.pick(False, True),
    }  # fmt: skip


def guided_step_(m: Maker) -> dict[str, Any]:
    made = guided_step(m)
    del made["return_x0"]
    return {**made, "twin": m.maybe(lambda: m.floats(*made["x"].shape))}


def embed_tokens(m: Maker) -> dict[str, Any]:
    rows, columns, vocabulary, width = m.size(), m.pick(1, 3, 6), m.pick(1, 4, 9), m.size()
    return {
        "tokens": m.ids(rows, columns, high=vocabulary) - m.pick(0, 0, 1),
        "position": m.ids(rows * m.pick(1, 2), high=columns, dtype=torch.int32),
        "embedding": m.floats(vocabulary, width),
        "offsets": m.maybe(lambda: m.ids(columns, high=3)),
        "places": m.maybe(lambda: m.floats(columns, width)),
    }  # fmt: skip


def attention_options(m: Maker) -> dict[str, Any]:
    return {
        "window": m.pick(None, None, 1, 3, 2**40), "softcap": m.pick(None, None, 5.0),
        "scale": m.pick(None, 0.5, 2),
    }  # fmt: skip


def prefill_attention(m: Maker) -> dict[str, Any]:
    rows, length, kv, group, size = m.size(), m.size(), m.pick(1, 2), m.pick(1, 3), m.pick(1, 4, 8)
    left_pad = m.maybe(lambda: m.ids(rows, high=length + 1))
    room = length if left_pad is None or not rows else length - int(left_pad.max())
    return {
        "q": m.floats(rows, length, kv * group, size), "k": m.floats(rows, length, kv, size),
        "v": m.floats(rows, length, kv, size), "left_pad": left_pad,
        "bidirectional": m.pick(0, length, m.ids(rows, high=room + 1)), **attention_options(m),
    }  # fmt: skip


def decode_attention(m: Maker) -> dict[str, Any]:
    rows, queries, kv, group, size = (
        m.size(),
        m.pick(1, 3),
        m.pick(1, 2),
        m.pick(1, 3),
        m.pick(2, 8),
    )
    new, capacity = m.pick(False, True), m.pick(3, 6, 9)
    lengths = m.ids(rows, high=capacity + 1 - (queries if new else 0), dtype=torch.int32)
    cached = lambda n: m.floats(rows, n, kv, size)  # noqa: E731
    prefixes, stored = m.pick(0, 0, 1, 2), m.pick(1, 4)
    prefix = lambda: m.floats(prefixes, stored, kv, size)  # noqa: E731
    angle = torch.rand(30, m.pick(1, size // 2))
    return {
        "q": m.floats(rows, queries, kv * group, size), "k_cache": cached(capacity),
        "v_cache": cached(capacity), "lengths": lengths, "k_new": cached(queries) if new else None,
        "v_new": cached(queries) if new else None,
        "rope": m.pick(None, (angle.cos(), angle.sin())), "rope_interleaved": m.pick(False, True),
        "position": m.maybe(lambda: m.ids(rows, queries, high=30)),
        "prefix_k": prefix() if prefixes else None, "prefix_v": prefix() if prefixes else None,
        "prefix_length": m.maybe(lambda: m.ids(prefixes, high=stored + 1)) if prefixes else None,
        "prefix_id": m.ids(rows, high=prefixes) if prefixes else None,
        "left_pad": m.maybe(lambda: (lengths.long() - m.pick(0, 1)).clamp(min=0)),
        **attention_options(m), "return_lse": m.pick(False, True),
        "counters": m.pick(None, torch.zeros(1000, dtype=torch.int32)) if new else None,
    }  # fmt: skip


def make_schedule(m: Maker) -> dict[str, Any]:
    name = m.pick("linear", "scaled_linear", "cosine", "sigmoid")
    return {
        "name": name, "num_timesteps": m.pick(1, 2, 10, 100),
        "beta_start": None if name == "cosine" else m.pick(None, 1e-5),
        "beta_end": None if name == "cosine" else m.pick(None, 0.03),
        "zero_terminal_snr": m.pick(False, True),
    }  # fmt: skip


def make_table(m: Maker) -> dict[str, Any]:
    sampler = m.pick(*samplers.SAMPLERS)
    return {
        "sampler": sampler, "schedule": samplers.make_schedule(num_timesteps=m.pick(2, 10, 50)),
        "steps": m.pick(1, 2, 7, 50), "prediction": m.pick(*samplers.PREDICTIONS),
        "spacing": m.pick(*samplers.SPACINGS), "clip": m.pick(None, (-1, 1), (-torch.inf, 2.0)),
        "eta": m.pick(0, 0.5, 1.0) if sampler == "ddim" else 0.0,
        "variance": m.pick(*samplers.VARIANCES) if sampler == "ddpm" else "fixed_small",
    }  # fmt: skip


CALLS: dict[Callable, Callable[[Maker], dict[str, Any]]] = {
    cgkernels.add_noise: add_noise, cgkernels.affine_coupling: affine_coupling,
    cgkernels.conv2d_stats: conv2d_stats, cgkernels.decode_attention: decode_attention,
    cgkernels.diffusion_loss: diffusion_loss, cgkernels.embed_tokens: embed_tokens,
    cgkernels.guided_step: guided_step, cgkernels.guided_step_: guided_step_,
    cgkernels.instance_norm_act: instance_norm_act,
    cgkernels.instance_norm_act_: instance_norm_act_, cgkernels.norm_linear: norm_linear,
    cgkernels.pack_weight: pack_weight, cgkernels.pair_conv2d: pair_conv2d,
    cgkernels.patch_head_loss: patch_head_loss, cgkernels.patch_loss: patch_loss,
    cgkernels.philox_normal: philox_normal, cgkernels.prefill_attention: prefill_attention,
    cgkernels.sample_and_kl: sample_and_kl, cgkernels.sample_logits: sample_logits,
    cgkernels.sample_logits_: sample_logits_, random.normal: stream, random.uniform: stream,
    random.exponential: stream, samplers.make_schedule: make_schedule,
    samplers.make_table: make_table,
}  # fmt: skip
ROUNDED = {cgkernels.sample_logits, cgkernels.sample_logits_}
"""What is drawn follows from masses in whole numbers, which other dtypes round otherwise."""


def test_nothing_public_is_left_out():
    public = {getattr(cgkernels, name) for name in cgkernels.__all__}
    assert public - {cgkernels.reference} == CALLS.keys() & public


# Wrong arguments ----------------------------------------------------------------------------------
class Subclass(Tensor):
    """As those of users: a name, nothing more."""


def wrong_tensors(shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    x = torch.ones(shape)
    return {
        "sparse": x.to_sparse,
        "mkldnn": lambda: torch.ones(2, 3).to_mkldnn(),
        "quantized": lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "meta": lambda: torch.ones(1, device="meta"),
        "meta ids": lambda: torch.zeros((), dtype=torch.int64, device="meta"),
        "bool": x.bool, "complex": lambda: x.to(torch.complex64), "ids": x.long, "bytes": x.byte,
        "large ids": lambda: x.long() << 40, "negative ids": lambda: -x.long(),
        "none": lambda: x[:0] if x.dim() else x.reshape(1)[:0],
        "number": lambda: torch.tensor(2.0), "longer": lambda: x[None],
        "nan": lambda: x * torch.nan, "subclass": lambda: x.as_subclass(Subclass),
        "ids of a subclass": lambda: torch.tensor(2**24).as_subclass(Subclass),
        "half": x.half, "double": x.double, "requires grad": lambda: x.clone().requires_grad_(),
    }  # fmt: skip


WRONG = (
    None, "x", "", b"x", 2.5, 1.0, -1, 0, 3, True, False, 2**31, 2**62, 2**64, -(2**64), 10**400,
    1e308, -1e308, 1e-320, float("nan"), float("inf"), -float("inf"), 2j, [1.0], [], (), (1, 2),
    {}, np.float32(1), np.float64(1), np.int64(1), np.bool_(True), np.ones(2), np.array(1.0),
    object, torch.float32, torch.float16, torch.int64, torch.Size([2, 3]), "cpu", "relu",
)  # fmt: skip


def spoiled(m: Maker, arguments: dict[str, Any]) -> dict[str, Any]:
    """With one argument, or two, that may not fit."""
    arguments = dict(arguments)
    for _ in range(m.pick(1, 1, 2)):
        name = m.pick(*arguments)
        value = arguments[name]
        if m.pick(False, True):
            made = wrong_tensors(tuple(value.shape) if is_plain(value) else (2,))
            arguments[name] = made[m.pick(*made)]()
        else:
            arguments[name] = m.pick(*WRONG)
    return arguments


# The oracle ---------------------------------------------------------------------------------------
def leaves(results: Any) -> list[Any]:
    if isinstance(results, tuple | list):
        return [leaf for result in results for leaf in leaves(result)]
    if dataclasses.is_dataclass(results):
        return leaves(list(vars(results).values()))
    return [results]


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    """Of float64 tensors."""

    def wide(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(wide, value))
        if isinstance(value, Tensor):
            value = value.to_dense() if value.is_mkldnn else value
            return value.double() if value.is_floating_point() else value
        return torch.float64 if value in DTYPES else value

    return {name: wide(value) for name, value in arguments.items()}


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """With the strides, and the memory that arguments share."""
    memo: dict[int, Any] = {}
    for t in arguments.values():
        if isinstance(t, Subclass) and is_plain(t):
            memo[id(t)] = t.as_subclass(Tensor).clone().as_subclass(Subclass)
        elif isinstance(t, Tensor) and not is_plain(t):
            memo[id(t)] = t
    return copy.deepcopy(arguments, memo)


def assert_agree(got: Any, same: Any, true: Any, huge: bool) -> None:
    """Equal but for round-off: as near to float64 as plain PyTorch is, or a few units more.

    Infinities and NaN are where plain PyTorch has them, unless float64 is next to an overflow. Of
    huge numbers sums overflow or not by their order: there are results, no more.
    """
    if not isinstance(got, Tensor):
        assert type(got) is type(same) and (np.asarray(got) == np.asarray(same)).all()
        return
    got = (got.to_dense() if got.is_mkldnn else got).detach()
    same = same.detach()
    assert got.dtype == same.dtype and got.shape == same.shape, (got, same)
    if huge:
        return
    if got.is_meta:  # of arguments without values
        return
    if not got.is_floating_point():
        assert torch.equal(got, same), (got, same)
        return
    info = torch.finfo(got.dtype)
    got, same = got.double(), same.double()
    true = same if true is None else true.detach().double()
    border = ~(true.abs() < info.max / 64) & ~true.isnan()  # rounding decides of an overflow
    special = ~(got.isfinite() & same.isfinite())
    equal = torch.equal(
        torch.where(special & ~border, got, 0).nan_to_num(7e300),
        torch.where(special & ~border, same, 0).nan_to_num(7e300),
    )
    assert equal, (got, same, true)
    plain = ~special & ~border & true.isfinite()
    if plain.any():
        size = true[plain].abs().max()
        allowed = 4 * (same - true)[plain].abs().max() + 32 * info.eps * size + 8 * info.tiny
        error = (got - true)[plain].abs().max()
        assert error <= allowed, (float(error), float(allowed), got, same, true)


def check_call(
    function: Callable, arguments: dict[str, Any], exact: bool = False, huge: bool = False
) -> bool:
    """Whether the call was taken; it then gives what its reference does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = copied(arguments)
        results = call(function, ours, names=("alphas_cumprod",))
        if results is None:
            return False
        theirs, wide = copied(arguments), widened(copied(arguments)) if exact else None
        with cgkernels.reference():
            expected = function(**theirs)
            truth = function(**wide) if wide is not None else None
        for written, value in arguments.items():
            if is_plain(value):
                true = None if wide is None else wide[written]
                assert_agree(ours[written], theirs[written], true, huge)
        trues = leaves(truth) if exact else [None] * len(leaves(results))
        for got, same, true in zip(leaves(results), leaves(expected), trues, strict=True):
            assert_agree(got, same, true if isinstance(true, Tensor) else None, huge)
    return True


@st.composite
def maker(draw: Callable, ordinary: bool = False) -> Maker:
    values = (
        ["ordinary"] if ordinary else ["zero", "tiny", "huge", "one nan", "one inf", "one -inf"]
    )
    return Maker(
        draw, draw(st.sampled_from(DTYPES)), draw(st.sampled_from(values)), draw(st.booleans()),
        draw(st.integers(0, 1000)),
    )  # fmt: skip


FUNCTIONS = st.sampled_from(list(CALLS))


def test_right_calls(fuzz):
    taken = []

    @given(FUNCTIONS, maker(ordinary=True))
    def check(function, m):
        taken.append(check_call(function, CALLS[function](m), function not in ROUNDED))

    fuzz(check)
    assert sum(taken) > len(taken) / 2


BY_ORDER = {cgkernels.norm_linear}
"""GELU(-inf) is NaN or not by the order of the operations."""


def test_calls_with_extreme_values(fuzz):
    @given(st.sampled_from([f for f in CALLS if f not in BY_ORDER]), maker())
    def check(function, m):
        check_call(function, CALLS[function](m), huge=m.values == "huge")

    fuzz(check)


def test_calls_with_wrong_arguments(fuzz):
    taken = []

    @given(FUNCTIONS, maker(ordinary=True))
    def check(function, m):
        arguments = spoiled(m, CALLS[function](m))
        taken.append(check_call(function, arguments))

    fuzz(check)
    assert not all(taken)


def test_calls_with_missing_arguments(fuzz):
    """Python itself names what is missing, or what is too much."""

    @given(FUNCTIONS, maker(ordinary=True))
    def check(function, m):
        arguments = CALLS[function](m)
        name = m.pick(*arguments)
        value = arguments.pop(name)
        if m.pick(False, True):
            arguments[name + "_"] = value
        check_call(function, arguments)

    fuzz(check)
