"""CUDA graphs of one step of a sampling loop."""

from collections.abc import Callable

import torch


def capture(step: Callable[[], None], device: torch.device, count: int = 1) -> Callable[[], None]:
    """So many steps on this device as one CUDA graph, whatever device is current.

    One is run before, so that its kernels are compiled. Under autocast weights are converted in the
    graph, at each replay: what its cache holds is gone when the context ends, and the graph is not.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.cuda.device(device):
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                step()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Of its own: PyTorch's default is one stream of whichever device was first.
            with torch.cuda.graph(graph, stream=side):
                for _ in range(count):
                    step()
    finally:
        torch.set_autocast_cache_enabled(cached)
    return graph.replay
