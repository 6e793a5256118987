"""The decoding loop: tokens are those of whole runs, whatever the batch, cache and prefix."""

import copy
import pickle
from unittest import mock

import pytest
import torch
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
@pytest.mark.parametrize("kind", KINDS)
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
        ({}, {"guidance": 2.0}, ValueError, "guidance must be 1"),
        ({}, {"beams": 4}, TypeError, "beams is no option of sample"),
        ({}, {"temperature": -1.0}, ValueError, "temperature must be in"),
        ({}, {"top_k": -1}, ValueError, "top_k must be in"),
        ({}, {"index": torch.arange(3)}, ValueError, "index must have shape (2,)"),
        ({"outputs": 7}, {}, ValueError, "network must put out its 40 tokens, got 7"),
    ],
)
def test_wrong_arguments(changes, arguments, error, words):
    given = {"prompt": prompts(2), "length": 3, **arguments}
    with pytest.raises(error) as caught:
        generate(small(**changes), **given)
    assert words in str(caught.value)
