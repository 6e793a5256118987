"""What all families have in common: one protocol, and wrong arguments refused in the same words."""

import math

import pytest
import torch

from cgm.model import FAMILIES, Model, config_class, family_class, make_model

SIDES = (8, 8)
SMALL = {
    "autoencoder": {"width": 4, "depth": 1, "latents": 2},
    "autoregressive": {"levels": 4, "depth": 1, "width": 8, "heads": 1, "hidden": 8},
    "classifier": {"width": (8,), "pools": 1},
    "cyclegan": {"generator": "unet", "depth": 2, "width": 4, "discriminator_width": 4, "patch": 1},
    "diffusion": {"width": 8, "width_multipliers": (1,), "blocks": 1, "heads": 2},
    "energy": {"width": 4, "depth": 1, "hidden": 4, "chain_steps": 1, "chains": 4},
    "flow": {"steps": (1,), "width": 4, "depth": 1},
    "gan": {"width": 4, "depth": 1, "latents": 2, "discriminator_width": 4, "patch": 1},
    "gaussian_regression": {"width": 4, "depth": 1},
    "least_squares": {"width": 4, "depth": 1, "sigma": 0.5},
    "mixture_density": {"width": 4, "depth": 1, "components": 2},
    "pix2pix": {"depth": 2, "width": 4, "discriminator_width": 4, "patch": 1, "dropout": False},
    "quantized_classifier": {"width": 4, "depth": 1, "levels": 4},
    "vae": {"width": 4, "depth": 1, "latents": 2},
}
TRANSLATING = ("cyclegan", "pix2pix")
# Options of `sample` for less work.
STEPS = {"diffusion": {"steps": 2}, "energy": {"steps": 2}}

images = torch.rand(2, 1, *SIDES, generator=torch.Generator().manual_seed(0)) * 2 - 1
classes = torch.tensor([0, 2])
tokens = torch.tensor([[0, 1, 2], [2, 2, 0]])


def with_value(image: torch.Tensor, value: float) -> torch.Tensor:
    return image.clone().index_put_((torch.tensor(1), *[torch.tensor(0)] * 3), torch.tensor(value))


WRONG_IMAGES = [
    ("NaN", with_value(images, math.nan), ValueError, "must be finite, got values that are not"),
    ("inf", with_value(images, math.inf), ValueError, "must be finite, got values that are not"),
    ("no rows", torch.tensor(0.0), ValueError, "must have a row for each example, got a tensor"),
    ("channels", images.repeat(1, 2, 1, 1), ValueError, r"must have shape \(2, 1, 8, 8\), got"),
    ("sides", images[..., 1:], ValueError, r"must have shape \(2, 1, 8, 8\), got \(2, 1, 8, 7\)"),
    ("bytes", images.byte(), TypeError, r"must be floating, torch\.float32 .* got torch\.uint8"),
    ("float64", images.double(), TypeError, r"must be floating, torch\.float32 .* torch\.float64"),
    ("half", images.half(), TypeError, r"must be floating, torch\.float32 .* got torch\.float16"),
    ("list", images.tolist(), TypeError, "must be a tensor, got list"),
    ("array", images.numpy(), TypeError, "must be a tensor, got ndarray"),
    ("number", 3, TypeError, "must be a tensor, got int"),
    ("device", images.to("meta"), ValueError, "must be on cpu as the model is, got meta"),
    ("-inf", with_value(images, -math.inf), ValueError, "must be finite, got values that are not"),
    ("one row less", images[0], ValueError, r"must have shape \([12], 1, 8, 8\), got \(1, 8, 8\)"),
    ("channels last", images.movedim(1, 3), ValueError, r"must have .* \(B, C, H, W\), got"),
    ("8 bits", (images + 1) * 127.5, ValueError, r"must be in \[-1, 1\], got .* / 127\.5 - 1"),
]
WRONG_IDS = [
    ("floats", lambda ids: ids.float(), TypeError, r"must be int64 ids, got torch\.float32"),
    ("int32", lambda ids: ids.int(), TypeError, r"must be int64 ids, got torch\.int32"),
    ("range", lambda ids: ids + 2, ValueError, r"must be in \[0, [23]\], got 2 to 4"),
    ("negative", lambda ids: ids - 1, ValueError, r"must be in \[0, [23]\], got -1 to 1"),
    ("shape", lambda ids: ids[..., None], ValueError, "must have shape .*, got"),
    ("list", lambda ids: ids.tolist(), TypeError, "must be a tensor, got list"),
    ("array", lambda ids: ids.numpy(), TypeError, "must be a tensor, got ndarray"),
    ("number", lambda ids: 3, TypeError, "must be a tensor, got int"),
    ("bool", lambda ids: ids > 0, TypeError, r"must be int64 ids, got torch\.bool"),
    ("no rows", lambda ids: ids.sum(), ValueError, "must have a row for each example, got"),
    ("device", lambda ids: ids.to("meta"), ValueError, "must be on cpu as the model is, got meta"),
]
CONDS = {"none": None, "class": classes, "image": images, "tokens": tokens}


def kinds_of(family: str) -> list[str]:
    if family in TRANSLATING:
        return ["image"]
    if family == "classifier":
        return ["class"]
    tokens_too = ["tokens"] if family in ("autoregressive", "diffusion") else []
    return ["none", "class", "image", *tokens_too]


def made(family: str, kind: str) -> Model:
    of_kind = {
        "none": {},
        "class": {"num_classes": 3},
        "image": {"cond_shape": (1, *SIDES)},
        "tokens": {"num_classes": 3, "cond_shape": (3,)},
    }[kind]
    cls = family_class(family)
    config = config_class(cls)(event_shape=(1, *SIDES), cond_kind=kind, **of_kind, **SMALL[family])
    return make_model(cls, config).eval()


def calls(model: Model):
    """Everything that takes y and cond, by name."""
    for phase in model.phases:
        yield "loss", lambda y, cond, phase=phase: model.loss(y, cond=cond, phase=phase, seed=0)
    for name in ("log_prob", "elbo", "energy", "bits_per_dimension", "log_density", "encode"):
        if has_method(model, name):
            yield name, lambda y, cond, name=name: getattr(model, name)(y, cond=cond)


def has_method(model: Model, name: str) -> bool:
    """Whether it answers: what a family has not is a NotImplementedError."""
    try:
        getattr(model, name)(images, cond=CONDS[model.config.cond_kind])
    except (NotImplementedError, AttributeError):
        return False
    return True


every = pytest.mark.parametrize(
    ("family", "kind"), [(family, kind) for family in FAMILIES for kind in kinds_of(family)]
)


@every
def test_a_wrong_y_is_refused_in_the_same_words(family, kind):
    model, cond = made(family, kind), CONDS[kind]
    for _, call in calls(model):
        for _, y, error, words in [*WRONG_IMAGES, ("None", None, TypeError, "must be a tensor")]:
            with pytest.raises(error, match=f"^y {words}"):
                call(y, cond)


@every
def test_a_wrong_cond_is_refused_in_the_same_words(family, kind):
    model, cond = made(family, kind), CONDS[kind]
    of_cond = []
    if model.sampling_config is not None:
        of_cond.append(lambda _, cond: model.sample(cond=cond, **STEPS.get(family, {})))
    if hasattr(model, "predict"):
        of_cond.append(lambda _, cond: model.predict(cond=cond))
    of_both = [call for _, call in calls(model)]
    if kind == "none":
        for call in of_both + of_cond:
            with pytest.raises(TypeError, match=r"^cond must be None: this model has no condition"):
                call(images, classes)
        return
    wrong = WRONG_IMAGES
    if kind != "image":
        wrong = [(name, change(cond), error, words) for name, change, error, words in WRONG_IDS]
    for call in of_both + of_cond:
        for _, value, error, words in wrong:
            with pytest.raises(error, match=f"^cond {words}"):
                call(images, value)
        if model.config.cond_dropout == 0:
            with pytest.raises(ValueError, match=r"^cond must be given"):
                call(images, None)
    for call in of_both:
        with pytest.raises(ValueError, match=r"^cond must have shape \(2,.*got \(1,"):
            call(images, cond[:1])


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_numbers_and_options_of_sample(family):
    model = made(family, kinds_of(family)[-1] if family in TRANSLATING else "class")
    cond = CONDS[model.config.cond_kind]
    if model.sampling_config is None:
        with pytest.raises(NotImplementedError, match="has no sample; it has"):
            model.sample(cond=cond)
        return
    for n in (-1, 1.0, True, "2"):
        with pytest.raises(ValueError, match=r"^n must be None or an int of at least 0, got"):
            model.sample(n, cond=cond)
    for index in ([0, 1], torch.tensor([0, 1], dtype=torch.int32), torch.zeros(2)):
        with pytest.raises(TypeError, match=r"^index must be an int64 tensor, got"):
            model.sample(cond=cond, index=index)
    with pytest.raises(ValueError, match=r"^index must have shape \(2,\), got \(3,\)"):
        model.sample(cond=cond, index=torch.arange(3))
    with pytest.raises(TypeError, match=r"^wrong is no option of sample; it has "):
        model.sample(cond=cond, wrong=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_numbers_of_loss(family):
    model = made(family, kinds_of(family)[-1])
    cond, zeros = CONDS[model.config.cond_kind], torch.zeros(2, dtype=torch.int64)
    wrong = [
        ({"phase": "other"}, ValueError, "phase must be one of"),
        ({"phase": 1}, ValueError, "phase must be one of"),
        ({"seed": None}, TypeError, "seed must be an int or a one-element int64 tensor"),
        ({"seed": 0.5}, TypeError, "seed must be an int or a one-element int64 tensor"),
        ({"seed": True}, TypeError, "seed must be an int or a one-element int64 tensor"),
        ({"seed": 2**64}, ValueError, "seed must fit in 64 bits"),
        ({"seed": zeros}, ValueError, "seed must be an int or a one-element int64 tensor"),
        ({"index": [0, 1]}, TypeError, "index must be an int64 tensor, got list"),
        ({"index": zeros.float()}, TypeError, r"index must be an int64 tensor, got torch\.float32"),
        ({"index": zeros[:1]}, ValueError, r"index must have shape \(2,\), got \(1,\)"),
        ({"shared": []}, TypeError, "shared must be a dict"),
    ]
    for arguments, error, words in wrong:
        with pytest.raises(error, match=f"^{words}"):
            model.loss(images, **{"cond": cond, "seed": 0, **arguments})


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_seeds_and_numbers_of_draws(family):
    model = made(family, kinds_of(family)[-1])
    cond, options = CONDS[model.config.cond_kind], STEPS.get(family, {})
    if model.sampling_config is None:
        return
    for seed, error in (
        (None, TypeError),
        (0.5, TypeError),
        (True, TypeError),
        (2**64, ValueError),
    ):
        with pytest.raises(error, match=r"^seed must "):
            model.sample(cond=cond, seed=seed)
    with pytest.raises(ValueError, match=r"^n must be below 2\^31"):
        model.sample(2**31, cond=cond)
    with pytest.raises(ValueError, match=r"^index must be at most 9223372032559808511 for 2 draws"):
        model.sample(2, cond=cond, index=torch.tensor([2**63 - 1, 0]))
    # Draw 1 of a condition has its number + 2^32.
    index = torch.tensor([7, 2**33])
    two, second = (
        model.sample(2, cond=cond, index=index, **options),
        model.sample(cond=cond, index=index + 2**32, **options),
    )
    torch.testing.assert_close(two[1], second, rtol=1e-4, atol=1e-5)
    # Alone, as many numbers as there are: each condition its own.
    assert model.sample(cond=cond, index=torch.tensor([-1, 2**63 - 1]), **options).isfinite().all()


@pytest.mark.parametrize("family", ["autoregressive", "diffusion"])
@pytest.mark.parametrize("kind", ["class", "image", "tokens"])
def test_each_condition_may_have_its_own_guidance(family, kind):
    model, cond, options = made(family, kind), CONDS[kind], STEPS.get(family, {})
    scales = torch.tensor([3.0, 1.0])
    both = model.sample(2, cond=cond, guidance=scales, **options)
    for row, scale in enumerate((3.0, 1.0)):
        alone = model.sample(2, cond=cond, guidance=scale, **options)
        torch.testing.assert_close(both[:, row], alone[:, row], rtol=1e-4, atol=1e-5)
    one = model.sample(cond=cond, guidance=torch.tensor(3.0), **options)
    assert torch.equal(one, model.sample(cond=cond, guidance=3.0, **options))
    for guidance, error, words in (
        (scales[:1], ValueError, r"must have shape \(2,\), got \(1,\)"),
        (scales[:, None], ValueError, r"must have shape \(2,\), got \(2, 1\)"),
        (scales.long(), TypeError, "must be a number or a floating tensor, got torch.int64"),
        (scales * math.nan, ValueError, "must be finite"),
        (scales.to("meta"), ValueError, "must be on cpu, got meta"),
    ):
        with pytest.raises(error, match=f"^guidance {words}"):
            model.sample(cond=cond, guidance=guidance, **options)
    with pytest.raises(ValueError, match=r"^guidance must be 1 without cond"):
        model.sample(2, guidance=scales, **options)


def test_guidance_of_a_family_without_it_is_no_option():
    with pytest.raises(TypeError, match=r"^guidance is no option of sample"):
        made("gan", "class").sample(cond=classes, guidance=torch.ones(2))


@every
def test_the_shapes_of_samples(family, kind):
    model, cond, options = made(family, kind), CONDS[kind], STEPS.get(family, {})
    if model.sampling_config is None:
        return
    event = model.config.event_shape
    if cond is None:
        with pytest.raises(ValueError, match=r"^n must be given without cond"):
            model.sample()
        assert model.sample(3, **options).shape == (3, *event)
        assert model.sample(0, **options).shape == (0, *event)
        return
    assert model.sample(cond=cond, **options).shape == (2, *event)
    assert model.sample(3, cond=cond, **options).shape == (3, 2, *event)
    assert model.sample(0, cond=cond, **options).shape == (0, 2, *event)
    assert model.sample(3, cond=cond[:0], **options).shape == (3, 0, *event)


@every
def test_what_a_model_says_of_its_density_is_what_it_has(family, kind):
    model = made(family, kind)
    named = {"exact": "log_prob", "bound": "elbo", "energy": "energy", None: None}[model.density]
    has = [name for name in ("log_prob", "elbo", "energy") if has_method(model, name)]
    assert named in has if named else not has
    assert has_method(model, "log_density") == (named is not None)
    assert model.has_int8 == (type(model).int8 is not Model.int8)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_no_rows_there_are_no_losses(family):
    """Nor densities; the gradients are zero."""
    for kind in kinds_of(family):
        model, cond = made(family, kind), CONDS[kind]
        cond = None if cond is None else cond[:0]
        y = images[:0]
        for phase in model.phases:
            total = model.loss(y, cond=cond, phase=phase, seed=0)["total"]
            assert total.shape == (0,)
            model.zero_grad()
            total.sum().backward()
            for parameter in model.parameters():
                assert parameter.grad is None or not parameter.grad.any()
        if model.density is not None:
            assert model.log_density(y, cond=cond).shape == (0,)
