"""torch.compile and torch.export where several ops, calls or sizes meet."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import cgkernels
from cgkernels import add_noise, diffusion_loss, guided_step, guided_step_, philox_normal
from cgkernels.library import OPS
from tests.ops.test_guided_step import make_table
from tests.support import assert_equal, normals


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def compiled(function, **options):
    """The function compiled whole, and the counter of its compilations."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


def test_numbers_and_sizes_change_without_another_compilation():
    """A sampling loop counts steps in Python; seed, batch and image size are the user's."""
    table = make_table(12, noise=True)

    def step_of(x, cond, uncond, step, seed):
        return guided_step(x, cond, uncond, table=table, step=step, seed=seed, scale=2.0)

    run, counter = compiled(step_of, dynamic=True)
    for step, batch, size in ((2, 4, 6), (3, 4, 6), (7, 5, 6), (11, 6, 8), (5, 2, 9)):
        arguments = (*(normals(batch, 3, size, size + 1, seed=i) for i in range(3)), step, -step)
        assert_equal(run(*arguments), step_of(*arguments))
    assert counter.frame_count == 1


def test_tensors_for_numbers_change_without_another_compilation():
    table, x = make_table(12, noise=True), normals(3, 2, 4)

    def step_of(step, seed, scale):
        return guided_step(x, 0.5 * x, x, table=table, step=step, seed=seed, scale=scale)

    run, counter = compiled(step_of)
    for value in range(5):
        numbers = torch.tensor(value), torch.tensor(value), torch.tensor(float(value))
        assert_equal(run(*numbers), step_of(*numbers))
    assert counter.frame_count == 1


def test_a_whole_loop_in_place_is_one_graph():
    """Persistent buffer, both halves written, history moved, noise and all."""
    table = make_table(5, noise=True)

    def loop(network_input, h1, h2):
        x, twin = network_input[:2, :3], network_input[2:, :3]
        for step in range(5):
            outputs = torch.tanh(network_input[:, :3])
            guided_step_(x, outputs, table=table, step=step, scale=2.0, seed=1, h1=h1, h2=h2,
                         twin=twin)  # fmt: skip
        return x.clone()

    run, counter = compiled(loop)
    eager = [normals(4, 5, 6, 6), normals(2, 3, 6, 6, seed=1), normals(2, 3, 6, 6, seed=2)]
    ours = [t.clone() for t in eager]
    assert_equal(run(*ours), loop(*eager))
    assert_equal(ours, eager)
    assert counter.frame_count == 1


def test_a_function_compiled_under_both_gets_two_graphs():
    """reference() is guarded on: neither graph is used in place of the other."""
    x, table = normals(2, 3), torch.tensor([[0.8, 0.6]])
    graphs = []

    def backend(graph, _):
        graphs.append([node for node in graph.graph.nodes if node.target in OPS.values()])
        return graph.forward

    run = torch.compile(lambda: add_noise(x, table=table, t=0, seed=0), backend=backend)
    expected = run()
    with cgkernels.reference():
        assert_equal(run(), expected)
    assert_equal(run(), expected)
    assert [len(nodes) for nodes in graphs] == [1, 0]


def test_exports_with_a_batch_of_any_size():
    table = make_table(noise=True)

    class Model(torch.nn.Module):
        def forward(self, x, cond, index):
            z = philox_normal(tuple(x.shape), seed=4, index=index, step=0)
            return guided_step(x + z, cond, table=table, step=2, seed=4, index=index)

    def inputs(batch):
        return normals(batch, 2, 5), normals(batch, 2, 5, seed=1), torch.arange(batch) + 7

    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(
        Model(), inputs(4), dynamic_shapes=({0: batch}, {0: batch}, {0: batch})
    )
    for size in (2, 4, 9):
        assert_equal(exported.module()(*inputs(size)), Model()(*inputs(size)))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_inductor():
    """All ops in one function, forward and backward."""
    noise, table = torch.tensor([[0.8, 0.6], [0.6, 0.8]]), make_table(noise=True)

    def run(x0, weight):
        t = torch.tensor([1, 0, 1])
        x_t, _ = add_noise(x0, table=noise, t=t, seed=3)
        x = guided_step(x_t, weight * x_t, x_t.tanh(), table=table, step=1, scale=2.0, seed=3)
        x = x + philox_normal(tuple(x.shape), seed=3, step=0)
        state = x.detach().clone()
        guided_step_(state, x.detach(), table=table, step=0, seed=4)
        return diffusion_loss(x, x0, table=noise, t=t, seed=3, target="v"), state

    results = []
    for function in (run, torch.compile(run, fullgraph=True)):
        x0 = normals(3, 2, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
        weight = torch.tensor(0.5, requires_grad=True)
        loss, state = function(x0, weight)
        loss.sum().backward()
        results.append((loss.detach(), state, x0.grad, weight.grad))
    torch.testing.assert_close(results[1], results[0])
