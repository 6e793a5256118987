"""One training loop for all families.

Everything is a function of (config, data, step): the order of the rows, the noise of each example
(index = row + 2^32 epoch), the learning rate. Nothing is drawn from a global generator, so a run
that stops and resumes continues with the same bits on the same device.

The folder of a run   config.json, model.safetensors   the averaged weights (see cgm.checkpoints)
                      training.safetensors             what resuming needs
                      log.csv                          means over the steps since the row before
                      samples, index.html              if asked for (see cgm.viz.sample_page)

Source   AdamW: Loshchilov, Hutter, arXiv:1711.05101. Average of the weights with its ramp-up: the
         documentation of TensorFlow's tf.train.ExponentialMovingAverage (num_updates).
"""

from cgm.training.config import TrainingConfig, learning_rate
from cgm.training.loop import (
    LOG_FILE,
    STATE_FILE,
    TrainingInterrupted,
    describe_data,
    train,
)

__all__ = [
    "LOG_FILE",
    "STATE_FILE",
    "TrainingConfig",
    "TrainingInterrupted",
    "describe_data",
    "learning_rate",
    "train",
]
