"""The decoding loop: tokens are those of whole runs, whatever the batch, cache and prefix."""

import copy
import pickle
from unittest import mock

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

import cgkernels
from cgkernels._triton import HAS_TRITON
from cgkernels.timing import cuda_syncs
from cgm.networks.transformer import (
    Int8Linear,
    PackedLinear,
    Transformer,
    TransformerConfig,
    fused_linear,
)
from cgm.sampling.decoding import Decoder, SamplingConfig, generate
from tests.support import launching

KINDS = {
    "rotary": {},
    "interleaved": {"interleaved": True, "kv_heads": 2},
    "learned": {"positions": "learned", "norm": "layer", "activation": "gelu", "bias": True},
    "tied": {"tied": True, "kv_heads": 1, "activation": "gelu_tanh"},
    "wide heads": {"head_dim": 12, "windows": (4, 0), "head_bias": True},
    "qk norm": {"qk_norm": True, "norm": "layer"},
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def small(device="cpu", **changes):
    """With weights large enough that everything matters to the result."""
    config = {"vocabulary": 40, "length": 64, "layers": 2, "width": 32, "heads": 4, "hidden": 48}
    network = Transformer(TransformerConfig(**{**config, **changes})).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        parameter.data = draw * 0.4 if parameter.dim() == 2 else parameter.data + 0.2 * draw
    return network.to(device)


def prompts(rows, length=5, device="cpu"):
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(40, (rows, length), generator=generator).to(device)


@torch.no_grad()
def slow(network, prompt, length, seed=0, index=None, **options):
    """Every token from a run over the whole sequence."""
    tokens = prompt
    for position in range(length):
        logits = network(tokens)[:, -1]
        token, _ = cgkernels.sample_logits(
            logits, seed=seed, index=index, position=position, **options
        )
        tokens = torch.cat([tokens, token[:, None]], 1)
    return tokens[:, prompt.shape[1] :]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_of_cached_steps_are_those_of_the_whole_sequence(kind):
    """At every position, float32, 1e-5 of the largest."""
    network, tokens = small(**KINDS[kind]), prompts(3, 20)
    whole = network(tokens)
    c = network.config
    rope = network.rope_table(torch.arange(20)) if c.positions == "rotary" else None
    head = None if rope is None else tuple(t[:6] for t in rope)
    _, k, v = network.prefill(tokens[:, :6], head)
    shape = (c.layers, 3, 14, c.key_heads, c.head_size)
    keys, values = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    lengths = torch.zeros(3, dtype=torch.int64)
    for i in range(6, 20):
        logits = network.step(
            tokens[:, 6:], None, keys, values, lengths, k, v, rope=rope, prefix_id=torch.arange(3)
        )
        assert (logits - whole[:, i]).abs().max() < 1e-5 * whole.abs().max()
        lengths += 1


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_whole_runs(kind):
    network, prompt = small(**KINDS[kind]), prompts(3)
    drawn = generate(network, prompt, 20, seed=3, temperature=0.8, top_k=30, top_p=0.9)
    expected = slow(network, prompt, 20, seed=3, temperature=0.8, top_k=30, top_p=0.9)
    assert torch.equal(drawn, expected) and len(drawn.unique()) > 5
    greedy = generate(network, prompt, 20, temperature=0)
    assert torch.equal(greedy, slow(network, prompt, 20, temperature=0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [2, 7, 64, 70])
@torch.no_grad()
def test_a_row_has_the_same_logits_in_any_batch(rows, device):
    """To the bit: float32 logits show what tokens would hide."""
    network, prompt = small(device), prompts(rows, device=device)

    def logits(some):
        run = Decoder(
            network, prompt[some], torch.arange(len(some), device=device), 4, SamplingConfig(),
            seed=0, index=some, rope=network.rope_table(torch.arange(9, device=device)),
        )  # fmt: skip
        return run.run(), run.logits

    everything = torch.arange(rows, device=device)
    tokens, whole = logits(everything)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).to(device)
    for some in (everything[:1], everything[-1:], order[: max(1, rows // 2)], order):
        part = logits(some)
        assert torch.equal(part[0], tokens[some]) and torch.equal(part[1], whole[some])


def test_draws_of_a_prompt_share_its_keys():
    network, prompt = small(), prompts(2)
    drawn = generate(network, prompt, 6, n=5, seed=1)
    assert drawn.shape == (5, 2, 6)
    index = torch.tensor([1 + 3 * 2**32])
    assert torch.equal(generate(network, prompt[1:], 6, seed=1, index=index)[0], drawn[3, 1])
    with torch.no_grad():
        run = Decoder(
        network, prompt, torch.arange(10) % 2, 6, SamplingConfig(), seed=1,
        index=torch.arange(10), rope=network.rope_table(torch.arange(10)),
    )  # fmt: skip
    assert run.prefix_keys.shape[1] == 2 and run.keys.shape[1:3] == (10, 5)


def test_empty_and_single():
    network = small()
    assert generate(network, prompts(2)[:0], 3).shape == (0, 3)
    assert generate(network, prompts(2), 3, n=0).shape == (0, 2, 3)
    assert torch.equal(generate(network, prompts(2), 1), generate(network, prompts(2), 9)[:, :1])


@torch.no_grad()
def test_int8_weights():
    network, prompt = small(bias=True), prompts(4, 9)
    twin = network.int8()
    linear = twin.blocks[1].up
    assert isinstance(linear, Int8Linear) and linear.weight.dtype == torch.int8
    wide = network.blocks[1].up.weight
    scales = wide.abs().amax(1, keepdim=True) / 127
    assert ((linear.weight * linear.scales[:, None] - wide).abs() <= 0.501 * scales).all()
    assert linear.weight.abs().amax(1).eq(127).all()
    exact, rounded = network(prompt), twin(prompt)
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()
    x = torch.randn(3, 32)
    torch.testing.assert_close(fused_linear(x, linear), linear(x))
    assert isinstance(network.blocks[1].up, torch.nn.Linear)  # as it was
    drawn = generate(network, prompt, 12, int8=True, temperature=0)
    assert torch.equal(drawn, slow(twin, prompt, 12, temperature=0))


@torch.no_grad()
def test_packed_weights():
    """On a CPU tokens are drawn with them; the weights of the network itself stay as they are."""
    network, prompt = small(bias=True), prompts(4, 9)
    twin = network.pack()
    assert isinstance(twin.blocks[1].up, PackedLinear)
    assert isinstance(network.blocks[1].up, torch.nn.Linear)
    assert twin.embedding.weight is network.embedding.weight
    x = torch.randn(3, 32)
    torch.testing.assert_close(fused_linear(x, twin.head), network.head(x))
    before = generate(network, prompt, 12, temperature=0)
    assert torch.equal(before, slow(network, prompt, 12, temperature=0))
    network.blocks[0].down.weight.data.mul_(-3)  # behind the back of any version counter
    after = generate(network, prompt, 12, temperature=0)
    assert torch.equal(after, slow(network, prompt, 12, temperature=0))
    assert not torch.equal(after, before)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_a_copy_of_packed_weights(copied, dtype):
    twin = small(bias=True).to(dtype).pack()
    other, x = copied(twin), torch.randn(3, 32, dtype=dtype)
    for ours, theirs in ((other.head, twin.head), (other.blocks[1].up, twin.blocks[1].up)):
        assert isinstance(ours, PackedLinear) and ours.weight.layout == theirs.weight.layout
        assert torch.equal(fused_linear(x, ours), fused_linear(x, theirs))


def test_a_compiled_step_keeps_its_weights():
    network = small()
    network.step = torch.compile(network.step, backend="eager")
    assert network.pack() is network
    assert "step" not in vars(network.int8())


def test_int8_weights_of_zero():
    linear = torch.nn.Linear(4, 2, bias=False)
    linear.weight.data.zero_()
    assert torch.equal(Int8Linear(linear)(torch.ones(1, 4)), torch.zeros(1, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    network, prompt = small().to(dtype), prompts(2)
    drawn = generate(network, prompt, 8, temperature=0)
    if dtype == torch.float64:
        assert torch.equal(drawn, slow(network, prompt, 8, temperature=0))
    assert drawn.min() >= 0 and drawn.max() < 40


class Launches(TorchDispatchMode):
    """Notes every kernel that is launched, and every op of PyTorch that would launch one on a GPU.

    On meta tensors: no value can be looked at, as on a GPU, and no kernel runs.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view and "empty" not in str(func):
            self.found.append(str(func))
        return out

    def note(self, kernel, grid):
        module = kernel.fn.__module__.split(".")[2]
        return lambda *args, **kwargs: self.found.append(module)

    def of(self, call):
        from triton.runtime.jit import KernelInterface

        with launching(), mock.patch.object(
            KernelInterface, "__getitem__", lambda kernel, grid: self.note(kernel, grid)
        ), self:  # fmt: skip
            call()
        return self.found


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("options", [{}, {"guidance": 2.0, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
                                     {"int8": True, "temperature": 0}], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "qk norm"])  # two more
@torch.no_grad()
def test_a_step_is_five_launches_a_layer_and_three(kind, options):
    """Nothing is zero_init, copied or cast beside them; features are many enough to be split."""
    config = {"vocabulary": 40, "length": 700, "layers": 2, "width": 2048, "heads": 16}
    with torch.device("meta"):
        network = Transformer(TransformerConfig(**{**config, "hidden": 4096, **KINDS[kind]}))
        network, index = network.bfloat16(), torch.arange(3)
        rope = None if network.positions else network.rope_table(torch.arange(650))
        guided = "guidance" in options
        run = Decoder(
            network, torch.zeros(2, 5, dtype=torch.int64), index.repeat(1 + guided) % 2, 600,
            SamplingConfig(**options), seed=0, index=index, rope=rope, first=2 * guided,
            offsets=torch.arange(602) if guided else None,
        )  # fmt: skip
    layer = ["norm_linear", "decode_attention", "norm_linear", "norm_linear", "norm_linear"]
    expected = ["embed_tokens", *layer, *layer, "norm_linear", "sample_logits"]
    assert Launches().of(run._step) == expected


@torch.no_grad()
def test_log_probabilities_are_those_of_the_tokens():
    network, prompt = small(), prompts(3)
    run = Decoder(
        network, prompt, torch.arange(3), 6, SamplingConfig(temperature=0.7), seed=2,
        index=torch.arange(3), rope=network.rope_table(torch.arange(10)),
    )  # fmt: skip
    tokens = run.run()
    logits = network(torch.cat([prompt, tokens], 1))[:, 4:-1] / 0.7
    expected = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(run.log_probs, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
def test_graphs_draw_what_eager_steps_draw_and_nothing_waits():
    network, prompt = small("cuda"), prompts(3, device="cuda")
    eager = generate(network, prompt, 30, graph=False)
    assert torch.equal(generate(network, prompt, 30), eager)
    counts = [cuda_syncs(lambda n=n: generate(network, prompt, n, graph=False)) for n in (4, 12)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "changes, arguments, error, words",
    [
        ({}, {"prompt": torch.zeros(3, dtype=torch.int64)}, ValueError, "prompt must have shape"),
        ({}, {"prompt": torch.zeros(2, 0, dtype=torch.int64)}, ValueError, "(B, M > 0)"),
        ({}, {"prompt": torch.zeros(2, 3)}, TypeError, "prompt must be int64"),
        ({}, {"prompt": torch.full((2, 3), 40)}, ValueError, "prompt must be in [0, 40), got 40"),
        ({}, {"prompt": torch.full((2, 3), -1)}, ValueError, "prompt must be in [0, 40), got -1"),
        ({}, {"length": 0}, ValueError, "length must be from 1 to 59"),
        ({}, {"length": 60}, ValueError, "length must be from 1 to 59 after this prompt, got 60"),
        ({}, {"prompt": torch.zeros(2, 64).long()}, ValueError, "prompt must have less than 64"),
        ({}, {"guidance": 2.0}, ValueError, "guidance must be 1"),
        ({}, {"beams": 4}, TypeError, "beams is no option of generate"),
        ({}, {"temperature": -1.0}, ValueError, "temperature must not be negative"),
        ({}, {"top_k": -1}, ValueError, "top_k must not be negative"),
        ({}, {"index": torch.arange(3)}, ValueError, "index must have shape (2,)"),
        ({"outputs": 7}, {}, ValueError, "network must put out its 40 tokens, got 7"),
        ({}, {"length": 4.0}, TypeError, "length must be an int, got 4.0"),
        ({}, {"length": True}, TypeError, "length must be an int, got True"),
        ({}, {"prompt": [[1, 2], [3]]}, TypeError, "prompt must be an int64 tensor, got list"),
        ({}, {"prompt": torch.zeros(2, 3).to_sparse()}, TypeError, "prompt must be a dense tensor"),
        ({}, {"network": torch.nn.Linear(2, 2)}, TypeError, "network must be a Transformer"),
        ({}, {"network": torch.compile(small())}, TypeError, "Transformer, got OptimizedModule"),
        ({}, {"prompt": prompts(2).to("meta")}, ValueError, "prompt must be on cpu as the network"),
        ({}, {"attention_mask": [[1]]}, TypeError, "attention_mask must be an integer or bool"),
        ({}, {"attention_mask": torch.ones(2, 5)}, TypeError, "tensor, got torch.float32"),
        (
            {},
            {"attention_mask": torch.ones(2, 4).long()},
            ValueError,
            "attention_mask must have sh",
        ),
        ({}, {"attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * 2)}, ValueError, "on the left"),
        ({}, {"attention_mask": torch.tensor([[1, 0, 1, 1, 1]] * 2)}, ValueError, "on the left"),
        ({}, {"attention_mask": torch.zeros(2, 5).long()}, ValueError, "at least one token"),
        ({}, {"attention_mask": torch.full((2, 5), 2)}, ValueError, "attention_mask must have 0"),
        (
            {"rope_dynamic": (2.0, 32)},
            {"attention_mask": torch.tensor([[1] * 5, [0] + [1] * 4])},
            ValueError,
            "attention_mask must be None for dynamic rope",
        ),
        ({}, {"eos_token_id": 40}, ValueError, "eos_token_id must be in [0, 40), got 40"),
        ({}, {"eos_token_id": [3, -1]}, ValueError, "eos_token_id must be in [0, 40), got -1"),
        ({}, {"eos_token_id": "</s>"}, TypeError, "eos_token_id must be made of ints"),
        ({}, {"eos_token_id": 2.0}, TypeError, "eos_token_id must be made of ints, got 2.0"),
        ({}, {"eos_token_id": 1, "pad_token_id": 40}, ValueError, "pad_token_id must be in"),
    ],
)
def test_wrong_arguments(changes, arguments, error, words):
    given = {"network": small(**changes), "prompt": prompts(2), "length": 3, **arguments}
    with pytest.raises(error) as caught:
        generate(**given)
    assert words in str(caught.value)


# Modules that are more than their tensors ---------------------------------------------------------
class LoRA(torch.nn.Module):
    """An adapter around a linear layer, as other packages put it in its place."""

    def __init__(self, base):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.base = base
        self.a = torch.nn.Parameter(torch.randn(2, base.in_features, generator=generator))
        self.b = torch.nn.Parameter(torch.randn(base.out_features, 2, generator=generator))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Twice(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


class Marked(torch.Tensor):
    """A subclass as quantized weights are."""


def adapt(network):
    for block in network.blocks:
        block.qkv, block.down = LoRA(block.qkv), LoRA(block.down)


def subclass(network):
    linear = network.blocks[1].up
    network.blocks[1].up = Doubled(linear.in_features, linear.out_features, bias=False)
    network.blocks[1].up.weight = linear.weight


def replace_forward(network):
    linear = network.blocks[0].proj
    linear.forward = lambda x: -torch.nn.Linear.forward(linear, x)


def scale_embedding(network):
    network.embedding.register_forward_hook(lambda module, args, out: 2 * out)


ALTERED = {
    "adapter": adapt,
    "subclass": subclass,
    "forward": replace_forward,
    "hook": lambda n: n.blocks[0].up.register_forward_hook(lambda m, args, out: 1.5 * out),
    "pre-hook": lambda n: n.head.register_forward_pre_hook(lambda m, args: (args[0].flip(-1),)),
    "norm": lambda n: n.blocks[1].norm2.register_forward_hook(lambda m, args, out: out.abs()),
    "embedding": scale_embedding,
    "parametrized": lambda n: parametrize.register_parametrization(
        n.blocks[0].down, "weight", Twice()
    ),
    "weight norm": lambda n: parametrizations.weight_norm(n.blocks[0].qkv),
    "pruned": lambda n: prune.random_unstructured(n.blocks[0].qkv, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["rotary", "learned"])
@pytest.mark.parametrize("how", ALTERED)
def test_token_steps_call_what_was_altered(how, kind):
    """Adapters, hooks and the like act on every token, not on the prompt alone."""
    network, prompt = small(**{**KINDS[kind], "bias": False}), prompts(3)
    before = generate(network, prompt, 12, temperature=0)
    ALTERED[how](network)
    expected = slow(network, prompt, 12, temperature=0)
    assert torch.equal(generate(network, prompt, 12, temperature=0), expected)
    assert how == "weight norm" or not torch.equal(expected, before)
    with pytest.raises(ValueError, match="network must be plain for Int8Linear, but "):
        generate(network, prompt, 3, int8=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@torch.no_grad()
def test_quantized_layers_are_called():
    """They round by all that one call sees, so that whole runs differ: each layer, each token."""
    network, prompt = small(), prompts(3)
    run = {}
    for kind in ("plain", "quantized"):
        run[kind] = Decoder(
            network, prompt, torch.arange(3), 6, SamplingConfig(temperature=0), seed=0,
            index=torch.arange(3), rope=network.rope_table(torch.arange(10)),
        )  # fmt: skip
        torch.ao.quantization.quantize_dynamic(network, {torch.nn.Linear}, inplace=True)
    error = run["quantized"].first_logits - run["plain"].first_logits
    assert 0 < error.std() < 0.2 * run["plain"].first_logits.std()
    linear = type(network.blocks[0].up)
    with mock.patch.object(linear, "forward", autospec=True, side_effect=linear.forward) as called:
        run["quantized"].run()
    assert called.call_count == 5 * (4 * 2 + 1)


def test_token_steps_heed_the_hooks_of_all_modules():
    network, prompt, seen = small(), prompts(2), []
    before = generate(network, prompt, 6, temperature=0)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        assert torch.equal(generate(network, prompt, 6, temperature=0), before)
    finally:
        hook.remove()
    assert seen.count(network.head) == 6


@pytest.mark.parametrize(
    "alter, words",
    [
        (lambda n: n.register_forward_hook(lambda *_: None), "the network has a forward hook"),
        (lambda n: n.blocks[1].register_forward_pre_hook(lambda *_: None), "blocks.1 has a"),
        (lambda n: n.blocks.__setitem__(0, torch.nn.Sequential(n.blocks[0])), "blocks.0 is a"),
    ],
)
def test_blocks_that_no_step_calls(alter, words):
    network = small()
    alter(network)
    with pytest.raises(ValueError) as caught:
        generate(network, prompts(2), 3)
    assert "network must be plain" in str(caught.value) and words in str(caught.value)


def test_a_tensor_subclass_as_weight_is_called():
    network, prompt = small(), prompts(2)
    assert network.reads_tensors()
    weight = network.blocks[0].up.weight.detach().as_subclass(Marked)
    network.blocks[0].up.weight = torch.nn.Parameter(weight)
    assert not network.reads_tensors()
    expected = slow(network, prompt, 6, temperature=0)
    assert torch.equal(generate(network, prompt, 6, temperature=0), expected)


# Prompts of different lengths, and stop tokens ----------------------------------------------------
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_padded_prompts_are_continued_as_each_alone(kind, dtype, device):
    """To the bit: padding on the left, whatever stands there, is not there."""
    network = small(device, **KINDS[kind]).to(dtype)
    prompt = prompts(3, 7, device)
    mask = torch.tensor([[0] * (7 - size) + [1] * size for size in (7, 2, 5)], device=device)
    drawn = generate(network, prompt, 9, n=2, seed=5, attention_mask=mask)
    for row, size in enumerate((7, 2, 5)):
        index = torch.tensor([row], device=device)
        alone = generate(network, prompt[row : row + 1, 7 - size :], 9, n=2, seed=5, index=index)
        assert torch.equal(drawn[:, row], alone[:, 0])
    other = torch.where(mask == 0, 39 - prompt, prompt)
    same = generate(network, other, 9, n=2, seed=5, attention_mask=mask.bool())
    assert torch.equal(same, drawn)
    assert not torch.equal(generate(network, prompt, 9, n=2, seed=5)[:, 1], drawn[:, 1])


def test_a_mask_of_ones_changes_nothing():
    network, prompt = small(), prompts(2)
    drawn = generate(network, prompt, 9, seed=2)
    assert torch.equal(generate(network, prompt, 9, seed=2, attention_mask=prompt >= 0), drawn)
    empty = generate(network, prompt[:0], 4, attention_mask=prompt[:0])
    assert empty.shape == (0, 4)


@pytest.mark.parametrize("eos, pad", [(7, None), ([7, 3], None), ((7, 3), 1), ([], None)])
def test_rows_that_stopped_are_padded(eos, pad):
    network, prompt = small(), prompts(6)
    plain = generate(network, prompt, 30, seed=3)
    drawn = generate(network, prompt, 30, seed=3, eos_token_id=eos, pad_token_id=pad)
    stops = [eos] if isinstance(eos, int) else list(eos)
    ended = 0
    for row, before in zip(drawn.tolist(), plain.tolist(), strict=True):
        end = min((before.index(stop) for stop in stops if stop in before), default=29) + 1
        assert row[:end] == before[:end]
        assert row[end:] == [(stops or [0])[0] if pad is None else pad] * (30 - end)
        ended += end < 30
    assert ended if stops else ended == 0


def test_nothing_is_drawn_once_all_rows_have_stopped():
    network, prompt = small(), prompts(3)
    first = generate(network, prompt, 1, temperature=0)
    with mock.patch.object(Decoder, "_step", side_effect=AssertionError("a step was made")):
        drawn = generate(
            network, prompt, 20, temperature=0, eos_token_id=first.flatten().tolist(),
            pad_token_id=0,
        )  # fmt: skip
    assert torch.equal(drawn, torch.cat([first, torch.zeros(3, 19, dtype=torch.int64)], 1))


# Autocast, NaN, export ----------------------------------------------------------------------------
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_no_token(kind, device):
    network, prompt = small(device, **KINDS[kind]), prompts(3, device=device)
    expected = generate(network, prompt, 20, seed=1)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(generate(network, prompt, 20, seed=1), expected)
        assert torch.is_autocast_enabled(device)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_nan_have_no_token(kind):
    network, prompt = small(**KINDS[kind]), prompts(2)
    network.norm.weight.data[3] = torch.nan
    for options in ({}, {"temperature": 0}, {"top_k": 3}, {"int8": True}):
        assert generate(network, prompt, 5, **options).eq(-1).all()


@pytest.mark.parametrize("kind", ["rotary", "learned", "wide heads"])
def test_export_with_a_length_that_varies(kind):
    """From the length of the longest window on."""
    network, length = small(**KINDS[kind]), torch.export.Dim("length", min=5, max=60)
    program = torch.export.export(network, (prompts(2, 7),), dynamic_shapes=({1: length},))
    for size in (5, 31, 60):
        torch.testing.assert_close(program.module()(prompts(2, size)), network(prompts(2, size)))


@torch.no_grad()
def test_one_compiled_graph_for_all_lengths():
    network = small()
    compiled = torch.compile(network, backend="eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (7, 31, 60):
            expected = network(prompts(2, size))
            torch.testing.assert_close(compiled(prompts(2, size)), expected)


def test_export_with_a_batch_that_varies():
    network, rows = small(), torch.export.Dim("rows", min=2, max=9)
    program = torch.export.export(network, (prompts(2, 7),), dynamic_shapes=({0: rows},))
    torch.testing.assert_close(program.module()(prompts(5, 7)), network(prompts(5, 7)))
