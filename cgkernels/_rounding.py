"""Plain PyTorch on a processor that is nobody's: rounding errors as derived, not as met.

How far plain PyTorch errs follows the processor: MKL, oneDNN and ATen choose orders of summation by
instruction set, and these differ by a factor of three. What errors a sum of n float32 terms p may
have does not:

    An addition to nearest errs by rho u |partial sum|, u = 2^-24 and rho^2 = 1 / (8 ln 2): uniform
    within half a last place, mantissas as likely as 1/m. Independent errors of a sum in runs of at
    most r terms have the variance rho^2 u^2 times the sum of all squared partial sums. Of terms in
    no particular order, with sum S and sum of squares R^2, and Q = R^2 - S^2 / n, the partial sum
    of k has the mean square (k / n)^2 S^2 + (k / n) (1 - k / n) Q, which adds up to
        (r / 2 - r^2 / (3 n)) Q + (r^2 / (3 n)) S^2     of the runs
      + log2(n / r) Q + S^2 (if n > r)                  of adding up the runs, by pairs
      + R^2                                             of the products, if terms are products
    For S^2 = R^2, as of terms of both signs, the runs give r / 2 R^2, as a walk at random does.

Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms (2nd ed., 2002), ch. 2 and 4,
and N. J. Higham and T. Mary, SIAM J. Sci. Comput. 41 (2019), A2815: errors grow as sqrt(n), not as
n. That errors are drawn and carried through what follows is Monte Carlo arithmetic: D. S. Parker,
UCLA CSD-970002 (1997).
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from cgkernels import library

_aten = torch.ops.aten

RUN = 512
"""The longest run: libraries keep that many terms of a matrix product in a register, or fewer."""

SHARE = 0.75
"""Of the error of such runs, in what is modeled.

Twice that is allowed: 1.5 times the error of runs of 512, which is that of runs of 1.5^2 512 =
1,152. It is the middle between the longest runs that are met (oneDNN: K = 1,536 errs as runs of
850) and a plain sequence of 1,536, which is to fail: they have 0.86 and 1.15 times that error.
"""

_UNIT = 2.0**-24  # half a last place of 1 in float32, in which all dtypes are summed
_RHO2 = 1 / (8 * math.log(2))

_NARROW = (torch.float32, torch.float16, torch.bfloat16)

# Each is linear in every factor: of squares it gives R^2, of what is not zero the number of terms.
_PRODUCTS = {
    _aten.mm, _aten.bmm, _aten.mv, _aten.dot, _aten.addmm, _aten.addmm_, _aten.addmv,
    _aten.addmv_, _aten.addbmm, _aten.baddbmm, _aten.baddbmm_, _aten.convolution,
    _aten.convolution_backward,
}  # fmt: skip
_SUMS = {
    _aten.sum, _aten.cumsum, _aten.index_add, _aten.index_add_, _aten.scatter_add,
    _aten.scatter_add_, _aten.embedding_dense_backward, _aten.trace,
}  # fmt: skip

# Computed in float64 and rounded once: libraries differ in the last place.
_FUNCTIONS = {
    _aten.exp, _aten.exp2, _aten.expm1, _aten.log, _aten.log1p, _aten.log2, _aten.log10, _aten.tanh,
    _aten.sigmoid, _aten.erf, _aten.erfc, _aten.erfinv, _aten.sin, _aten.cos, _aten.tan, _aten.atan,
    _aten.atan2, _aten.rsqrt, _aten.sqrt, _aten.pow, _aten.gelu, _aten.gelu_backward, _aten.silu,
    _aten.silu_backward, _aten.softplus, _aten.softplus_backward, _aten.log_sigmoid_forward,
    _aten.log_sigmoid_backward, _aten.sigmoid_backward, _aten.tanh_backward, _aten.logaddexp,
    _aten.elu, _aten.mish, _aten.exp_, _aten.exp2_, _aten.expm1_, _aten.log_, _aten.log1p_,
    _aten.tanh_, _aten.sigmoid_, _aten.erf_, _aten.sin_, _aten.cos_, _aten.rsqrt_, _aten.sqrt_,
    _aten.pow_, _aten.gelu_, _aten.silu_,
}  # fmt: skip

# Made of sums and functions, each of which is modeled.
_COMPOSED = {
    _aten.native_layer_norm, _aten.native_layer_norm_backward, _aten.native_group_norm,
    _aten.native_group_norm_backward, _aten.native_batch_norm, _aten.native_batch_norm_backward,
    _aten._native_batch_norm_legit, _aten._fused_rms_norm, _aten._fused_rms_norm_backward,
    _aten._softmax_backward_data, _aten._log_softmax, _aten._log_softmax_backward_data,
    _aten._safe_softmax, _aten.logsumexp, _aten.mse_loss, _aten.linalg_vector_norm,
    _aten.binary_cross_entropy_with_logits, _aten.nll_loss_forward,
}  # fmt: skip


def variance_of_sum(total: Tensor, squares: Tensor, terms: Tensor, products: bool) -> Tensor:
    """Of the rounding errors of float32 sums in runs of `RUN`, before the last is rounded.

    Args:
        total, squares, terms: of each sum, in float64: S, R^2 and n, zeros not counted.
        products: the terms are products, and rounded.
    """
    terms = terms.clamp(min=1)
    run = terms.clamp(max=RUN)
    about_mean = (squares - total.square() / terms).clamp(min=0)
    squared = (run.square() - 1) / (3 * terms)
    within = ((run - 1) / 2 - squared) * about_mean + squared * total.square()
    among = (terms / run).log2() * about_mean + (terms > run) * total.square()
    return _RHO2 * _UNIT**2 * (within + among + squares * products)


@contextlib.contextmanager
def modeled_rounding(seed: int = 0) -> Iterator[None]:
    """Within, plain PyTorch errs as derived (see above), the same on every processor.

    Sums and products of float32 and half types, and their derivatives, are computed in float64, get
    an error that is drawn from `SHARE` times the standard deviation of the model, and are rounded
    to their dtype; functions such as exp are rounded once; all else is as it is. Public functions
    run their references. An op whose implementation is no PyTorch is not modeled.
    """
    with library.reference(), sdpa_kernel(SDPBackend.MATH), _Modeled(seed):
        yield


class _Modeled(TorchDispatchMode):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in library.OPS.values():  # what it is made of
            device = next(a.device.type for a in args if isinstance(a, Tensor))
            if device == "cpu":
                with self:
                    return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
            return func(*args, **kwargs)
        kind = func.overloadpacket
        if kind in _REWRITTEN and _is_narrow(args[0]) and not func._schema.is_mutable:
            with self:
                return _REWRITTEN[kind](*args, **kwargs)
        if kind in _COMPOSED and func in decomposition_table:
            with self:
                return decomposition_table[func](*args, **kwargs)
        if kind == _aten.mean:
            return self._mean(func, args, kwargs)
        if kind in _PRODUCTS or kind in _SUMS or kind in _FUNCTIONS:
            return self._rounded(func, args, kwargs)
        return func(*args, **kwargs)

    def _rounded(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not any(_is_narrow(a) for a in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        kind = func.overloadpacket
        value = _call(func, args, kwargs, Tensor.double)
        errors: list[Any] = [None] * len(_listed(value))
        if kind not in _FUNCTIONS:
            squares = _call(func, args, kwargs, _squared, lambda x: x * x)
            terms = _call(func, args, kwargs, _filled, lambda x: float(x != 0))
            products = kind in _PRODUCTS
            errors = [
                None if s is None else self._drawn(variance_of_sum(s, r, n, products))
                for s, r, n in zip(*map(_listed, (value, squares, terms)), strict=True)
            ]
        if func._schema.is_mutable:
            targets = [kwargs["out"] if "out" in kwargs else args[0]]
            result = targets[0]
        else:
            result = func(*args, **kwargs)
            targets = _listed(result)
        for target, wide, error in zip(targets, _listed(value), errors, strict=True):
            if wide is not None:
                target.copy_(wide if error is None else wide + error)
        return result

    def _mean(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if result.dtype not in _NARROW or not result.numel() or "out" in kwargs:
            return result
        each = args[0].numel() / result.numel()
        value, squares, filled = (
            _call(func, args, kwargs, change)
            for change in (
                Tensor.double,
                lambda t: t.double().square(),
                lambda t: (t != 0).double(),
            )
        )
        variance = variance_of_sum(value * each, squares * each, filled * each, False)
        return result.copy_(value + self._drawn(variance) / each)

    def _drawn(self, variance: Tensor) -> Tensor:
        """Errors of this variance, times `SHARE`; none where the sum is not finite."""
        device = variance.device
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        z = torch.randn(
            variance.shape, generator=self.generators[device], dtype=torch.float64, device=device
        )
        error = SHARE * variance.sqrt() * z
        return torch.where(error.isfinite(), error, 0)


def _squared(tensor: Tensor) -> Tensor:
    return tensor.double().square()


def _filled(tensor: Tensor) -> Tensor:
    return (tensor != 0).double()


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    """By the logarithm of the sum, as attention computes it that keeps no scores.

    That logarithm is rounded: an error of every weight, which a quotient has not.
    """
    wide = x.float()
    total = wide.logsumexp(dim, keepdim=True)
    weights = (wide - total.where(total.isfinite(), 0)).exp()
    weights = weights.where(total != -math.inf, math.nan)  # of no score at all
    return weights if half_to_float else weights.to(x.dtype)


def _var_mean(
    x: Tensor,
    dim: list[int] | bool | None = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> tuple[Tensor, Tensor]:
    """All overloads: of dim and unbiased, of unbiased alone, of dim and correction."""
    if isinstance(dim, bool):
        unbiased, dim = dim, None
    over, wide = dim or list(range(x.dim())), x.float()
    mean = wide.mean(over, keepdim=True)
    variance = (wide - mean).square().mean(over, keepdim=keepdim)
    count = x.numel() // max(1, mean.numel())
    free = max(0, count - (int(unbiased) if correction is None else correction))
    variance = variance * (count / free if free else math.nan)
    return variance.to(x.dtype), mean.view(variance.shape).to(x.dtype)


_REWRITTEN: dict[Any, Callable[..., Any]] = {
    _aten._softmax: _softmax,
    _aten.var_mean: _var_mean,
    _aten.var: lambda *args, **kwargs: _var_mean(*args, **kwargs)[0],
    _aten.std: lambda *args, **kwargs: _var_mean(*args, **kwargs)[0].sqrt(),
}


def _is_narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _NARROW


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]


def _call(
    func: Any,
    args: Any,
    kwargs: dict[str, Any],
    change: Callable[[Tensor], Tensor],
    number: Callable[[float], float] = lambda x: x,
) -> Any:
    """func in float64, of changed tensors; number changes alpha and beta. Arguments stay."""

    def changed(tensor: Tensor) -> Tensor:
        return change(tensor) if tensor.is_floating_point() else tensor

    args, kwargs = tree_map_only(Tensor, changed, (args, kwargs))
    if func._schema.is_mutable:  # not what is written: double() of float64 is no copy
        args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
    if kwargs.get("dtype") in _NARROW:
        kwargs["dtype"] = torch.float64
    for name in ("alpha", "beta"):
        if name in kwargs:
            kwargs[name] = number(kwargs[name])
    return func(*args, **kwargs)
