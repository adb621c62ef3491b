"""The parts of a linear layer that each process of a group has, for tests of split classes."""

import contextlib

import torch
import torch.distributed as dist

SIZES = {2: (60, 41), 3: (1, 0, 100)}  # classes of each rank
N_ROWS, N_FEATURES = 12, 16


class Shards:
    """The part of each tensor that this process has."""

    def __init__(self, sizes=None):
        self.group = dist.group.WORLD
        self.rank, self.n_ranks = dist.get_rank(), dist.get_world_size()
        sizes = sizes or SIZES[self.n_ranks]
        self.n_classes, start = sum(sizes), sum(sizes[: self.rank])
        self.own = slice(start, start + sizes[self.rank])
        self.given = {
            "process_group": self.group,
            "vocab_start": start,
            "num_classes": self.n_classes,
        }

    def rows(self, tensor):
        """Return this rank's rows, for sequence parallelism."""
        return tensor.chunk(self.n_ranks)[self.rank]


def make_layer(n_classes, dtype=torch.float32, rows=(N_ROWS,)):
    """Return hidden states, weight and bias of all classes."""
    layer = [torch.randn(*rows, N_FEATURES), torch.randn(n_classes, N_FEATURES) / 4]
    return [x.to(dtype) for x in (*layer, torch.randn(n_classes))]


def leaves(tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


def double(tensor):
    return tensor.double() if tensor is not None and tensor.is_floating_point() else tensor


def own_layer(shards, layer, sequence_parallel=False):
    """Return this process's leaves."""
    hidden, linear_weight, bias = layer
    hidden = shards.rows(hidden) if sequence_parallel else hidden
    return leaves((hidden, linear_weight[shards.own], bias[shards.own]))


def assert_near(found, wanted, tolerance, what):
    assert found.shape == wanted.shape, what
    found, wanted = found.detach(), wanted.detach()
    error = ((found.double() - wanted).abs() / (1 + wanted.abs())).max() if wanted.numel() else 0
    assert error < tolerance, (what, error)


def assert_gradients(found, wanted, shards, tolerance, what, sequence_parallel=False):
    """Compare gradients of this process's layer with those of all classes."""
    of_hidden, of_weight, of_bias = wanted
    of_hidden = shards.rows(of_hidden) if sequence_parallel else of_hidden
    right = (of_hidden, of_weight[shards.own], of_bias[shards.own])
    for name, one, other in zip(("hidden", "weight", "bias"), found, right, strict=True):
        assert_near(one, other, tolerance, (name, *what))


def assert_same_on_all_ranks(*tensors):
    for tensor in tensors:
        first = tensor.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(tensor, first)


@contextlib.contextmanager
def noting_collectives(noted):
    """Note name and size of each collective, in their order."""
    names = ("all_gather_single", "all_gather_into_tensor", "all_reduce", "reduce_scatter_single")
    names += ("reduce_scatter_tensor",)
    originals = {name: getattr(dist, name) for name in names if hasattr(dist, name)}

    def noting(name, function):
        def call(*tensors, **options):
            tensors_given = [x for x in tensors if torch.is_tensor(x)]
            noted.append((name.split("_")[1], tensors_given[-1].numel()))
            return function(*tensors, **options)

        return call

    for name, function in originals.items():
        setattr(dist, name, noting(name, function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
