"""CUDA graphs of one step of a sampling loop."""

from collections.abc import Callable

import torch


def capture(step: Callable[[], None], count: int = 1) -> Callable[[], None]:
    """So many steps as one CUDA graph; one is run before, so that its kernels are compiled."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            step()
    return graph.replay
