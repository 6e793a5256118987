"""Plain PyTorch that several ops are compared with."""

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def coefficients(x: Tensor, table: Tensor, t: Tensor) -> Iterator[Tensor]:
    """alpha and sigma of each sample's time, in the dtype of x and to be multiplied with it."""
    return (c.view(-1, *(1,) * (x.dim() - 1)) for c in table[t].to(x.dtype).unbind(1))


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Attention of q (B, H, T, D) over k and v (B, H_kv, S, D), some heads of q to one of k."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)
