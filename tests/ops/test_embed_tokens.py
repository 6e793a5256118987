"""embed_tokens: the embedding of each row's newest token, in one launch."""

from collections.abc import Iterator

import pytest
import torch

from cgkernels.library import OPS
from cgkernels.ops import embed_tokens as op
from cgkernels.ops.embed_tokens import embed_tokens
from cgkernels.testing import assert_within_budget, plain_and_modeled
from tests.support import (
    FLOATS,
    KERNEL_DEVICES,
    OpCall,
    Sample,
    assert_equal,
    assert_refused,
    kernel_results,
    normals,
)

LAUNCHERS = {"embed_tokens": op._launch}


def make_inputs(rows=3, columns=7, width=40, *, copies=1, dtype=torch.float32, device="cpu"):
    """Of all options; every row has its own position."""
    generator = torch.Generator().manual_seed(rows)

    def integers(high, *shape):
        return torch.randint(high, shape, generator=generator).to(device)

    return {
        "tokens": integers(11, rows, columns), "position": integers(columns, copies * rows),
        "embedding": normals(16, width, dtype=dtype, device=device),
        "offsets": integers(5, columns),
        "places": normals(columns + 2, width, dtype=dtype, device=device, seed=1),
    }  # fmt: skip


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def sample(label, inputs):
        tables = tuple(name for name in ("embedding", "places") if name in inputs)
        own = len(inputs["tokens"]) == len(inputs["position"])
        return Sample(label, embed_tokens, inputs, tables, ("tokens", "position") if own else ())

    def made(*left_out, **how):
        inputs = make_inputs(dtype=dtype, device=device, **how)
        return {name: value for name, value in inputs.items() if name not in left_out}

    yield sample("everything", made())
    yield sample("two rows each", made("places", copies=2))
    yield sample("learned positions", made("offsets", width=33))
    same = made("places")
    yield sample("one position", {**same, "position": torch.full_like(same["position"], 4)})
    views = made(width=20)
    views |= {name: views[name].t().contiguous().t() for name in ("embedding", "places")}
    views["offsets"] = views["offsets"][:1].expand(7)
    yield sample("views", views)
    yield sample("empty batch", made("offsets", rows=0))
    yield sample("no width", made(width=0))


def expected(tokens, position, embedding, offsets=None, places=None):
    """One row after another."""
    out = []
    for r, p in enumerate(position.tolist()):
        token = tokens[r % len(tokens), p] + (0 if offsets is None else offsets[p])
        out.append(embedding[token] + (0 if places is None else places[p]))
    return torch.stack(out)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("same", [False, True], ids=["own positions", "one position"])
@pytest.mark.parametrize("left_out", [(), ("places",), ("offsets",), ("offsets", "places")])
def test_it_is_what_indexing_gives(left_out, same, dtype):
    for copies in (1, 3):
        inputs = make_inputs(copies=copies, dtype=dtype)
        inputs |= dict.fromkeys(left_out)
        if same:
            inputs["position"].fill_(6)
        assert_equal(embed_tokens(**inputs), expected(**inputs))


def test_tokens_that_repeat_add_their_gradients():
    inputs = make_inputs(rows=40, columns=2, dtype=torch.bfloat16)
    dout = normals(40, 40, dtype=torch.bfloat16, seed=5)

    def gradients(function, dtype):
        leaves = {n: inputs[n].to(dtype).requires_grad_() for n in ("embedding", "places")}
        out = function(**{**inputs, **leaves})
        return torch.autograd.grad(out, [*leaves.values()], dout.to(dtype))

    exact = gradients(expected, torch.float64)
    plain, modeled = plain_and_modeled(lambda: gradients(expected, torch.bfloat16))
    for ours, same, true, model in zip(
        gradients(embed_tokens, torch.bfloat16), plain, exact, modeled, strict=True
    ):  # fmt: skip
        assert_within_budget(ours, same, true, model)


def call_of(inputs, device="cpu"):
    names = ("tokens", "position", "embedding", "offsets", "places")
    call = OpCall(OPS["embed_tokens"], tuple(inputs[name] for name in names))
    return call.map(lambda t: t.to(device))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("width", [1, 127, 129, 1030])
def test_widths_around_a_block(width, device):
    inputs = make_inputs(width=width, copies=2, dtype=torch.bfloat16)
    (out,) = kernel_results(call_of(inputs, device), order_seed=width)
    assert_equal(out.cpu(), expected(**inputs))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_what_is_not_in_the_tables_is_not_a_number(device):
    """A token or position outside; on the CPU as on a GPU, and other rows as they are."""
    inputs = make_inputs(6)
    inputs["position"][:3] = torch.tensor([-1, 7, 2**40])
    inputs["tokens"][3] = -20
    inputs["tokens"][4] = 2**40
    call = call_of(inputs, device)
    last = {name: inputs[name][5:] for name in ("tokens", "position")}
    for (out,) in (kernel_results(call), call.map(torch.Tensor.cpu).run()):
        assert out[:5].isnan().all()
        assert_equal(out[5:].cpu(), expected(**{**inputs, **last}))
    short = {**inputs, "places": inputs["places"][:2], "position": torch.full((6,), 2)}
    (out,) = kernel_results(call_of(short, device))
    assert out.isnan().all()


def test_a_token_outside_the_embedding_is_not_a_number():
    inputs = make_inputs(3)
    inputs["tokens"][1] = -9
    for position in (torch.tensor([2, 2, 2]), torch.tensor([1, 2, 3])):
        out = embed_tokens(**{**inputs, "position": position})
        assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


WRONG = [
    (TypeError, ("tokens", "float32"), {"tokens": torch.zeros(3, 7)}),
    (TypeError, ("tokens", "list"), {"tokens": [1]}),
    (ValueError, ("tokens", "(B, N > 0)", "(3,)"), {"tokens": torch.zeros(3).long()}),
    (ValueError, ("tokens", "(3, 0)"), {"tokens": torch.zeros(3, 0).long()}),
    (ValueError, ("tokens", "cpu", "meta"), {"tokens": torch.zeros(3, 7).long().to("meta")}),
    (TypeError, ("position", "NoneType"), {"position": None}),
    (TypeError, ("position", "float32"), {"position": torch.zeros(3)}),
    (ValueError, ("position", "multiple of 3", "4"), {"position": torch.zeros(4).long()}),
    (ValueError, ("position", "(3,)", "(3, 1)"), {"position": torch.zeros(3, 1).long()}),
    (ValueError, ("position", "[0, 6]", "7"), {"position": torch.tensor([0, 7, 1])}),
    (ValueError, ("position", "[0, 1]"), {"position": torch.tensor([0, 2, 1]),
                                          "places": torch.zeros(2, 40)}),
    (TypeError, ("embedding", "int64"), {"embedding": torch.zeros(4, 40).long()}),
    (ValueError, ("embedding", "(V > 0, W)", "(40,)"), {"embedding": torch.zeros(40)}),
    (ValueError, ("embedding", "(0, 40)"), {"embedding": torch.zeros(0, 40)}),
    (ValueError, ("places", "(P > 0, 40)", "(9, 41)"), {"places": torch.zeros(9, 41)}),
    (ValueError, ("places", "(0, 40)"), {"places": torch.zeros(0, 40)}),
    (TypeError, ("places", "float32", "float16"), {"places": torch.zeros(9, 40).half()}),
    (TypeError, ("offsets", "int32"), {"offsets": torch.zeros(7).int()}),
    (ValueError, ("offsets", "(7,)", "(6,)"), {"offsets": torch.zeros(6).long()}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "words", "changed"), WRONG)
def test_wrong_arguments(error, words, changed):
    call = Sample("wrong", embed_tokens, make_inputs())
    assert_refused(call.replace(**changed), error, *words)
