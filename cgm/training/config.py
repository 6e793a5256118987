"""How a model is trained, and the course of the learning rate."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from cgm.model import Config, Count, Interval, Natural, NotNegative, Positive, Share

MOST_THREADS = 1024  # more than any machine's; OpenMP ends the process where it cannot have them


@dataclass(frozen=True)
class TrainingConfig(Config):
    """How a model is trained."""

    # Number of steps; a resumed run may have another one.
    steps: Count = 10_000
    # Examples a step.
    batch_size: Count = 128
    # Learning rate of AdamW at its highest.
    learning_rate: Positive = 1e-3
    # Steps over which the learning rate rises from 0.
    warmup: Natural = 200
    # Course of the learning rate after that: to 0 at the last step (late_linear: from half of the
    # steps on, as GANs are trained), or none.
    decay: Literal["cosine", "linear", "late_linear", "constant"] = "cosine"
    # Decay of the mean of the gradient (Adam's beta 1).
    beta1: Share = 0.9
    # Decay of the mean of its square (Adam's beta 2).
    beta2: Share = 0.999
    # Weight decay of matrices and convolutions; biases and scales have none.
    weight_decay: NotNegative = 0.0
    # Largest norm of the gradient of a phase; inf for no clipping.
    gradient_clip: Annotated[float, Interval(0, math.inf, "(]")] = 1.0
    # Decay of the average of the weights; 0 for the weights themselves.
    ema_decay: Share = 0.999
    # Seed of initial weights, order and noise.
    seed: Annotated[int, Interval(-(2**63), 2**64 - 1)] = 0
    # Arithmetic of the network; bfloat16 is autocast, the weights stay float32.
    precision: Literal["float32", "bfloat16"] = "float32"
    # Steps from one checkpoint to the next.
    save_every: Count = 1000
    # Steps from one line of the log to the next.
    log_every: Count = 50
    # Steps from one sheet of samples to the next; 0: none.
    sheet_every: Natural = 0
    # Threads of PyTorch on a CPU, 0 for its own choice; the last bits of sums depend on it.
    threads: Annotated[int, Interval(0, MOST_THREADS)] = 0


# A run resumes with other values of these; every other field must be what it was.
RESUME_FREE = (
    "steps", "learning_rate", "warmup", "decay", "save_every", "log_every", "sheet_every",
)  # fmt: skip


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Learning rate of the step after `step` finished ones.

    learning_rate min(1, (step + 1) / warmup) d(p), with p = (step - warmup) / (steps - warmup) in
    [0, 1] and d(p) = (1 + cos(pi p)) / 2, 1 - p, min(1, 2 - 2 p), or 1.
    """
    rising = min(1.0, (step + 1) / max(config.warmup, 1))
    p = min(max((step - config.warmup) / max(config.steps - config.warmup, 1), 0.0), 1.0)
    course = {
        "cosine": (1 + math.cos(math.pi * p)) / 2, "linear": 1 - p,
        "late_linear": min(1.0, 2 - 2 * p), "constant": 1.0,
    }  # fmt: skip
    return config.learning_rate * rising * course[config.decay]
