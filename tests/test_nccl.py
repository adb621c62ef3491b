"""The losses of a split vocabulary on GPUs, by NCCL: in eager mode and in a CUDA graph."""

import processes
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import fused_xent

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

N_ROWS, N_CLASSES = 64, 3000


def make_inputs(seed):
    """Return all logits, the same in each process, and targets of which one is ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(N_ROWS, N_CLASSES, generator=generator)
    target = torch.randint(N_CLASSES, (N_ROWS,), generator=generator)
    target[3] = -100
    return logits, target


def expected(logits, target):
    leaf = logits.double().requires_grad_()
    loss = F.cross_entropy(leaf, target)
    loss.backward()
    return loss.detach(), leaf.grad


def check_split_vocabulary():
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    size = N_CLASSES // n_ranks
    own = slice(rank * size, (rank + 1) * size)
    logits, target = make_inputs(0)
    leaf = logits[:, own].to(device).requires_grad_()
    target_on_device = target.to(device)

    def step():
        loss = fused_xent.cross_entropy(leaf, target_on_device, process_group=dist.group.WORLD)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient

    def check(found, seed):
        loss, gradient = expected(*make_inputs(seed))
        torch.testing.assert_close(found[0].double().cpu(), loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found[1].double().cpu(), gradient[:, own], rtol=1e-5, atol=1e-8)

    check(step(), 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for seed in (1, 2):
        logits, target = make_inputs(seed)
        with torch.no_grad():
            leaf.copy_(logits[:, own])
        target_on_device.copy_(target)
        graph.replay()
        check(found, seed)
    target_on_device[5] = N_CLASSES  # the host cannot be asked: the row is NaN on every rank
    loss, gradient = step()
    assert loss.isnan()
    assert gradient[5].isnan().all()


def test_split_vocabulary():
    processes.run(check_split_vocabulary, 2, backend="nccl")
