"""Every file in examples/ runs, is short, and prints what its docstring says."""

import importlib.util
import pathlib

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
CHECKED = {}


def load(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def checks(function):
    """Marks the test of the example that it is named after."""
    CHECKED[function.__name__.removeprefix("test_")] = function
    return function


def test_every_example_has_a_test():
    assert sorted(CHECKED) == sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_an_example_is_short_and_says_what_it_prints(name):
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) < 150
    module = load(name)
    assert "Prints" in module.__doc__ and module.main.__doc__


@checks
def test_ddim_step(capsys):
    found = load("ddim_step").main(rows=32, steps=250)
    assert found["true mean"] == 3.0
    assert abs(found["mean"] - found["true mean"]) < 0.03
    assert abs(found["std"] - found["true std"]) < 0.03
    assert found["largest difference"] < 1e-4
    assert found["alone as in the batch"]
    assert f"mean {found['mean']:.3f}, true 3.000" in capsys.readouterr().out


@pytest.mark.parametrize(("guidance", "eta"), [(1.0, 0.0), (3.0, 0.5)])
def test_ddim_step_of_other_options(guidance, eta):
    found = load("ddim_step").main(rows=16, steps=100, guidance=guidance, eta=eta)
    assert abs(found["mean"] - 2 * guidance) < 0.05
    assert abs(found["std"] - 0.5) < 0.05
    assert found["largest difference"] < 1e-4


@checks
def test_patchgan_step(capsys):
    found = load("patchgan_step").main(steps=60)
    assert found["loss difference"] < 1e-5
    assert found["gradient difference"] < 1e-4
    assert found["last loss"] < 0.5 and found["accuracy"] > 0.95
    assert f"told rightly: {found['accuracy']:.1%}" in capsys.readouterr().out


@checks
def test_small_gpt(capsys):
    found = load("small_gpt").main(steps=80, count=40)
    assert found["last loss"] < 0.3
    assert found["difference"] < 1e-4
    assert len(found["texts"]) == 4 and len(set(found["texts"])) > 1
    printed = capsys.readouterr().out
    for text in found["texts"]:
        assert len(text) == len("this is the ") + 40 and repr(text) in printed
        assert text[len("this is the ") :].startswith(("house", "malt", "rat", "cat"))


@checks
def test_train_and_score(capsys):
    found = load("train_and_score").main(steps=500)
    good, bad = found["autoregressive"], found["mixture_density"]
    assert good["p-value"] > 0.05 > bad["p-value"]
    assert good["on a Gaussian"] > 0.9 > 0.7 > bad["on a Gaussian"]
    assert capsys.readouterr().out.startswith("autoregressive: p-value 0.")
