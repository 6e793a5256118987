"""What images are compared by: functions of y (B, *event) in [-1, 1] that give features (B, d).

classifier   what the last layer of the shipped classifier sees, 648 numbers; 28 x 28, gray. It was
             trained on the shipped training images: real images that it never saw are a little
             apart from those for this reason alone.
pixels       the values of y themselves, of any shape
inception    what the last layer of Inception v3 sees, 2048 numbers, by torchmetrics (extra `eval`),
             which downloads its weights

Any object with these four members is an extractor. Distances of different extractors cannot be
compared; the fingerprint says which one it was.
"""

import zlib
from typing import Any, Protocol

import torch
from torch import Tensor

from cgkernels.checks import check_choice
from cgm.evaluation.classifier import load_classifier

FEATURES = ("classifier", "pixels", "inception")


class Extractor(Protocol):
    """A function of images that gives their features."""

    name: str
    fingerprint: str  # of its weights

    def __call__(self, y: Tensor) -> Tensor:
        """(B, d), floating, of y (B, *event) in [-1, 1]; a row depends on its image alone."""

    def probabilities(self, features: Tensor) -> Tensor | None:
        """(B, classes) of features (B, d); None if it knows no classes."""


def load_features(
    name: str | None, event_shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Extractor:
    """One of FEATURES; None is the classifier for images that fit it, and pixels for others.

    Raises:
        ValueError: name is none of them, does not fit the shape, or is not installed.
    """
    shape = load_classifier().config.event_shape
    if name is None:
        name = "classifier" if tuple(event_shape) == shape else "pixels"
    check_choice("features", name, FEATURES)
    if name == "pixels":
        return Pixels()
    if name == "classifier":
        if tuple(event_shape) != shape:
            raise ValueError(f"features must be pixels for y {event_shape}: classifier is {shape}")
        return ClassifierFeatures()
    if len(event_shape) != 3 or event_shape[0] not in (1, 3):
        raise ValueError(f"features must be pixels for y {event_shape}: inception is (3, H, W)")
    return InceptionFeatures(device)


class Pixels:
    """The values of y."""

    name = fingerprint = "pixels"

    def __call__(self, y: Tensor) -> Tensor:
        return y.flatten(1)

    def probabilities(self, features: Tensor) -> None:
        return None


class ClassifierFeatures:
    """Of the shipped classifier, on the CPU."""

    name = "classifier"

    def __init__(self) -> None:
        self._model = load_classifier()
        self.fingerprint = _fingerprint(self._model)

    @torch.no_grad()
    def __call__(self, y: Tensor) -> Tensor:
        return self._model.features(y.to("cpu", torch.float32))

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> Tensor:
        return self._model.head(features).softmax(1)


class InceptionFeatures:
    """Of the Inception v3 that published figures of FID are made with, as torchmetrics has it.

    Images are rounded to 256 levels; gray ones are given to all three channels. Class
    probabilities are those without the last layer's bias, as the Inception score takes them.
    """

    name = "inception"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            self._network: Any = NoTrainInceptionV3("inception-v3-compat", ["2048"]).to(device)
        except ModuleNotFoundError as error:
            raise ValueError(
                "features must be classifier or pixels: inception needs torchmetrics[image], "
                "pip install 'cgkernels[eval]'"
            ) from error
        except OSError as error:
            raise OSError(f"the weights of inception could not be downloaded: {error}") from error
        self._device = device
        self.fingerprint = _fingerprint(self._network)

    @torch.no_grad()
    def __call__(self, y: Tensor) -> Tensor:
        levels = ((y.to(self._device).float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return self._network(levels.expand(-1, 3, -1, -1))

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> Tensor:
        return (features @ self._network.fc.weight.T).softmax(1)


def _fingerprint(network: torch.nn.Module) -> str:
    """CRC-32 of the weights."""
    crc = 0
    for name, tensor in sorted(network.state_dict().items()):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
