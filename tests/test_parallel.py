"""Losses of a vocabulary that is split over processes, against the loss of all classes in float64.

Each test runs in processes of its own: a function `check_...` runs in each of them.
"""

import itertools
import time

import processes
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

import fused_xent
from fused_xent import reference

pytestmark = pytest.mark.cpu("uses gloo between processes")

SIZES = {2: (60, 41), 3: (1, 1, 201), 4: (0, 50, 30, 21)}  # classes of each rank
N_ROWS = 9
OPTIONS = [
    {},
    {"label_smoothing": 0.2},
    {"lse_square_scale": 0.01},
    {"softcap": 5.0},
    {"focal_gamma": 2.0},
    {"label_smoothing": 0.1, "focal_gamma": 1.0, "lse_square_scale": 0.01, "logit_scale": 0.5},
]


class Shards:
    """The classes of this process."""

    def __init__(self, sizes=None):
        self.group = dist.group.WORLD
        rank = dist.get_rank()
        sizes = sizes or SIZES[dist.get_world_size()]
        self.n_classes, self.start = sum(sizes), sum(sizes[:rank])
        self.own = slice(self.start, self.start + sizes[rank])
        self.given = {
            "process_group": self.group,
            "vocab_start": self.start,
            "num_classes": self.n_classes,
        }


def random_labels(kind, n_classes, shards):
    """Return target, target_indices, the same for this rank, and dense labels or class indices."""
    if kind == "index":
        target = torch.randint(n_classes, (N_ROWS,))
        target[3] = -100
        return target, None, target
    if kind == "dense":
        target = torch.randn(N_ROWS, n_classes).softmax(1)
        return target[:, shards.own], None, target.double()
    target, indices = torch.rand(N_ROWS, 5), torch.randint(n_classes, (N_ROWS, 5))
    indices[torch.rand(N_ROWS, 5) < 0.2] = -100
    indices[0, :2] = indices[0, 2]
    dense = torch.zeros(N_ROWS, n_classes, dtype=torch.float64)
    kept = target.double() * (indices >= 0)
    return target, indices, dense.scatter_add(1, indices.clamp(min=0), kept)


def double(tensor):
    return tensor.double() if tensor is not None and tensor.is_floating_point() else tensor


def assert_near(found, wanted, tolerance, what):
    error = ((found.double() - wanted).abs() / (1 + wanted.abs())).max() if wanted.numel() else 0
    assert error < tolerance, (what, error)


# ---- every option --------------------------------------------------------------------------------


def check_options():
    shards = Shards()
    cases = itertools.product(
        ("index", "sparse", "dense"), OPTIONS, (False, True), ("mean", "sum", "none")
    )
    for seed, (kind, options, has_weights, reduction) in enumerate(cases):
        torch.manual_seed(seed)
        logits = torch.randn(N_ROWS, shards.n_classes) * 3
        target, indices, labels = random_labels(kind, shards.n_classes, shards)
        weight = torch.rand(shards.n_classes) + 0.3 if has_weights else None
        tokens = torch.rand(N_ROWS) * (torch.rand(N_ROWS) > 0.3) if has_weights else None
        what = (kind, options, has_weights, reduction)

        whole = logits.double().requires_grad_()
        wanted = reference.cross_entropy_with_statistics(
            whole,
            labels,
            double(weight),
            token_weight=double(tokens),
            reduction=reduction,
            **options,
        )
        upstream = [torch.randn_like(x) for x in (wanted.loss, wanted.lse, wanted.entropy)]
        values = (wanted.loss, wanted.lse, wanted.entropy)
        (grad_loss,) = torch.autograd.grad(values[0], whole, upstream[0], retain_graph=True)
        (grad_all,) = torch.autograd.grad(values, whole, upstream)

        own = logits[:, shards.own].clone().requires_grad_()
        arguments = (own, target, None if weight is None else weight[shards.own])
        given = {"token_weight": tokens, "target_indices": indices, "reduction": reduction}
        given |= {**options, **shards.given}
        loss = fused_xent.cross_entropy(*arguments, **given)
        assert_near(loss.detach(), wanted.loss.detach(), 1e-6, what)
        (gradient,) = torch.autograd.grad(loss, own, upstream[0].float())
        assert_near(gradient, grad_loss[:, shards.own], 1e-6, what)

        found = fused_xent.cross_entropy_with_statistics(*arguments, **given)
        for name in ("loss", "lse", "z_loss", "entropy"):
            value, right = getattr(found, name).detach(), getattr(wanted, name).detach()
            assert_near(value, right, 3e-6, (name, *what))
        assert torch.equal(found.argmax, wanted.argmax), what
        assert torch.equal(found.correct, wanted.correct), what
        values = (found.loss, found.lse, found.entropy)
        (gradient,) = torch.autograd.grad(values, own, [x.float() for x in upstream])
        assert_near(gradient, grad_all[:, shards.own], 3e-6, what)


@pytest.mark.parametrize("n_processes", SIZES)
def test_options(n_processes):
    processes.run(check_options, n_processes)


# ---- numbers -------------------------------------------------------------------------------------


def check_numbers():
    for dtype, offset in itertools.product(
        (torch.float32, torch.float64, torch.bfloat16, torch.float16), (0, 100)
    ):
        _check_dtype(dtype, offset)
    _check_masked_shards()
    for gap in (5, 10, 20, 30):
        _check_near_1(gap)
    _check_other_values()
    _check_weighted_masked_shards()
    _check_16_bit_probabilities()


def _check_dtype(dtype, offset):
    """Offsets that differ between shards do not cost digits."""
    shards = Shards()
    rounding = torch.finfo(dtype).eps
    logits = (torch.randn(N_ROWS, shards.n_classes) * 3 + offset).to(dtype)
    target = torch.randint(shards.n_classes, (N_ROWS,))
    whole = logits.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(whole, target, reduction="none")
    (grad,) = torch.autograd.grad(wanted.sum(), whole)
    own = logits[:, shards.own].clone().requires_grad_()
    options = {**shards.given, "reduction": "none", "loss_dtype": torch.float32}
    if dtype == torch.float64:
        options["loss_dtype"] = dtype
    loss = fused_xent.cross_entropy(own, target, **options)
    assert_near(
        loss.detach(), wanted.detach(), max(rounding, 1e-6) if rounding < 1e-6 else 1e-6, dtype
    )
    (gradient,) = torch.autograd.grad(loss.sum(), own)
    assert_near(gradient, grad[:, shards.own], max(rounding, 1e-14), dtype)


def _check_masked_shards():
    """All classes of a shard at minus infinity: they add 0 to the loss, or make it infinite."""
    shards = Shards()
    for masked in (slice(0, 60), slice(60, None)):  # the first rank of two, or the second
        logits = torch.randn(N_ROWS, shards.n_classes)
        logits[:3, masked] = -torch.inf
        dense = torch.rand(N_ROWS, shards.n_classes)
        dense[:2, masked] = 0
        kept, left_out = (59, 60) if masked.start else (60, 59)
        index = torch.full((N_ROWS,), kept)
        index[2] = left_out
        for target, gamma in itertools.product((index, dense), (0.0, 2.0)):
            options = {"reduction": "none", "focal_gamma": gamma}
            whole = logits.double().requires_grad_()
            wanted = reference.cross_entropy(whole, double(target), **options)
            assert wanted.isposinf().tolist() == [row == 2 for row in range(N_ROWS)]
            (grad,) = torch.autograd.grad(wanted.nan_to_num(posinf=0).sum(), whole)
            own, own_target = logits[:, shards.own].clone().requires_grad_(), target
            if target is dense:
                own_target = target[:, shards.own]
            loss = fused_xent.cross_entropy(own, own_target, **options, **shards.given)
            (gradient,) = torch.autograd.grad(loss.sum(), own)
            torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
            others = [row for row in range(N_ROWS) if row != 2]
            assert_near(gradient[others], grad[others, shards.own], 1e-5, "masked")


def _check_near_1(gap):
    """All digits of the loss and of the target's gradient as p goes to 1, on whatever rank."""
    shards = Shards()
    logits = torch.randn(N_ROWS, shards.n_classes)
    target = torch.randint(shards.n_classes, (N_ROWS,))
    rows = torch.arange(N_ROWS)
    logits[rows, target] = logits.max(1).values + gap
    whole = logits.double().requires_grad_()
    others = whole.clone()
    others[rows, target] = -torch.inf
    target_logit = whole[rows, target]
    wanted = torch.log1p((others - target_logit.unsqueeze(1)).exp().sum(1))
    (grad,) = torch.autograd.grad(wanted.sum(), whole)
    own = logits[:, shards.own].clone().requires_grad_()
    loss = fused_xent.cross_entropy(own, target, reduction="none", **shards.given)
    torch.testing.assert_close(loss.detach().double(), wanted.detach(), rtol=2e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), own)
    torch.testing.assert_close(gradient.double(), grad[:, shards.own], rtol=4e-6, atol=1e-30)


def _check_other_values():
    """Masked classes, rows that are not finite, and rows that are left out."""
    shards = Shards()
    logits = torch.randn(N_ROWS, shards.n_classes)
    target = torch.full((N_ROWS,), shards.n_classes - 1)
    logits[0, : shards.n_classes // 2] = -torch.inf
    logits[1, 7 % shards.n_classes] = torch.nan
    logits[2, -1] = -torch.inf
    logits[3] = torch.nan
    target[3] = -100
    wanted = reference.cross_entropy_with_statistics(logits.double(), target, reduction="none")
    own = logits[:, shards.own].clone().requires_grad_()
    options = {**shards.given, "reduction": "none"}
    found = fused_xent.cross_entropy_with_statistics(own, target, **options)
    for name in ("loss", "lse", "argmax", "correct"):
        value, right = getattr(found, name).detach(), getattr(wanted, name)
        torch.testing.assert_close(
            value.to(right.dtype), right, equal_nan=True, rtol=1e-6, atol=1e-6
        )
    (gradient,) = torch.autograd.grad(found.loss.sum(), own)
    assert torch.isfinite(gradient[0]).all()
    assert gradient[1].isnan().all()
    assert (gradient[3] == 0).all()


def _check_weighted_masked_shards():
    """As above: smoothing makes the loss inf, and a label of weight 0 adds nothing to it."""
    shards = Shards()
    logits = torch.randn(N_ROWS, shards.n_classes)
    logits[:4, -SIZES[dist.get_world_size()][-1] :] = -torch.inf
    target = torch.zeros(N_ROWS, dtype=torch.int64)
    target[2:4] = shards.n_classes - 1
    weight = torch.ones(shards.n_classes)
    weight[-1] = 0
    for options, of_own in (({"label_smoothing": 0.1}, {}), ({}, {"weight": weight[shards.own]})):
        of_all = {"weight": weight} if of_own else {}
        options = {**options, "reduction": "none"}
        wanted = reference.cross_entropy(logits.double(), target, **options, **of_all)
        loss = fused_xent.cross_entropy(
            logits[:, shards.own], target, **options, **of_own, **shards.given
        )
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=1e-6)


def _check_16_bit_probabilities():
    """Smoothing multiplies a shard's labels by a factor, which does not round them again."""
    shards = Shards()
    logits = (torch.randn(N_ROWS, shards.n_classes) * 3).bfloat16()
    target = torch.randn(N_ROWS, shards.n_classes).softmax(1).bfloat16()
    options = {"label_smoothing": 0.5, "reduction": "none"}
    wanted = reference.cross_entropy(logits.double(), target.double(), **options)
    own = target[:, shards.own].clone().requires_grad_()
    options |= {"loss_dtype": torch.float32, **shards.given}
    loss = fused_xent.cross_entropy(logits[:, shards.own], own, **options)
    torch.testing.assert_close(loss.detach().double(), wanted, rtol=2e-6, atol=2e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), own)
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("n_processes", SIZES)
def test_numbers(n_processes):
    processes.run(check_numbers, n_processes)


# ---- calls ---------------------------------------------------------------------------------------


def check_calls():
    shards = Shards()
    torch.manual_seed(0)
    logits = torch.randn(2, shards.n_classes, 3, 5)  # images
    target = torch.randint(shards.n_classes, (2, 3, 5))
    whole = logits.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(whole, target)
    (grad,) = torch.autograd.grad(wanted, whole)
    own, grad = logits[:, shards.own], grad[:, shards.own]

    def check(loss, leaf, what, scale=1):
        assert_near(loss.detach(), wanted.detach(), 1e-6, what)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert_near(gradient, grad, 1e-7, what)

    leaf = own.clone().requires_grad_()
    first = leaf.movedim(1, 0) * 1  # an empty one has strides of 0, which no mode may refuse
    check(
        fused_xent.cross_entropy(first, target, dim=0, inplace_backward=True, **shards.given),
        leaf,
        "",
    )
    module = fused_xent.CrossEntropyLoss(**shards.given)
    check(module(leaf, target.int()), leaf, "module")
    last = leaf.movedim(1, -1)
    check(fused_xent.cross_entropy(last, target, dim=-1, **shards.given), leaf, "dim")
    for mode in ("inplace_backward", "grad_in_forward"):
        computed = leaf * 1
        loss = fused_xent.cross_entropy(computed, target, **shards.given, **{mode: True})
        check(loss, leaf, mode)
        if own.numel():
            assert_near(computed.detach(), grad, 1e-7, mode)
    _check_padding(logits, target, shards, wanted)
    _check_one_row(shards)
    _check_target_gradient(shards)
    _check_communication(shards)


def _check_padding(logits, target, shards, wanted):
    """Classes from num_classes on have probability and gradient 0, whatever their logits."""
    n_ranks, rank = dist.get_world_size(), dist.get_rank()
    size = -(-shards.n_classes // n_ranks) + 1
    padded = torch.full((2, size * n_ranks, 3, 5), torch.nan)
    padded[:, : shards.n_classes] = logits
    own = padded[:, rank * size : (rank + 1) * size].clone().requires_grad_()
    options = {"process_group": shards.group, "num_classes": shards.n_classes}
    # The last rank alone has padding: no mode may be refused there, or the others would wait.
    for mode in ({}, {"inplace_backward": True}, {"grad_in_forward": True}):
        loss = fused_xent.cross_entropy(own * 1, target, **options, **mode)
        torch.testing.assert_close(loss.double(), wanted)
        (gradient,) = torch.autograd.grad(loss, own)
        _check_padded_gradient(gradient, logits, target, shards, size)
    sparse = {"target_indices": target.unsqueeze(1).expand(2, size, 3, 5)}  # as many as classes
    labels = torch.full((2, size, 3, 5), 1 / size)
    loss = fused_xent.cross_entropy(own, labels, **sparse, **options)
    torch.testing.assert_close(loss.double(), wanted)


def _check_padded_gradient(gradient, logits, target, shards, size):
    rank = dist.get_rank()
    n_own = max(0, min(size, shards.n_classes - rank * size))
    assert (gradient[:, n_own:] == 0).all()
    whole = logits.double().requires_grad_()
    (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(whole, target), whole)
    assert_near(gradient[:, :n_own], grad[:, rank * size : rank * size + n_own], 1e-7, "padding")


def _check_one_row(shards):
    """Logits (C,): the row is a scalar, and the float64 sum of the weights must not promote it."""
    logits, weight = torch.randn(shards.n_classes), torch.rand(shards.n_classes)
    target = torch.tensor(shards.n_classes - 1)
    wanted = torch.nn.functional.cross_entropy(logits, target, weight, label_smoothing=0.1)
    own, of_own = logits[shards.own], weight[shards.own]
    options = {"label_smoothing": 0.1, **shards.given}
    loss = fused_xent.cross_entropy(own, target, of_own, **options)
    torch.testing.assert_close(loss, wanted)


def _check_target_gradient(shards):
    """Probabilities that are sharded as the logits are have a gradient."""
    logits = torch.randn(N_ROWS, shards.n_classes)
    target = torch.randn(N_ROWS, shards.n_classes).softmax(1)
    whole = target.double().requires_grad_()
    options = {"label_smoothing": 0.1, "lse_square_scale": 0.01}
    wanted = reference.cross_entropy(logits.double(), whole, **options)
    (grad,) = torch.autograd.grad(wanted, whole)
    own = target[:, shards.own].clone().requires_grad_()
    loss = fused_xent.cross_entropy(logits[:, shards.own], own, **options, **shards.given)
    (gradient,) = torch.autograd.grad(loss, own)
    assert_near(gradient, grad[:, shards.own], 1e-6, "target")


def _check_communication(shards):
    """One collective in forward, none in backward; every rank has the same bits."""
    own = torch.randn(N_ROWS, shards.n_classes)[:, shards.own].clone().requires_grad_()
    target = torch.randint(shards.n_classes, (N_ROWS,))
    sent = []
    all_gather = fused_xent._parallel_rows.all_gather

    def counted(packed, group):
        sent.append(packed.numel() * packed.element_size())
        return all_gather(packed, group)

    fused_xent._parallel_rows.all_gather = counted
    with CommDebugMode() as collectives:
        loss = fused_xent.cross_entropy(own, target, reduction="none", **shards.given)
        assert collectives.get_total_counts() <= 1
        loss.sum().backward()
        assert collectives.get_total_counts() <= 1
    fused_xent._parallel_rows.all_gather = all_gather
    assert sent == [12 * N_ROWS + 8]  # 12 bytes a row, and the range of the classes
    results = fused_xent.cross_entropy_with_statistics(own, target, **shards.given)
    for value in (loss, *results):
        value = value.detach()
        first = value.clone()
        dist.broadcast(first, 0)
        assert torch.equal(value, first)


@pytest.mark.parametrize("n_processes", SIZES)
def test_calls(n_processes):
    processes.run(check_calls, n_processes)


def check_large():
    """Class numbers are sent as float32, which does not have all integers from 2^24 on."""
    shards = Shards((2**23, 2**23 + 1))
    target = torch.tensor([shards.n_classes - 1])
    own = torch.zeros(1, shards.own.stop - shards.own.start)
    loss = fused_xent.cross_entropy(own, target, **shards.given)
    torch.testing.assert_close(loss, torch.tensor(float(shards.n_classes)).log())


def test_large():
    processes.run(check_large, 2)


# ---- errors --------------------------------------------------------------------------------------


def check_errors():
    shards = Shards()
    group, n_classes = shards.group, shards.n_classes
    own = torch.randn(4, shards.own.stop - shards.own.start)
    target = torch.tensor([0, n_classes - 1, -100, 1])

    def fails(error, message, logits=own, labels=target, **options):
        before = logits.detach().clone()
        with pytest.raises(error, match=message):
            fused_xent.cross_entropy(logits, labels, **(shards.given | options))
        assert torch.equal(logits, before)

    bad = target.clone()
    bad[1] = n_classes
    got = rf"target must be in \[0, {n_classes}\).*got {n_classes} at position \(1,\)"
    fails(IndexError, got, labels=bad)  # on every rank, so none waits for the others
    fails(ValueError, "num_classes must be given with vocab_start", num_classes=None)
    fails(ValueError, "vocab_start must not be negative, got -1", vocab_start=-1)
    fails(TypeError, "vocab_start must be an int, got float", vocab_start=1.5)
    fails(ValueError, "num_classes must be at least 1, got 0", num_classes=0)
    fails(TypeError, "process_group must be a ProcessGroup that this process", process_group=3)
    fails(ValueError, "vocab_start must be None without a process_group", process_group=None)
    fails(ValueError, "the ranks' shards must be", num_classes=n_classes + 1)
    fails(ValueError, "the ranks' shards must be", vocab_start=0, num_classes=n_classes)
    weight = torch.rand(own.shape[1], requires_grad=True)
    fails(RuntimeError, "weight must not require a gradient with process_group", weight=weight)
    indices = torch.zeros(4, 1, dtype=torch.int64)
    labels = torch.rand(4, 1, requires_grad=True)
    message = "target must not require a gradient with process_group"
    fails(RuntimeError, message, labels=labels, target_indices=indices)
    only = dist.new_group([0])
    if dist.get_rank() != 0:
        fails(TypeError, "process_group must be a ProcessGroup that this", process_group=only)
    leaf = own.clone().requires_grad_()
    loss = fused_xent.cross_entropy(leaf, target, **shards.given)
    with pytest.raises(RuntimeError, match="process_group must be None for create_graph=True"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="process_group must be None under the transforms"):
        torch.func.grad(lambda x: fused_xent.cross_entropy(x, target, process_group=group))(own)


def test_errors():
    processes.run(check_errors, 2)


def check_death():
    if dist.get_rank() == 1:
        raise KeyError("the second process dies")
    fused_xent.cross_entropy(torch.randn(4, 9), torch.zeros(4).long(), **Shards((9, 9)).given)


def test_a_process_that_dies_stops_the_others():
    with pytest.raises(AssertionError, match=r"process 1 failed(.|\n)*the second process dies"):
        processes.run(check_death, 2)


def check_hang():
    if dist.get_rank() == 1:
        time.sleep(1000)


def test_processes_that_take_too_long_are_stopped():
    with pytest.raises(AssertionError, match="process 1 has not ended in time"):
        processes.run(check_hang, 2, timeout=3)
