"""Patch scores of images, for inference: the map, its mean, a loss, or the inner features."""

from typing import Literal

import torch
from torch import Tensor

from cgm.networks.patch_discriminator import PatchDiscriminator
from cgm.sampling.cuda_graph import capture

Output = Literal["map", "mean", "features"]
_OUTPUTS = ("map", "mean", "features")


@torch.no_grad()
def patch_scores(
    network: PatchDiscriminator,
    x: Tensor,
    y: Tensor | None = None,
    *,
    output: Output = "map",
    loss: str | None = None,
    target: str | None = None,
) -> Tensor | list[Tensor]:
    """What a discriminator says of images x (B, C, H, W), or of pairs with y (B, C', H, W).

    Args:
        output: "map": a score for each patch, (B, 1, h, w). "mean": their mean, (B,). "features":
            what each block gives after its activation, and the map as the last.
        loss, target: return the mean of `cgkernels.patch_loss` over the patches, (B,), instead.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """
    if output not in _OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(_OUTPUTS)}, got {output!r}")
    if (loss is None) != (target is None):
        missing = "loss" if loss is None else "target"
        raise ValueError(f"{missing} must be given with the other of loss and target")
    if loss is not None and target is not None:
        if output != "map":
            raise ValueError(f"output must be left out with a loss, got {output!r}")
        return network.row_losses(x, y, loss=loss, target=target)
    if output == "features":
        return network.features(x, y)
    scores = network(x, y)
    return scores if output == "map" else scores.float().flatten(1).mean(1)


class PatchScorer:
    """`patch_scores` of images of one shape, on CUDA as one graph: for few images at a time.

    It keeps the weights that the network has when it is made (see `PatchDiscriminator.freeze`): a
    network that has changed needs a new scorer.

    Args:
        network: the discriminator.
        x, y, options: as of `patch_scores`; later calls have the shapes and dtypes of these.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name; the network is in training
            mode.
    """

    def __init__(
        self, network: PatchDiscriminator, x: Tensor, y: Tensor | None = None, **options: str
    ) -> None:
        network = network.freeze(x, y)
        self._inputs = [None if t is None else t.detach().clone() for t in (x, y)]

        def score() -> None:
            self._out = patch_scores(network, *self._inputs, **options)  # type: ignore[arg-type]

        score()
        self._score = capture(score, x.device) if x.is_cuda else score

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor | list[Tensor]:
        """The scores of images x, or of pairs with y."""
        for name, held, given in zip("xy", self._inputs, (x, y), strict=True):
            if (held is None) != (given is None):
                raise ValueError(f"{name} must be {'None' if held is None else 'given'}")
            if held is None or given is None:
                continue
            if given.shape != held.shape or given.dtype != held.dtype:
                raise ValueError(
                    f"{name} must be {held.dtype} {tuple(held.shape)} as at first, got "
                    f"{given.dtype} {tuple(given.shape)}"
                )
            held.copy_(given)
        self._score()
        out = self._out
        return [t.clone() for t in out] if isinstance(out, list) else out.clone()
