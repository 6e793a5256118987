"""Made-up transformers and calls of `generate` and of the autoregressive `sample`.

Tokens with a cache are those of whole runs, a row of a batch is the row alone, and what does not
fit is refused by name.
"""

import dataclasses
import math

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import cgkernels
from cgm.families.autoregressive import AutoregressiveConfig, ConditionalTransformer
from cgm.model import make_model
from cgm.networks.transformer import Transformer, TransformerConfig
from cgm.sampling.decoding import SamplingConfig, generate
from tests.fuzz import call

CONFIG_NAMES = tuple(field.name for field in dataclasses.fields(TransformerConfig))
MODEL_NAMES = tuple(field.name for field in dataclasses.fields(AutoregressiveConfig))
OPTIONS = tuple(field.name for field in dataclasses.fields(SamplingConfig))
ODD = st.sampled_from([None, -1, 0, 1, 2.5, True, math.nan, math.inf, "x", 2**31, 2**64, [1]])


def mostly(likely, odd=ODD):
    """Of `likely`, one time in twelve of what may not fit."""
    return st.integers(0, 11).flatmap(lambda i: odd if i == 0 else likely)


configs = st.fixed_dictionaries(
    {
        "vocabulary": st.integers(2, 12), "length": st.integers(4, 24),
        "layers": st.integers(1, 2), "width": st.sampled_from([4, 8, 12]),
        "heads": st.sampled_from([1, 2, 4]), "kv_heads": st.sampled_from([0, 1, 2, 3]),
        "hidden": st.integers(1, 9),
    },
    optional={
        "outputs": mostly(st.just(0), st.integers(-1, 4)), "head_dim": st.integers(-1, 8),
        "qk_norm": st.booleans(), "windows": st.lists(st.integers(-1, 5), max_size=2).map(tuple),
        "norm": mostly(st.sampled_from(["rms", "layer"])), "eps": st.sampled_from([1e-5, 1e-2]),
        "activation": mostly(st.sampled_from(["swiglu", "gelu", "gelu_tanh"])),
        "positions": mostly(st.sampled_from(["rotary", "learned"])), "interleaved": st.booleans(),
        "rope_base": st.sampled_from([10.0, 1e4]), "rope_gain": st.sampled_from([0.5, 1.0, 1.3]),
        "rope_frequencies": st.lists(st.floats(0, 2), max_size=3).map(tuple),
        "bias": st.booleans(), "head_bias": st.booleans(), "tied": st.booleans(),
    },
)  # fmt: skip
draws = st.fixed_dictionaries(
    {"length": mostly(st.integers(1, 9))},
    optional={
        "n": mostly(st.sampled_from([None, 0, 1, 2]), st.sampled_from([-1, 2.5, True, "x"])),
        "seed": mostly(st.integers(-(2**63), 2**64 - 1)),
        "temperature": mostly(st.sampled_from([0, 0.3, 1, 2.5])),
        "top_k": mostly(st.integers(0, 14)), "top_p": mostly(st.sampled_from([0.1, 0.7, 1.0])),
        "min_p": mostly(st.sampled_from([0.0, 0.2])), "int8": st.booleans(),
        "eos_token_id": mostly(st.one_of(st.none(), st.integers(0, 9), st.just([3, 5]))),
        "pad_token_id": mostly(st.one_of(st.none(), st.integers(0, 3))),
    },
)  # fmt: skip


def network_of(config):
    """With weights large enough that everything matters; None where the config was refused."""
    made = call(TransformerConfig, config, CONFIG_NAMES)
    if made is None:
        return None
    network, generator = Transformer(made).eval(), torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = parameter.data + 0.5 * torch.randn(parameter.shape, generator=generator)
    return network


@torch.no_grad()
def whole_runs(network, prompt, length, n, index, eos, pad, int8, **options):
    """`generate` without caches, one row after another."""
    network = network.int8() if int8 else network
    stops = [] if eos is None else [eos] if isinstance(eos, int) else eos
    rows = []
    for draw in range(1 if n is None else n):
        for row, number in zip(prompt, index, strict=True):
            tokens = row[None]
            for position in range(length):
                token, _ = cgkernels.sample_logits(
                    network(tokens)[:, -1], index=torch.tensor([number + draw * 2**32]),
                    position=position, **options,
                )  # fmt: skip
                if any(stop in tokens[0, len(row) :].tolist() for stop in stops):
                    token = torch.tensor([stops[0] if pad is None else pad])
                tokens = torch.cat([tokens, token[:, None]], 1)
            rows.append(tokens[0, len(row) :])
    shape = (len(prompt), length) if n is None else (n, len(prompt), length)
    return torch.stack(rows).view(shape) if rows else torch.empty(shape, dtype=torch.int64)


def margins_are_clear(network, prompt, tokens, temperature):
    """Whether rounding cannot have decided a greedy token."""
    with torch.no_grad():
        logits = network(torch.cat([prompt, tokens], 1))[:, prompt.shape[1] - 1 : -1]
    top = logits.topk(min(2, logits.shape[-1]), -1).values
    return bool((top[..., 0] - top[..., -1] > 1e-4 * (1 + top[..., 0].abs())).all())


def test_generate(fuzz):
    @given(configs, draws, st.data())
    def check(config, arguments, data):
        network = network_of(config)
        if network is None:
            return
        shape = (data.draw(st.integers(0, 3)), data.draw(st.integers(1, 6)))
        high = config["vocabulary"] - 1
        values = st.lists(
            st.integers(0, high), min_size=math.prod(shape), max_size=math.prod(shape)
        )
        prompt = torch.tensor(data.draw(values), dtype=torch.int64).view(shape)
        given_all = {"network": network, "prompt": prompt, **arguments}
        # In float64 no rounding decides a token; 8 bits are rounded from float32.
        if not arguments.get("int8"):
            network.double()
        drawn = call(generate, given_all, OPTIONS)
        if drawn is None:
            return
        options = {"temperature": 1.0, "seed": 0, **arguments}
        names = ("n", "eos_token_id", "pad_token_id", "int8", "length", "top_k", "min_p")
        rest = {name: options.pop(name, None) for name in names}
        expected = whole_runs(
            network, prompt, rest["length"], rest["n"], range(len(prompt)), rest["eos_token_id"],
            rest["pad_token_id"], rest["int8"], top_k=rest["top_k"] or None,
            min_p=rest["min_p"] or None, **options,
        )  # fmt: skip
        if rest["int8"]:
            assert drawn.shape == expected.shape and drawn.le(high).all()
        else:
            assert torch.equal(drawn, expected)
        index = torch.arange(len(prompt))
        for row in range(len(prompt)):
            part = {**given_all, "prompt": prompt[row : row + 1], "index": index[row : row + 1]}
            assert torch.equal(generate(**part)[..., 0, :], drawn[..., row, :])

    fuzz(check)


def test_prompts_with_padding(fuzz):
    @given(configs, st.lists(st.integers(0, 6), min_size=1, max_size=3), st.data())
    def check(config, sizes, data):
        network = network_of({**config, "outputs": 0})
        width = max(sizes)
        assume(network is not None and width > 0)
        high = config["vocabulary"] - 1
        rows = [
            data.draw(st.lists(st.integers(0, high), min_size=width, max_size=width)) for _ in sizes
        ]
        prompt = torch.tensor(rows)
        mask = torch.tensor([[0] * (width - size) + [1] * size for size in sizes])
        arguments = {
            "network": network, "prompt": prompt, "length": data.draw(st.integers(1, 8)),
            "seed": 1, "attention_mask": mask,
        }  # fmt: skip
        drawn = call(generate, arguments)
        if drawn is None:
            assert 0 in sizes or arguments["length"] + width > config["length"]
            return
        for i, size in enumerate(sizes):
            alone = {
                **arguments,
                "prompt": prompt[i : i + 1, width - size :],
                "attention_mask": None,
            }
            assert torch.equal(generate(**alone, index=torch.tensor([i]))[0], drawn[i])

    fuzz(check)


MODELS = st.fixed_dictionaries(
    {
        "event_shape": st.tuples(st.integers(1, 2), st.integers(2, 3), st.integers(1, 3)),
        "depth": st.just(1), "width": st.sampled_from([4, 8]), "heads": st.sampled_from([1, 2]),
        "hidden": st.integers(1, 5), "levels": mostly(st.integers(2, 5), st.integers(-1, 300)),
        "kind": st.sampled_from(["none", "class", "image", "tokens"]),
    },
    optional={
        "palette": st.sampled_from([(), ((0.0, 0.5), (-1.0, 0.25), (1.0, 1.0)), ((0.0, 0.0),)]),
        "kv_heads": st.sampled_from([0, 1, 3]), "norm": mostly(st.sampled_from(["rms", "layer"])),
        "positions": mostly(st.sampled_from(["rotary", "rotary_2d", "learned"])),
        "cond_dropout": mostly(st.sampled_from([0.0, 0.1]), st.sampled_from([-1.0, 1.0, math.nan])),
    },
)  # fmt: skip
CONDITIONS = {
    "none": {}, "class": {"num_classes": 3}, "image": {"cond_shape": (1, 2, 3)},
    "tokens": {"num_classes": 4, "cond_shape": (2,)},
}  # fmt: skip


def model_of(**config):
    return make_model(ConditionalTransformer, AutoregressiveConfig(**config)).eval()


def test_sample(fuzz):
    @given(
        MODELS, draws, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.data()
    )
    def check(config, arguments, dtype, data):
        kind = config.pop("kind")
        config = {**config, "cond_kind": kind, **CONDITIONS[kind]}
        model = call(model_of, config, MODEL_NAMES)
        if model is None:
            return
        model = model.to(dtype)
        rows = data.draw(st.integers(0, 2))
        cond = {
            "none": None, "class": torch.arange(rows) % 3,
            "image": (torch.arange(6.0 * rows).view(rows, 1, 2, 3) % 5 / 2 - 1).to(dtype),
            "tokens": torch.arange(2 * rows).view(rows, 2) % 4,
        }[kind]  # fmt: skip
        arguments = {name: v for name, v in arguments.items() if name in ("n", "seed", *OPTIONS)}
        if data.draw(st.booleans()):
            arguments["guidance"] = data.draw(mostly(st.sampled_from([1, 0.0, 2.0, -1.5])))
        drawn = call(model.sample, {"cond": cond, **arguments}, OPTIONS)
        if drawn is None:
            return
        n = arguments.get("n")
        leading = (n,) if cond is None else (rows,) if n is None else (n, rows)
        assert drawn.shape == (*leading, *config["event_shape"])
        assert drawn.numel() == 0 or (drawn.dtype == dtype and drawn.abs().max() <= 1)
        if cond is not None and drawn.numel():
            index = torch.tensor([rows - 1])
            alone = model.sample(cond=cond[rows - 1 :], index=index, **arguments)
            assert torch.equal(alone[..., 0, :, :, :], drawn[..., rows - 1, :, :, :])
            y, plain = drawn.reshape(-1, *config["event_shape"])[:rows], {**arguments, "n": None}
            known = model.sample(cond=cond, given=y[:, :, :1], **plain)
            assert torch.equal(known[:, :, :1], y[:, :, :1])
            assert model.log_prob(known, cond=cond).le(0).all()
            losses = model.loss(known, cond=cond, seed=0)["total"]
            assert losses.shape == (rows,) and losses.isfinite().all()

    fuzz(check)
