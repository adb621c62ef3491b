"""Losses of DTensors, FSDP2 and compiled code in several processes, against one process in float64.

Each test runs in processes of its own: a function `check_...` runs in each of them.
"""

import itertools

import processes
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

import fused_xent
from fused_xent import reference

pytestmark = pytest.mark.cpu("uses gloo between processes")

N_ROWS, N_CLASSES, H = 7, 201, 8  # over 4 processes 2, 2, 2, 1 rows and 51, 51, 51, 48 classes
CASES = [
    ("index", {}),
    ("index", {"weight": True, "token_weight": True, "lse_square_scale": 0.01}),
    ("index", {"weight": True, "label_smoothing": 0.1, "softcap": 5.0}),
    ("index", {"normalizer": 3.0}),
    ("sparse", {"token_weight": True}),
    ("dense", {"weight": True, "label_smoothing": 0.1, "token_weight": True}),
]
REDUCTIONS = ("mean", "sum", "none")
SHAPES = {2: [(2,)], 4: [(4,), (2, 2)]}  # of the meshes


def distributed(tensor, mesh, placements):
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def leaf(tensor, mesh, placements):
    return distributed(tensor, mesh, placements).requires_grad_()


def double(tensor):
    is_float = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    return tensor.detach().double() if is_float else tensor


def assert_near(found, wanted, tolerance, *what):
    found = found.detach()
    found = found.full_tensor() if isinstance(found, DTensor) else found
    assert found.shape == wanted.shape, what
    error = ((found.double() - wanted).abs() / (1 + wanted.abs())).max()
    assert error < tolerance, (what, error)


def gradients_of(values, leaves):
    """Return the gradients of a sum of values, each times its number."""
    return torch.autograd.grad(sum(i * x.sum() for i, x in enumerate(values, 1)), leaves)


# ---- placements ----------------------------------------------------------------------------------


def make_labels(kind):
    """Return target, target_indices and the same as class indices or labels of all classes."""
    target = torch.randint(N_CLASSES, (N_ROWS,))
    target[:3] = -100  # all in the first part of the rows
    if kind == "index":
        return target, None, target
    if kind == "dense":
        target = torch.randn(N_ROWS, N_CLASSES).softmax(1)
        return target, None, target.double()
    target, indices = torch.rand(N_ROWS, 5), torch.randint(N_CLASSES, (N_ROWS, 5))
    dense = torch.zeros(N_ROWS, N_CLASSES).double()
    return target, indices, dense.scatter_add(1, indices, target.double())


def check_placements():
    for shape in SHAPES[dist.get_world_size()]:
        mesh = init_device_mesh("cpu", shape)
        one = (Shard(0), Shard(1), Replicate())
        seed = 0
        for placements in itertools.product(one, repeat=len(shape)):
            if placements.count(Shard(1)) < 2:
                seed += 1  # so that each case has each reduction
                for case in CASES:
                    seed += 1
                    for reduction in REDUCTIONS if mesh.ndim == 1 else [REDUCTIONS[seed % 3]]:
                        torch.manual_seed(seed)
                        _check_case(mesh, placements, *case, reduction, given_as=seed // 2 % 3)


def _check_case(mesh, placements, kind, options, reduction, given_as):
    options, what = dict(options), (placements, kind, options, reduction)
    logits = torch.randn(N_ROWS, N_CLASSES) * 3
    target, indices, labels = make_labels(kind)
    weight = torch.rand(N_CLASSES) + 0.5 if options.pop("weight", False) else None
    tokens = torch.rand(N_ROWS) * (torch.rand(N_ROWS) > 0.2) if "token_weight" in options else None
    if reduction != "mean":
        options.pop("normalizer", None)
    options |= {"token_weight": tokens, "reduction": reduction}

    whole = logits.double().requires_grad_()
    in_double = {name: double(value) for name, value in options.items()}
    wanted = reference.cross_entropy_with_statistics(whole, labels, double(weight), **in_double)
    (grad_loss,) = torch.autograd.grad(wanted.loss.sum(), whole, retain_graph=True)
    (grad_all,) = gradients_of(wanted[:4], whole)

    if given_as > 0:  # as DTensors: of other placements than needed, or of those
        rows = [Replicate() if p == Shard(1) or given_as == 1 else p for p in placements]
        of_target = placements if kind == "dense" and given_as == 2 else rows
        target = distributed(target, mesh, of_target)
        indices = None if indices is None else distributed(indices, mesh, rows)
        options["token_weight"] = None if tokens is None else distributed(tokens, mesh, rows)
        if weight is not None:
            weight = distributed(weight, mesh, [Shard(0), *[Replicate()] * (mesh.ndim - 1)])
    own = leaf(logits, mesh, placements)
    given = (own, target, weight)
    loss = fused_xent.cross_entropy(*given, target_indices=indices, **options)
    found = fused_xent.cross_entropy_with_statistics(*given, target_indices=indices, **options)

    of_loss = {"none": Shard(0)}.get(reduction, Partial())
    is_row = [placement == Shard(0) for placement in placements]
    assert loss.placements == tuple(of_loss if row else Replicate() for row in is_row), what
    rows = tuple(Shard(0) if row else Replicate() for row in is_row)
    assert all(values.placements == rows for values in found[1:]), what
    assert_near(loss, wanted.loss.detach(), 2e-6, *what)
    for name in ("loss", "lse", "z_loss", "entropy"):
        assert_near(getattr(found, name), getattr(wanted, name).detach(), 5e-6, name, *what)
    assert torch.equal(found.argmax.full_tensor(), wanted.argmax), what
    assert torch.equal(found.correct.full_tensor(), wanted.correct), what
    (gradient,) = torch.autograd.grad(loss.sum(), own)
    assert gradient.placements == placements, what
    assert_near(gradient, grad_loss, 2e-6, *what)
    (gradient,) = gradients_of(found[:4], own)
    assert_near(gradient, grad_all, 1e-5, *what)


@pytest.mark.parametrize("n_processes", SHAPES)
def test_placements(n_processes):
    """Every placement of the logits, kind of labels and reduction, with statistics."""
    processes.run(check_placements, n_processes)


def test_plain_calls_do_not_import_dtensor(run_python):
    """The import takes longer than a small loss, and some builds of torch lack it."""
    code = (
        "import sys, torch, fused_xent\n"
        "x, t = torch.randn(4, 9, requires_grad=True), torch.arange(4)\n"
        "fused_xent.cross_entropy(x, t, label_smoothing=0.1).backward()\n"
        "fused_xent.linear_cross_entropy(x, torch.randn(5, 9), t, chunk_rows=2).backward()\n"
        "assert 'torch.distributed.tensor' not in sys.modules\n"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


# ---- calls ---------------------------------------------------------------------------------------


class Example:
    """Logits and targets, and the gradient of their mean in float64."""

    def __init__(self):
        torch.manual_seed(0)
        self.mesh = init_device_mesh("cpu", (2,))
        self.logits = torch.randn(6, 21)
        self.target = torch.tensor([-100, -100, 3, 0, 20, 11])
        whole = self.logits.double().requires_grad_()
        loss = nn.functional.cross_entropy(whole, self.target)
        (self.grad,) = torch.autograd.grad(loss, whole)
        self.loss = loss.detach()

    def leaf(self, placement):
        return leaf(self.logits, self.mesh, [placement])

    def check(self, loss, own, *what):
        assert_near(loss, self.loss, 1e-6, *what)
        loss.backward()
        assert_near(own.grad, self.grad, 1e-6, *what)
        assert own.grad.placements == own.placements, what


PLACEMENTS = (Shard(0), Shard(1), Replicate())


def check_calls():
    example = Example()
    target = example.target
    for placement in PLACEMENTS:
        own = example.leaf(placement)
        example.check(fused_xent.CrossEntropyLoss()(own, target), own, "module", placement)
        own = example.leaf(placement)
        with loss_parallel():
            example.check(fused_xent.cross_entropy(own, target), own, "loss_parallel", placement)
    images = torch.randn(2, 9, 3, 5)  # shards of a row dimension after the classes
    labels = torch.randint(9, (2, 3, 5))
    for reduction in ("mean", "none"):
        whole = images.double().requires_grad_()
        wanted = nn.functional.cross_entropy(whole, labels, reduction=reduction)
        (grad,) = torch.autograd.grad(wanted.sum(), whole)
        own = leaf(images, example.mesh, [Shard(2)])
        loss = fused_xent.cross_entropy(own, labels, reduction=reduction)
        assert_near(loss, wanted.detach(), 1e-6, "images")
        assert_near(*torch.autograd.grad(loss.sum(), own), grad, 1e-6, "images")
    with torch.no_grad():
        assert_near(fused_xent.cross_entropy(own, labels, reduction="none"), wanted, 1e-6)
    _check_autocast(example)
    _check_communication(example)


def _check_autocast(example):
    own = example.leaf(Shard(1))
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_xent.cross_entropy(own.to(torch.bfloat16), example.target)
    assert loss.dtype == torch.float32
    assert_near(loss, example.loss, 1e-2)


def _check_communication(example):
    """Split classes: one collective; a mean of split rows: one; and none in the backward."""
    for placement, reduction in itertools.product(PLACEMENTS, ("mean", "sum", "none")):
        is_class, is_row = placement == Shard(1), placement == Shard(0)
        own = example.leaf(placement)
        with CommDebugMode() as collectives:
            loss = fused_xent.cross_entropy(own, example.target, reduction=reduction)
            n_wanted = 1 if is_class or (is_row and reduction == "mean") else 0
            assert collectives.get_total_counts() == n_wanted, (placement, reduction)
            loss.to_local().sum().backward()
            assert collectives.get_total_counts() == n_wanted, (placement, reduction)


def check_other_gradients():
    """Of class weights, token weights, the normalizer and probabilities."""
    mesh = init_device_mesh("cpu", (2,))
    target = torch.randint(21, (6,))
    target[:2] = -100
    tensors = torch.randn(6, 21), torch.rand(21) + 0.5, torch.rand(6) + 0.2, torch.tensor(3.0)
    names = ("weight", "token_weight", "normalizer")
    for placement, n_given in itertools.product((Shard(0), Replicate()), (2, 3)):
        of_tensors = (placement, Replicate(), placement, Replicate())[: n_given + 1]
        leaves = [x.double().requires_grad_() for x in tensors[: n_given + 1]]
        loss = reference.cross_entropy(
            leaves[0], target, **dict(zip(names, leaves[1:], strict=False))
        )
        wanted = torch.autograd.grad(loss, leaves)
        given = [leaf(x, mesh, [p]) for x, p in zip(tensors, of_tensors, strict=False)]
        for others in (given[1:], [x.clone().requires_grad_() for x in tensors[1 : n_given + 1]]):
            options = dict(zip(names, others, strict=False))
            loss = fused_xent.cross_entropy(given[0], target, **options)
            found = torch.autograd.grad(loss, [given[0], *others])
            for name, gradient, right in zip(("input", *names), found, wanted, strict=False):
                assert_near(gradient, right, 1e-6, placement, name)
    labels = torch.randn(6, 21).softmax(1)
    for placement in PLACEMENTS:
        whole = labels.double().requires_grad_()
        wanted = nn.functional.cross_entropy(tensors[0].double(), whole)
        own = leaf(labels, mesh, [placement])
        loss = fused_xent.cross_entropy(distributed(tensors[0], mesh, [placement]), own)
        (gradient,) = torch.autograd.grad(loss, own)
        assert_near(gradient, *torch.autograd.grad(wanted, whole), 1e-6, placement)


def check_overwriting():
    example = Example()
    target = example.target
    error = "modified by an inplace operation"
    for placement, mode in itertools.product(PLACEMENTS, ("inplace_backward", "grad_in_forward")):
        own = example.leaf(placement)
        computed = own * 1
        loss = fused_xent.cross_entropy(computed, target, **{mode: True})
        example.check(loss, own, mode, placement)
        assert_near(computed, example.grad, 1e-6, "overwritten", placement)

        computed = example.leaf(placement) * 1
        other = computed.square().sum().full_tensor()  # saves the logits for its backward
        fused_xent.cross_entropy(computed, target, **{mode: True}).backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=error):
            other.backward()
        mine = example.leaf(placement).to_local().detach().requires_grad_()
        shape, stride = example.logits.shape, example.logits.stride()
        of_mine = DTensor.from_local(mine, example.mesh, [placement], shape=shape, stride=stride)
        for bad in (example.leaf(placement), of_mine):
            with pytest.raises(RuntimeError, match=f"{mode} must be False where input is a leaf"):
                fused_xent.cross_entropy(bad, target, **{mode: True})
    computed = example.leaf(Shard(1)) * 1
    loss = fused_xent.cross_entropy(computed, target)
    computed.mul_(2)
    with pytest.raises(RuntimeError, match=error):
        loss.backward()


def check_second_derivatives():
    example = Example()
    whole = example.logits.double().requires_grad_()
    loss = nn.functional.cross_entropy(whole, example.target)
    (grad,) = torch.autograd.grad(loss, whole, create_graph=True)
    (wanted,) = torch.autograd.grad(grad.square().sum(), whole)
    for placement in PLACEMENTS:
        own = example.leaf(placement)
        loss = fused_xent.cross_entropy(own, example.target)
        if placement == Shard(1):
            with pytest.raises(RuntimeError, match="create_graph=True"):
                torch.autograd.grad(loss, own, create_graph=True)
            continue
        (grad,) = torch.autograd.grad(loss, own, create_graph=True)
        (found,) = torch.autograd.grad(grad.square().sum(), own)
        assert_near(found, wanted, 1e-6, placement)


def check_in_two_processes():
    """What does not need more processes runs in the same two, which take seconds to start."""
    check_calls()
    check_other_gradients()
    check_overwriting()
    check_second_derivatives()
    check_errors()
    check_linear_errors()


def test_calls():
    processes.run(check_in_two_processes, 2)


# ---- errors --------------------------------------------------------------------------------------


def check_errors():
    example = Example()
    logits, target, mesh = example.logits, example.target, example.mesh
    by_rows, by_classes = (distributed(logits, mesh, [Shard(dim)]) for dim in (0, 1))

    def fails(error, message, *arguments, **options):
        with pytest.raises(error, match=message):
            fused_xent.cross_entropy(*arguments, **options)

    partial = DTensor.from_local(logits, mesh, [Partial()])
    advice = r"input must not be Partial.*by input\.redistribute\(placements=\[Replicate\(\)\]\)"
    fails(ValueError, advice, partial, target)
    own = target[:3] if dist.get_rank() == 0 else target[3:]
    advice = r"target must have all rows or be a DTensor.*DTensor\.from_local\(target, mesh, "
    fails(ValueError, advice, by_rows, own)
    message = r"token_weight must have all rows.*shape \(3,\) for logits of shape \(6, 21\)"
    fails(ValueError, message, by_rows, target, token_weight=torch.ones(3))
    message = r"target must have shape \(6,\).* or \(6, 21\)"
    fails(ValueError, message, by_rows, target[:4])
    fails(TypeError, "target must be a tensor, got list", by_rows, [0, 1])
    message = "target must be a plain tensor where input is one, got a DTensor"
    fails(ValueError, message, logits, distributed(target, mesh, [Replicate()]))
    message = "process_group must be None where input is a DTensor"
    fails(ValueError, message, by_classes, target, process_group=dist.group.WORLD)
    fails(ValueError, "num_classes must be None", by_classes, target, num_classes=21)
    other = init_device_mesh("cpu", (1, 2))
    message = "target must be on input's mesh"
    fails(ValueError, message, by_rows, distributed(target, other, [Replicate(), Shard(0)]))
    twice = distributed(logits, other, [Shard(1), Shard(1)])
    fails(ValueError, "classes sharded over one dimension of the mesh", twice, target)
    bad = target.clone()
    bad[2] = 21
    for bad_logits in (by_rows, by_classes):
        own = bad_logits if dist.get_rank() == 0 or bad_logits is by_classes else None
        if own is not None:  # only the process with the row knows
            fails(IndexError, r"target must be in \[0, 21\).*got 21 at position \(2,\)", own, bad)
        else:
            fused_xent.cross_entropy(bad_logits, bad)
    with pytest.raises(TypeError, match=r"must be a plain tensor here, got a DTensor: pass its to"):
        fused_xent.selective_log_softmax(by_classes, target)


def check_linear_errors():
    mesh = init_device_mesh("cpu", (2,))
    hidden, weight, target = torch.randn(6, H), torch.randn(21, H), torch.arange(6)

    def fails(message, *arguments, **options):
        with pytest.raises(ValueError, match=message):
            fused_xent.linear_cross_entropy(*arguments, **options)

    shards = distributed(weight, mesh, [Shard(0)])
    message = "linear_weight must be a plain tensor where input is one.*passed to fully_shard.*"
    fails(f"{message}tensor parallelism pass input as a DTensor", hidden, shards, target)
    whole, by_rows = (distributed(hidden, mesh, [p]) for p in (Replicate(), Shard(0)))
    message = "input must not have its features sharded"
    fails(message, distributed(hidden, mesh, [Shard(1)]), shards, target)
    of_features = distributed(weight, mesh, [Shard(1)])
    fails("linear_weight must not have its features sharded", whole, of_features, target)
    fails(
        "linear_weight must not be Partial",
        whole,
        DTensor.from_local(weight, mesh, [Partial()]),
        target,
    )
    fails("shift must be 0 where input's sequences are sharded", by_rows, weight, target, shift=1)
    fails("target must have all rows or be a DTensor", by_rows, weight, target[:3])
    group = dist.group.WORLD
    fails("process_group must be None", whole, shards, target, process_group=group)


# ---- linear layers -------------------------------------------------------------------------------


def check_linear():
    for shape in {2: [(2,)], 4: [(2, 2)]}[dist.get_world_size()]:
        mesh = init_device_mesh("cpu", shape)
        of_input = itertools.product((Shard(0), Shard(1), Replicate()), repeat=len(shape))
        of_weight = itertools.product((Shard(0), Replicate()), repeat=len(shape))
        seed = 0
        for placements in itertools.product(of_input, of_weight):
            if placements[1].count(Shard(0)) < 2:
                for shift in (0, 1):
                    seed += 1
                    for reduction in REDUCTIONS if mesh.ndim == 1 else [REDUCTIONS[seed % 3]]:
                        torch.manual_seed(seed)
                        options = {"reduction": reduction, "shift": shift}
                        _check_layer(mesh, *placements, **options, is_plain=seed % 4 < 2)


def _check_layer(mesh, of_input, of_weight, reduction, shift, is_plain):
    pairs = list(zip(of_input, of_weight, strict=True))
    if shift and any(pair == (Shard(1), Replicate()) for pair in pairs):
        return  # refused
    what = (of_input, of_weight, reduction, shift)
    n_classes = 21
    layer = torch.randn(2, 4, H), torch.randn(n_classes, H), torch.randn(n_classes)
    target = torch.randint(n_classes, (2, 4))
    target[0, :3] = -100
    weight, tokens = torch.rand(n_classes) + 0.5, torch.rand(2, 4)
    leaves = [x.double().requires_grad_() for x in layer]
    logits = nn.functional.linear(*leaves)
    rows = logits[:, : 4 - shift], target[:, shift:], weight.double()
    options = {"reduction": reduction, "dim": -1, "token_weight": tokens[:, shift:].double()}
    wanted = reference.cross_entropy_with_statistics(*rows, **options)
    grads = gradients_of(wanted[:2], leaves)

    is_plain = is_plain and Shard(0) not in of_weight
    own = [leaf(layer[0], mesh, of_input)]
    for x in layer[1:]:
        own.append(x.clone().requires_grad_() if is_plain else leaf(x, mesh, of_weight))
    hidden, linear_weight, bias = own
    options = {"linear_bias": bias, "reduction": reduction, "weight": weight, "chunk_rows": 2}
    options |= {"token_weight": tokens, "shift": shift}
    loss = fused_xent.linear_cross_entropy(hidden, linear_weight, target, **options)
    assert_near(loss, wanted.loss.detach(), 2e-6, *what)
    given = (hidden, linear_weight, target)
    found = fused_xent.linear_cross_entropy_with_statistics(*given, **options)
    assert_near(found.lse, wanted.lse.detach(), 2e-6, *what)
    assert torch.equal(found.argmax.full_tensor(), wanted.argmax), what
    for gradient, x, right in zip(gradients_of(found[:2], own), own, grads, strict=True):
        assert_near(gradient, right, 3e-6, *what)
        if isinstance(x, DTensor):
            assert gradient.placements == _of_gradient(x, of_input), what
        else:
            assert not isinstance(gradient, DTensor)
    torch.autograd.grad(loss.sum(), own)


def _of_gradient(tensor, of_input):
    """Return the placements that torch's own operations give a gradient.

    Where the rows are sharded and the tensor is not, each process has a part of a sum.
    """
    return tuple(
        Partial() if of_rows.is_shard() and placement.is_replicate() else placement
        for placement, of_rows in zip(tensor.placements, of_input, strict=True)
    )


@pytest.mark.parametrize("n_processes", [2, 4])
def test_linear(n_processes):
    """Every placement of hidden states and weight: rows, classes, both (sequence parallelism)."""
    processes.run(check_linear, n_processes)


# ---- tensor parallelism --------------------------------------------------------------------------


def check_tensor_parallel():
    mesh = init_device_mesh("cpu", (2,))
    hidden, target = torch.randn(2, 3, H), torch.tensor([[-100, 1, 20], [4, -100, 7]])
    whole = nn.Linear(H, 21).double()
    logits = whole(hidden.double())
    wanted = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
    wanted.backward()

    def make(kind, *arguments, **options):
        module = kind(*arguments, **options)
        layer = getattr(module, "linear", module)
        layer.load_state_dict({k: v.float() for k, v in whole.state_dict().items()})
        return module, layer

    def check(loss, layer, what):
        loss.backward()
        assert_near(loss, wanted.detach(), 1e-6, what)
        assert_near(layer.weight.grad, whole.weight.grad, 1e-6, what)
        assert_near(layer.bias.grad, whole.bias.grad, 1e-6, what)

    column = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    model, layer = make(nn.Linear, H, 21)
    parallelize_module(model, mesh, column)
    check(fused_xent.CrossEntropyLoss(dim=-1)(model(hidden), target), layer, "DTensor")
    model, layer = make(nn.Linear, H, 21)
    parallelize_module(model, mesh, ColwiseParallel())
    start = 11 * dist.get_rank()
    shard = {"process_group": mesh.get_group(), "vocab_start": start, "num_classes": 21}
    loss = fused_xent.cross_entropy(model(hidden), target, dim=-1, **shard)
    check(loss, layer, "process_group")
    model, layer = make(fused_xent.LinearCrossEntropyLoss, H, 21, bias=True)
    parallelize_module(model, mesh, {"linear": ColwiseParallel(output_layouts=Replicate())})
    check(model(hidden, target), layer, "linear loss")


# ---- FSDP2 ---------------------------------------------------------------------------------------


class Model(nn.Module):
    """An embedding, a layer and the loss."""

    def __init__(self, is_tied=False):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(21, H)
        self.trunk = nn.Linear(H, H)
        self.loss = fused_xent.LinearCrossEntropyLoss(H, 21, chunk_rows=2, reduction="sum")
        if is_tied:
            self.loss.linear.weight = self.embedding.weight

    def forward(self, tokens, target):
        return self.loss(self.trunk(self.embedding(tokens)).tanh(), target)


SHARDED = {
    "root": [],
    "loss module": ["loss"],
    "inner linear": ["loss.linear"],
    "embedding and inner linear": ["embedding", "loss.linear"],
}


def check_fsdp():
    mesh = init_device_mesh("cpu", (2,))
    tokens, target = torch.arange(8) + 3, torch.arange(8) * 2
    target[:3] = -100
    mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)

    def check(model, is_tied, what, tolerance=1e-6):
        whole = Model(is_tied).double()
        (whole(tokens, target) / 2).backward()  # gradients are averaged
        model(tokens[mine], target[mine]).backward()
        for name, parameter in model.named_parameters():
            right = whole.get_parameter(name.removeprefix("module.")).grad
            assert_near(parameter.grad, right, tolerance, what, name)

    for what, names in SHARDED.items():
        model = Model()
        for name in names:
            fully_shard(model.get_submodule(name), mesh=mesh)
        check(fully_shard(model, mesh=mesh), False, what)
    check(fully_shard(Model(True), mesh=mesh), True, "tied")
    model = Model(True)
    fully_shard([model.embedding, model.loss.linear], mesh=mesh)
    check(fully_shard(model, mesh=mesh), True, "tied, in a group")
    model = Model()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model.loss.linear, mesh=mesh, mp_policy=policy)
    check(fully_shard(model, mesh=mesh), False, "bfloat16", 2e-2)
    check(nn.parallel.DistributedDataParallel(Model()), False, "DDP")

    model = Model()  # two losses before the backward, with the weight whole in between
    fully_shard(model.loss.linear, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    (model(tokens[mine], target[mine]) + model(tokens[mine], target[mine])).backward()
    whole = Model().double()
    whole(tokens, target).backward()
    assert_near(model.loss.linear.weight.grad, whole.loss.linear.weight.grad, 1e-6, "twice")

    hidden, weight = torch.randn(4, H), model.loss.linear.weight
    with pytest.raises(ValueError, match=r"must be a plain tensor where input is one.*fully_shard"):
        fused_xent.linear_cross_entropy(hidden, weight, target[mine])


# ---- training ------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.mix = nn.Linear(16, 16)

    def forward(self, x):
        mean = x.cumsum(1) / torch.arange(1, x.shape[1] + 1).unsqueeze(1)  # of the tokens before
        x = x + self.mix(mean)
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Transformer(nn.Module):
    """A transformer whose attention is a mean of the tokens before, and its logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(61, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 61, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def train(model, mine, loss_of, n_steps=12):
    """Return the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    numbers = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(n_steps):
        tokens = torch.randint(61, (4, 1), generator=numbers) + torch.arange(9)
        tokens = tokens // 4
        target = tokens[:, 1:].clone()
        target[0, :5] = -100  # more in the first half of the batch
        loss = loss_of(model(tokens[mine, :-1]), target, mine)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def check_training():
    """Two processes share the layers, two the batch: the curve is that of one process."""

    def alone(logits, target, mine):
        return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())

    wanted = torch.stack(train(Transformer(), slice(0, 4), alone))

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = Transformer()
    of_block = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh["tensor"], of_block)
    column = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh["tensor"], {"head": column})
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])

    def shared(logits, target, mine):
        assert isinstance(logits, DTensor)
        n_kept = (target != -100).sum()
        # The gradients are averaged over the two halves of the batch.
        return fused_xent.cross_entropy(logits, target[mine], dim=-1, normalizer=n_kept / 2)

    half = mesh["data"].get_local_rank()
    losses = train(model, slice(2 * half, 2 * half + 2), shared)
    found = torch.stack([loss.full_tensor() for loss in losses]) / 2
    dist.all_reduce(found, group=mesh["data"].get_group())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert wanted[-1] < wanted[0] / 2


def test_training():
    processes.run(check_training, 4)


# ---- compiled code -------------------------------------------------------------------------------


def check_parallel_modules():
    check_tensor_parallel()
    check_fsdp()


def test_parallel_modules():
    processes.run(check_parallel_modules, 2)


def check_compiled():
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    own = slice(11 * rank, 11 * rank + 11 - rank)
    shard = {"process_group": dist.group.WORLD, "vocab_start": 11 * rank, "num_classes": 21}
    logits, target = torch.randn(6, 21), torch.randint(21, (6,))
    target[:2] = -100
    labels = torch.randn(6, 21).softmax(1)

    def check(loss, target, mine, what):
        torch.compiler.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        values, grads = [], []
        for function in (loss, compiled):
            leaf = mine.detach().clone().requires_grad_()
            values.append(function(leaf, target))
            grads += torch.autograd.grad(values[-1].sum(), leaf)
        for one, other in (values, grads):
            assert type(one) is type(other), what
            assert getattr(one, "placements", 0) == getattr(other, "placements", 0), what
            one, other = (getattr(x, "to_local", lambda x=x: x)() for x in (one, other))
            assert torch.equal(one, other), what

    def with_statistics(x, target):
        found = fused_xent.cross_entropy_with_statistics(x * 2, target, **shard)
        return found.loss + (found.lse + found.entropy).sum() + found.correct.sum()

    check(with_statistics, target, logits[:, own], "statistics")
    for labels_given, options in (
        (target, {"reduction": "none", "label_smoothing": 0.1, "inplace_backward": True}),
        (labels[:, own], {}),
    ):

        def loss(x, target, options=options):
            return fused_xent.cross_entropy(x * 2, target, **shard, **options)

        check(loss, labels_given, logits[:, own], options)
    for placement in PLACEMENTS[:2]:
        mine = distributed(logits, mesh, [placement])

        def loss(x, target):
            return fused_xent.cross_entropy(x * 2, target, inplace_backward=True)

        check(loss, target, mine, placement)


def test_compiled():
    """Of process_group and of DTensors, in one graph each."""
    processes.run(check_compiled, 2)
