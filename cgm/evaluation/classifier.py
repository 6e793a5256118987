"""A small convolutional classifier of images: what generated images are judged by.

    p(class | image) = softmax(linear(pool(blocks(image))))
    block = silu(group_norm(max_pool(conv 3 x 3))), the later ones without max_pool

It is trained like a model of the class given the image: y is the image, cond its class.

`python -m cgm.evaluation.classifier FOLDER` makes the shipped one: it trains for some minutes on
one core and writes the checkpoint that ships as cgm/data/checkpoints/fashion_classifier.
"""

import dataclasses
import functools
import itertools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cgkernels.random import STREAM_AUGMENTATION, uniform
from cgkernels.rows import compute_dtype
from cgm.checkpoints import load_model, save_model, shipped
from cgm.data import load_task
from cgm.data.dataset import to_float
from cgm.model import Count, ImageConfig, Interval, Model, Natural, Step, make_model
from cgm.training import TrainingConfig, describe_data, train

CHECKPOINT = "fashion_classifier"
RECIPE = TrainingConfig(
    steps=3000,
    batch_size=64,
    learning_rate=3e-3,
    warmup=100,
    weight_decay=0.05,
    ema_decay=0.995,
    save_every=3000,
    log_every=100,
    threads=1,
)


@dataclass(frozen=True)
class ClassifierConfig(ImageConfig):
    """Size of the network, and what it is trained with."""

    # What it learns is the class given the image: the class is its condition.
    cond_kind: Literal["class"] = "class"
    # Number of classes.
    num_classes: Natural = 10
    # Channels of each block, multiples of 8.
    width: tuple[Count, ...] = (24, 48, 72, 72)
    # Number of blocks, from the first, that halve the resolution.
    pools: Natural = 2
    # Side of the grid that the last features are averaged to.
    grid: Count = 3
    # Share of the target that is spread over all classes.
    label_smoothing: Annotated[float, Interval(0, 1)] = 0.1
    # Training images are shifted by up to this many pixels each way.
    shift: Natural = 1
    # Training images are mirrored with probability one half.
    mirror: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.width or any(channels % 8 for channels in self.width):
            raise ValueError(f"width must be multiples of 8, one a block, got {self.width}")


class Classifier(Model):
    """Logits (B, num_classes) of images (B, C, H, W) in [-1, 1]."""

    family: ClassVar[str] = "classifier"

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        widths = (config.event_shape[0], *config.width)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, padding=1, bias=False),
                    nn.MaxPool2d(2) if number <= config.pools else nn.Identity(),
                    nn.GroupNorm(8, after),
                    nn.SiLU(),
                )
                for number, (before, after) in enumerate(itertools.pairwise(widths), 1)
            )
        )
        self.head = nn.Linear(config.width[-1] * config.grid**2, config.num_classes)

    def forward(self, y: Tensor) -> Tensor:  # type: ignore[override]
        """Logits (B, num_classes), in the place of a loss."""
        return self.head(self.features(y))

    def features(self, y: Tensor) -> Tensor:
        """What the last layer sees, (B, width[-1] grid^2)."""
        return F.adaptive_avg_pool2d(self.blocks(y), self.config.grid).flatten(1)

    def _loss(self, y: Tensor, cond: Tensor | None, step: Step) -> dict[str, Tensor]:
        """{"total": cross entropy with smoothed labels, "error": 0 or 1}."""
        assert cond is not None  # it was checked
        config = self.config
        logits = self(self._augment(y, step.seed, step.index))
        total = F.cross_entropy(
            logits.to(compute_dtype(logits)),
            cond,
            label_smoothing=config.label_smoothing,
            reduction="none",
        )
        return {"total": total, "error": (logits.detach().argmax(1) != cond).float()}

    def _augment(self, y: Tensor, seed: int | Tensor, index: Tensor) -> Tensor:
        """Shifted and mirrored images; the border is filled with -1, black."""
        n, _, height, width = y.shape
        reach = self.config.shift
        u = uniform(
            (n, 3),
            seed=seed,
            index=index,
            step=0,
            stream=STREAM_AUGMENTATION,
            dtype=torch.float32,
            device=y.device,
        )
        down, right = (u[:, :2, None] * (2 * reach + 1)).long().unbind(1)
        rows = torch.arange(height, device=y.device) + down
        columns = torch.arange(width, device=y.device) + right
        if self.config.mirror:
            columns = torch.where(u[:, 2:] < 0.5, columns.flip(1), columns)
        padded = F.pad(y, (reach,) * 4, value=-1.0)
        picked = padded.gather(
            2, rows[:, None, :, None].expand(-1, y.shape[1], -1, padded.shape[3])
        )
        return picked.gather(3, columns[:, None, None, :].expand(-1, y.shape[1], height, -1))


# The shipped classifier ---------------------------------------------------------------------------
@functools.cache
def load_classifier() -> Classifier:
    """The shipped classifier of the ten classes of clothes, on the CPU."""
    model = load_model(shipped(CHECKPOINT), expected_family=Classifier.family)
    assert isinstance(model, Classifier)
    return model


@torch.no_grad()
def class_accuracy(images: Tensor, labels: Tensor) -> float:
    """Share of images (N, 1, 28, 28), uint8 or in [-1, 1], that are put in class labels (N,)."""
    model = load_classifier()
    shape = (len(labels), *model.config.event_shape)
    if images.shape != shape or len(labels) == 0:
        raise ValueError(f"images must be {shape} with N > 0, got {tuple(images.shape)}")
    images = to_float(images).to("cpu", torch.float32)
    right = [
        model(part).argmax(1) == truth
        for part, truth in zip(images.split(500), labels.cpu().split(500), strict=True)
    ]
    return torch.cat(right).double().mean().item()


@functools.cache
def held_out_accuracy() -> float:
    """`class_accuracy` of the 1,000 real images that no model is trained on, to compare with."""
    dataset = load_task("class_to_image", "test")
    assert dataset.cond is not None
    return class_accuracy(dataset.y, dataset.cond)


def train_classifier(out: str | Path, config: TrainingConfig = RECIPE) -> None:
    """Trains the classifier on the 9,000 training images; writes its checkpoint in float16."""
    dataset = load_task("class_to_image")
    model = make_model(Classifier, ClassifierConfig(), seed=config.seed)
    with tempfile.TemporaryDirectory() as folder:
        average = train(model, dataset, config, folder)
    metadata = {"data": describe_data(dataset), "training": dataclasses.asdict(config)}
    save_model(out, average, metadata, dtype=torch.float16)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m cgm.evaluation.classifier FOLDER")
    train_classifier(sys.argv[1])
