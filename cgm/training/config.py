"""How a model is trained, and the course of the learning rate."""

import math
from dataclasses import dataclass
from typing import Literal

from cgm.model import check_choices, check_not_negative, check_positive

MOST_THREADS = 1024  # more than any machine's; OpenMP ends the process where it cannot have them


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained."""

    # Number of steps; a resumed run may have another one.
    steps: int = 10_000
    # Examples a step.
    batch_size: int = 128
    # Learning rate of AdamW at its highest.
    learning_rate: float = 1e-3
    # Steps over which the learning rate rises from 0.
    warmup: int = 200
    # Course of the learning rate after that: to 0 at the last step (late_linear: from half of the
    # steps on, as GANs are trained), or none.
    decay: Literal["cosine", "linear", "late_linear", "constant"] = "cosine"
    # Decay of the mean of the gradient (Adam's beta 1).
    beta1: float = 0.9
    # Decay of the mean of its square (Adam's beta 2).
    beta2: float = 0.999
    # Weight decay of matrices and convolutions; biases and scales have none.
    weight_decay: float = 0.0
    # Largest norm of the gradient of a phase; inf for no clipping.
    gradient_clip: float = 1.0
    # Decay of the average of the weights; 0 for the weights themselves.
    ema_decay: float = 0.999
    # Seed of initial weights, order and noise.
    seed: int = 0
    # Arithmetic of the network; bfloat16 is autocast, the weights stay float32.
    precision: Literal["float32", "bfloat16"] = "float32"
    # Steps from one checkpoint to the next.
    save_every: int = 1000
    # Steps from one line of the log to the next.
    log_every: int = 50
    # Steps from one sheet of samples to the next; 0: none.
    sheet_every: int = 0
    # Threads of PyTorch on a CPU, 0 for its own choice; the last bits of sums depend on it.
    threads: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(self, "steps", "batch_size", "save_every", "log_every", "learning_rate")
        check_not_negative(self, "warmup", "weight_decay", "sheet_every", "threads")
        if self.threads > MOST_THREADS:
            raise ValueError(f"threads must be at most {MOST_THREADS}, got {self.threads}")
        if not self.gradient_clip > 0:
            raise ValueError(f"gradient_clip must be positive, got {self.gradient_clip}")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")


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
