"""PatchGAN scoring in the training step of a discriminator that is a plain nn.Sequential.

The discriminator is to tell pairs that belong together, an image and its inverse with some noise,
from pairs that do not, an image and the inverse of another one. The network, its parameters and its
optimizer stay as they are; only the forward pass and the loss go through three ops:

    pair_conv2d        the first convolution reads both images where they lie: no torch.cat
    instance_norm_act  instance norm and LeakyReLU in one pass
    patch_head_loss    the last convolution and the loss of each pair: the patch map is never stored

Prints how far loss and gradients are from those of the plain modules, and the share of held-out
pairs that the trained discriminator tells rightly.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cgkernels import instance_norm_act, pair_conv2d, patch_head_loss, patch_loss


def make_discriminator(width: int = 16) -> nn.Sequential:
    """A conditional PatchGAN discriminator of pairs of gray images."""
    return nn.Sequential(
        nn.Conv2d(2, width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
        nn.InstanceNorm2d(2 * width),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 1, 4, 1, 1),
    )


def plain_loss(net: nn.Sequential, x: Tensor, y: Tensor, target: str) -> Tensor:
    """The hinge loss of each pair, (B,), as one would write it with the modules."""
    scores = net(torch.cat([x, y], 1))  # (B, 1, h, w)
    return patch_loss(scores, "hinge", target).mean((1, 2, 3))


def fused_loss(net: nn.Sequential, x: Tensor, y: Tensor, target: str) -> Tensor:
    """The same with the ops, on the same parameters."""
    first, middle, last = (layer for layer in net if isinstance(layer, nn.Conv2d))
    h = pair_conv2d(x, y, first.weight, first.bias, slope=0.2)  # (B, width, H / 2, W / 2)
    h = F.conv2d(h, middle.weight, stride=2, padding=1)  # (B, 2 width, H / 4, W / 4)
    h = instance_norm_act(h, activation="leaky_relu", slope=0.2)
    return patch_head_loss(h, last.weight, last.bias, loss="hinge", target=target)  # (B,)


def make_pairs(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images x, partners y of x and partners of other images, each (B, 1, 16, 16)."""
    coarse = torch.randn(rows, 1, 4, 4, generator=generator)
    x = F.interpolate(coarse, size=16, mode="bilinear").tanh()
    y = -x + 0.1 * torch.randn(x.shape, generator=generator)
    return x, y, y.roll(1, 0)


def gradients(net: nn.Sequential, loss: Tensor) -> Tensor:
    """All of them, as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


def main(steps: int = 150, rows: int = 32) -> dict:
    """Compares the two losses, trains with the fused one, prints and returns the numbers."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    net = make_discriminator()

    x, y, other = make_pairs(rows, generator)
    losses, slopes = [], []
    for loss_of in (plain_loss, fused_loss):
        loss = loss_of(net, x, y, "real") + loss_of(net, x, other, "fake")  # (B,)
        losses.append(loss.detach())
        slopes.append(gradients(net, loss.mean()))
    difference = (losses[1] - losses[0]).abs().max().item()
    slope_difference = ((slopes[1] - slopes[0]).norm() / slopes[0].norm()).item()
    print(f"loss of {rows} pairs: largest difference from the modules {difference:.1e}")
    print(f"gradients: relative difference {slope_difference:.1e}")

    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.5, 0.999))
    for step in range(steps):
        x, y, other = make_pairs(rows, generator)
        total = (fused_loss(net, x, y, "real") + fused_loss(net, x, other, "fake")).mean()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        if step % max(1, steps // 5) == 0:
            print(f"step {step:4d}  loss {total.item():.3f}")

    x, y, other = make_pairs(200, generator)
    with torch.no_grad():
        right = fused_loss(net, x, y, "generator") < fused_loss(net, x, other, "generator")
    accuracy = right.float().mean().item()
    print(f"held-out pairs told rightly: {accuracy:.1%}")
    return {
        "loss difference": difference,
        "gradient difference": slope_difference,
        "last loss": total.item(),
        "accuracy": accuracy,
    }


if __name__ == "__main__":
    main()
