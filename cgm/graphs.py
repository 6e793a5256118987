"""CUDA graphs of one step of a sampling loop."""

from collections.abc import Callable

import torch


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph; it is run once before, so that its kernels are compiled."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
