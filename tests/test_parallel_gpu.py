"""The losses of a split vocabulary on GPUs: by NCCL, in eager mode and in a CUDA graph.

NCCL needs a GPU for each rank. On one GPU two ranks share it, and their messages go by gloo through
the memory of the host.
"""

import processes
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import fused_xent
from fused_xent import _parallel_rows

needs_a_gpu = pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

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


class Rank:
    """A process's part of the classes, on its device."""

    def __init__(self, device):
        size = N_CLASSES // dist.get_world_size()
        self.own = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
        logits, target = make_inputs(0)
        self.leaf = logits[:, self.own].to(device).requires_grad_()
        self.target = target.to(device)

    def step(self):
        loss = fused_xent.cross_entropy(self.leaf, self.target, process_group=dist.group.WORLD)
        (gradient,) = torch.autograd.grad(loss, self.leaf)
        return loss.detach(), gradient

    def check(self, found, seed):
        loss, gradient = expected(*make_inputs(seed))
        own = gradient[:, self.own]
        torch.testing.assert_close(found[0].double().cpu(), loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found[1].double().cpu(), own, rtol=1e-5, atol=1e-8)

    def check_class_out_of_range(self):
        self.target[5] = N_CLASSES  # the host cannot be asked: the row is NaN on every rank
        loss, gradient = self.step()
        assert loss.isnan()
        assert gradient[5].isnan().all()
        assert not gradient[6].isnan().any()


def check_one_device(device):
    def by_host(packed, group):
        found = [torch.empty_like(packed, device="cpu") for _ in range(dist.get_world_size(group))]
        dist.all_gather(found, packed.cpu(), group)
        return torch.stack(found).to(packed.device)

    _parallel_rows.all_gather = by_host
    rank = Rank(device)
    rank.check(rank.step(), 0)
    if device != "cpu":
        rank.check_class_out_of_range()


def check_nccl():
    device = torch.device("cuda", dist.get_rank())
    torch.cuda.set_device(device)
    rank = Rank(device)
    rank.check(rank.step(), 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = rank.step()
    for seed in (1, 2):
        logits, target = make_inputs(seed)
        with torch.no_grad():
            rank.leaf.copy_(logits[:, rank.own])
        rank.target.copy_(target)
        graph.replay()
        rank.check(found, seed)
    rank.check_class_out_of_range()


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=needs_a_gpu)])
def test_two_ranks_on_one_device(kind):
    processes.run(check_one_device, 2, kind)


@needs_two_gpus
def test_nccl():
    processes.run(check_nccl, 2, backend="nccl")
