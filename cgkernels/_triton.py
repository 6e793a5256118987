"""Triton, or a stand-in that lets everything but a launch work where Triton is not installed.

An op file imports both names from here. Kernels are then defined everywhere; launching one without
Triton raises. On CPU tensors nothing is ever launched.
"""

from typing import Any

__all__ = ["HAS_TRITON", "tl", "triton"]

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # macOS, Windows
    HAS_TRITON = False

    class _NoKernel:
        def __init__(self, fn: Any) -> None:
            self.__name__, self.__doc__ = fn.__name__, fn.__doc__

        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError(f"{self.__name__} is a Triton kernel, and Triton is not installed")

    class _Triton:
        jit = staticmethod(_NoKernel)

        @staticmethod
        def cdiv(a: int, b: int) -> int:
            return -(-a // b)

        @staticmethod
        def next_power_of_2(n: int) -> int:
            return 1 << (n - 1).bit_length()

    class _Language:
        class constexpr:  # in annotations of kernels, and for constants that kernels read
            def __init__(self, value: Any) -> None:
                self.value = value

    triton, tl = _Triton(), _Language()  # type: ignore[assignment]
