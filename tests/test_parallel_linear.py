"""Losses of a linear layer that is split over processes, against all classes in float64.

Each test runs in processes of its own: a function `check_...` runs in each of them.
"""

import itertools

import processes
import pytest
import torch
import torch.distributed as dist
from shards import (
    N_FEATURES,
    N_ROWS,
    SIZES,
    Shards,
    assert_gradients,
    assert_near,
    assert_same_on_all_ranks,
    double,
    leaves,
    make_layer,
    noting_collectives,
    own_layer,
)
from torch.utils._python_dispatch import TorchDispatchMode

import fused_xent
from fused_xent import (
    linear_cross_entropy,
    linear_cross_entropy_with_statistics,
    linear_selective_log_softmax,
    reference,
)

pytestmark = pytest.mark.cpu("uses gloo between processes")

OPTIONS = [
    {},
    {"label_smoothing": 0.2},
    {"softcap": 5.0, "lse_square_scale": 0.01},
    {"label_smoothing": 0.1, "focal_gamma": 1.0, "logit_scale": 0.5},
]
KINDS = ("index", "sparse", "dense")
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def make_labels(kind, n_classes):
    """Return target and target_indices of all classes."""
    if kind == "index":
        target = torch.randint(n_classes, (N_ROWS,))
        target[3] = -100
        return target, None
    if kind == "dense":
        return torch.randn(N_ROWS, n_classes).softmax(1), None
    indices = torch.randint(n_classes, (N_ROWS, 5))
    indices[torch.rand(N_ROWS, 5) < 0.2] = -100
    return torch.rand(N_ROWS, 5), indices


def wanted_of(layer, target, weight=None, **options):
    """Return statistics of all classes in float64, and the leaves that they are computed from."""
    exact = leaves(map(double, layer))
    hidden, linear_weight, bias = exact
    logits = (hidden @ linear_weight.t() + bias).flatten(0, -2)
    given = {name: double(x) if torch.is_tensor(x) else x for name, x in options.items()}
    return reference.cross_entropy_with_statistics(
        logits, double(target), double(weight), **given
    ), exact


def own_loss(function, shards, layer, target, weight=None, **options):
    hidden, linear_weight, bias = layer
    if target.is_floating_point() and options.get("target_indices") is None:
        target = target[:, shards.own]
    weight = None if weight is None else weight[shards.own]
    options = {**shards.given, **options}
    return function(hidden, linear_weight, target, linear_bias=bias, weight=weight, **options)


# ---- every option --------------------------------------------------------------------------------


def check_options():
    shards = Shards()
    cases = itertools.product(KINDS, OPTIONS, (False, True), ("mean", "sum", "none"))
    for seed, (kind, options, has_weights, reduction) in enumerate(cases):
        torch.manual_seed(seed)
        layer = make_layer(shards.n_classes)
        target, indices = make_labels(kind, shards.n_classes)
        weight = torch.rand(shards.n_classes) + 0.3 if has_weights else None
        tokens = torch.rand(N_ROWS) * (torch.rand(N_ROWS) > 0.3) if has_weights else None
        given = {"token_weight": tokens, "target_indices": indices, "reduction": reduction}
        given |= {"weight": weight, **options}
        wanted, exact = wanted_of(layer, target, **given)
        upstream = [torch.randn_like(x) for x in (wanted.loss, wanted.lse, wanted.entropy)]
        values = (wanted.loss, wanted.lse, wanted.entropy)
        of_loss = torch.autograd.grad(values[0], exact, upstream[0], retain_graph=True)
        of_all = torch.autograd.grad(values, exact, upstream)

        sequence_parallel, chunk_rows = seed % 2 == 0, (None, 5, 1)[seed % 3]
        what = (kind, options, has_weights, reduction, sequence_parallel, chunk_rows)
        own = own_layer(shards, layer, sequence_parallel)
        given |= {"sequence_parallel": sequence_parallel, "chunk_rows": chunk_rows}
        loss = own_loss(linear_cross_entropy, shards, own, target, **given)
        assert_near(loss, wanted.loss, 2e-6, what)
        found = torch.autograd.grad(loss, own, upstream[0].float())
        assert_gradients(found, of_loss, shards, 1e-5, what, sequence_parallel)

        all_found = own_loss(linear_cross_entropy_with_statistics, shards, own, target, **given)
        for name in ("loss", "lse", "z_loss", "entropy"):
            assert_near(getattr(all_found, name), getattr(wanted, name), 4e-6, (name, *what))
        assert torch.equal(all_found.argmax, wanted.argmax), what
        assert torch.equal(all_found.correct, wanted.correct), what
        assert_same_on_all_ranks(loss, *(x.float() for x in all_found))
        values = (all_found.loss, all_found.lse, all_found.entropy)
        found = torch.autograd.grad(values, own, [x.float() for x in upstream])
        assert_gradients(found, of_all, shards, 2e-5, what, sequence_parallel)


# ---- numbers -------------------------------------------------------------------------------------


def check_numbers():
    shards = Shards()
    for dtype, chunk_rows in itertools.product(TOLERANCES, (None, 5)):
        _check_dtype(shards, dtype, chunk_rows)
    _check_sums_of_grad_hidden(shards)
    _check_loss_scale(shards)
    _check_autocast(shards)


def _check_dtype(shards, dtype, chunk_rows):
    layer, (target, _) = make_layer(shards.n_classes, dtype), make_labels("index", shards.n_classes)
    wanted, exact = wanted_of(layer, target)
    right = torch.autograd.grad(wanted.loss * 3, exact)
    types = {dtype, torch.promote_types(dtype, torch.float32)}
    for sequence_parallel, logits_dtype in itertools.product((False, True), types):
        own = own_layer(shards, layer, sequence_parallel)
        given = {"logits_dtype": logits_dtype, "sequence_parallel": sequence_parallel}
        given |= {"chunk_rows": chunk_rows}
        loss = own_loss(linear_cross_entropy, shards, own, target, **given)
        assert loss.dtype == logits_dtype
        what = (dtype, chunk_rows, logits_dtype, sequence_parallel)
        assert_near(loss, wanted.loss, TOLERANCES[dtype], what)
        # Not 1, so that the backward scales; a power of two would not be rounded.
        found = torch.autograd.grad(loss * 3, own)
        assert all(x.dtype == dtype for x in found)
        assert_gradients(found, right, shards, TOLERANCES[dtype], what, sequence_parallel)
        if not sequence_parallel:
            assert_same_on_all_ranks(found[0])


def _check_sums_of_grad_hidden(shards):
    """Parts of ranks that cancel are added before they are rounded to 16 bits."""
    layer, (target, _) = make_layer(shards.n_classes), make_labels("index", shards.n_classes)
    # All classes have almost the same weights, but a rank's part is not minus that of the others.
    layer[1] = 64 + torch.linspace(0, 2, shards.n_classes).unsqueeze(1).expand_as(layer[1])
    layer = [x.bfloat16() for x in layer]
    layer[0] = layer[0] / 64
    given = {"logits_dtype": torch.float32, "reduction": "sum"}
    wanted, exact = wanted_of(layer, target, reduction="sum")
    right = torch.autograd.grad(wanted.loss, exact)
    own = own_layer(shards, layer)
    loss = own_loss(linear_cross_entropy, shards, own, target, **given)
    found = torch.autograd.grad(loss, own)
    # Rounded parts would be off by 2^-9 of 64.
    assert (found[0].double() - right[0]).abs().max() < 0.02


def _check_loss_scale(shards):
    """In float16, gradients that would be 0 without the upstream gradient are not."""
    layer = make_layer(shards.n_classes, torch.float16)
    target, scale = torch.randint(shards.n_classes, (N_ROWS,)), 1e9
    wanted, exact = wanted_of(layer, target, reduction="sum")
    right = torch.autograd.grad(wanted.loss, exact)
    own = own_layer(shards, layer)
    given = {"normalizer": scale, "loss_dtype": torch.float32}
    loss = own_loss(linear_cross_entropy, shards, own, target, **given)
    found = torch.autograd.grad(loss * scale, own)
    assert_gradients(found, right, shards, 2e-3, ("scale",))


def _check_autocast(shards):
    layer, (target, _) = make_layer(shards.n_classes), make_labels("index", shards.n_classes)
    wanted, exact = wanted_of(layer, target)
    right = torch.autograd.grad(wanted.loss, exact)
    for sequence_parallel in (False, True):
        own = own_layer(shards, layer, sequence_parallel)
        with torch.autocast("cpu", torch.bfloat16):
            given = {"sequence_parallel": sequence_parallel}
            loss = own_loss(linear_cross_entropy, shards, own, target, **given)
        assert loss.dtype == torch.float32
        assert_near(loss, wanted.loss, 1e-2, "autocast")
        found = torch.autograd.grad(loss, own)
        assert all(x.dtype == torch.float32 for x in found)
        assert_gradients(found, right, shards, 1e-2, ("autocast",), sequence_parallel)


# ---- shapes --------------------------------------------------------------------------------------


def check_shapes():
    shards = Shards()
    for rows in ((), (0,), (6, 5), (6, 2, 3)):
        for reduction in ("none", "mean"):
            _check_rows(shards, rows, reduction)
    _check_all_ignored(shards)
    _check_shift(shards)
    for kind, chunk_rows in itertools.product(KINDS, (None, 5)):
        _check_padding(shards, kind, chunk_rows)
    _check_module(shards)


def _check_rows(shards, rows, reduction):
    layer = make_layer(shards.n_classes, rows=rows)
    target = torch.randint(shards.n_classes, rows)
    wanted, exact = wanted_of(
        [layer[0].reshape(-1, N_FEATURES), *layer[1:]], target.flatten(), reduction=reduction
    )
    right = torch.autograd.grad(wanted.loss.sum(), exact)
    right = (right[0].view(layer[0].shape), *right[1:])
    for sequence_parallel in (False, True) if rows else (False,):
        own = own_layer(shards, layer, sequence_parallel)
        if not sequence_parallel and len(rows) > 1:  # strides of another layout
            own[0] = own[0].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        options = {"reduction": reduction, "sequence_parallel": sequence_parallel, "chunk_rows": 2}
        loss = own_loss(linear_cross_entropy, shards, own, target, **options)
        what = (rows, reduction, sequence_parallel)
        assert loss.shape == (rows if reduction == "none" else ()), what
        if target.numel() or reduction == "none":
            assert_near(loss.flatten(), wanted.loss.flatten(), 2e-6, what)
            found = torch.autograd.grad(loss.sum(), own)
            assert_gradients(found, right, shards, 1e-5, what, sequence_parallel)
        else:
            assert loss.isnan()


def _check_all_ignored(shards):
    """Rows that are left out may hold anything, and have gradient 0."""
    layer = make_layer(shards.n_classes)
    target, tokens = torch.randint(shards.n_classes, (N_ROWS,)), torch.rand(N_ROWS)
    target[:3], tokens[3:6] = -100, 0
    wanted, exact = wanted_of(layer, target, token_weight=tokens)
    right = torch.autograd.grad(wanted.loss, exact)
    layer[0][:6] = 1e30
    own = own_layer(shards, layer)
    given = {"token_weight": tokens, "chunk_rows": 4}
    loss = own_loss(linear_cross_entropy, shards, own, target, **given)
    assert_near(loss, wanted.loss, 1e-6, "ignored")
    found = torch.autograd.grad(loss, own)
    assert (found[0][:6] == 0).all()
    assert_gradients(found, right, shards, 1e-5, ("ignored",))
    given = {"reduction": "sum", "chunk_rows": 4}
    loss = own_loss(linear_cross_entropy, shards, own, torch.full_like(target, -100), **given)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, own))


def _check_shift(shards):
    """Next-token labels, and rows that are dropped, as without process_group."""
    layer = make_layer(shards.n_classes, rows=(3, 7))
    target = torch.randint(shards.n_classes, (3, 7))
    target[1, 2:5] = -100
    options = {"reduction": "none", "shift": 1, "drop_ignored": True}
    exact = leaves(map(double, layer))
    right = linear_cross_entropy(*exact[:2], target, linear_bias=exact[2], **options)
    own = own_layer(shards, layer)
    loss = own_loss(linear_cross_entropy, shards, own, target, chunk_rows=4, **options)
    assert_near(loss, right, 2e-6, "shift")
    found, wanted = (torch.autograd.grad(x.sum(), y) for x, y in ((loss, own), (right, exact)))
    assert_gradients(found, wanted, shards, 1e-5, ("shift",))


def _check_padding(shards, kind, chunk_rows):
    """Classes from num_classes on have probability and gradient 0, whatever their weights."""
    n_classes = shards.n_classes
    size = -(-n_classes // shards.n_ranks) + 1
    layer, (target, indices) = make_layer(n_classes), make_labels(kind, n_classes)
    weight = torch.rand(n_classes)
    wanted, exact = wanted_of(layer, target, weight, target_indices=indices)
    right = torch.autograd.grad(wanted.loss, exact)
    padding = size * shards.n_ranks - n_classes

    def padded(tensor, dim=0):
        shape = list(tensor.shape)
        shape[dim] = padding
        whole = torch.cat([tensor, tensor.new_full(shape, torch.nan)], dim)
        return whole.narrow(dim, shards.rank * size, size).contiguous()

    own = leaves((layer[0], padded(layer[1]), padded(layer[2])))
    if kind == "dense":
        target = padded(target, 1)
    options = {"process_group": shards.group, "num_classes": n_classes, "chunk_rows": chunk_rows}
    options |= {"linear_bias": own[2], "weight": padded(weight), "target_indices": indices}
    loss = linear_cross_entropy(*own[:2], target, **options)
    assert_near(loss, wanted.loss, 2e-6, "padding")
    found = torch.autograd.grad(loss, own)
    assert_near(found[0], right[0], 1e-5, "padding")
    for gradient, of_all in zip(found[1:], right[1:], strict=True):
        assert torch.equal(gradient.isnan(), torch.zeros_like(gradient, dtype=torch.bool))
        first = shards.rank * size
        of_rank = of_all[first : first + size]
        assert_near(gradient[: len(of_rank)], of_rank, 1e-5, "padding")
        assert (gradient[len(of_rank) :] == 0).all()


def _check_module(shards):
    """The module's layer has an equal part of the classes on each rank."""
    layer, n_classes = make_layer(shards.n_classes), shards.n_classes
    target, _ = make_labels("index", n_classes)
    wanted, exact = wanted_of(layer, target, label_smoothing=0.1)
    right = torch.autograd.grad(wanted.loss, exact)
    size = -(-n_classes // shards.n_ranks)
    padded = torch.zeros(size * shards.n_ranks, N_FEATURES)
    padded[:n_classes] = layer[1]
    options = {"bias": True, "label_smoothing": 0.1, "process_group": shards.group}
    module = fused_xent.LinearCrossEntropyLoss(N_FEATURES, n_classes, **options)
    assert module.linear.weight.shape == (size, N_FEATURES)
    rank = slice(shards.rank * size, (shards.rank + 1) * size)
    bias = torch.zeros(size * shards.n_ranks)
    bias[:n_classes] = layer[2]
    module.load_state_dict({"linear.weight": padded[rank], "linear.bias": bias[rank]})
    hidden = layer[0].clone().requires_grad_()
    loss = module(hidden, target)
    loss.backward()
    assert_near(loss, wanted.loss, 2e-6, "module")
    assert_near(hidden.grad, right[0], 1e-5, "module")
    of_rank = right[1][rank]
    assert_near(module.linear.weight.grad[: len(of_rank)], of_rank, 1e-5, "module")
    # Other shards: an assigned weight, and where its classes start.
    module = fused_xent.LinearCrossEntropyLoss(N_FEATURES, n_classes, **options)
    module.vocab_start = shards.own.start
    module.linear.weight = torch.nn.Parameter(layer[1][shards.own].clone())
    module.linear.bias = torch.nn.Parameter(layer[2][shards.own].clone())
    loss = module(hidden, target)
    assert_near(loss, wanted.loss, 2e-6, "module")


# ---- autograd ------------------------------------------------------------------------------------


def check_autograd():
    shards = Shards()
    layer, (target, _) = make_layer(shards.n_classes), make_labels("index", shards.n_classes)
    wanted, exact = wanted_of(layer, target)
    right = torch.autograd.grad(wanted.loss * 3, exact, retain_graph=True)
    options = {"chunk_rows": 5}
    own = own_layer(shards, layer)
    loss = own_loss(linear_cross_entropy, shards, own, target, **options)
    for _ in range(2):  # the second one recomputes
        found = torch.autograd.grad(loss * 3, own, retain_graph=True)
        assert_gradients(found, right, shards, 1e-5, ("again",))
    for i in range(3):  # gradients of one tensor of the layer
        own = own_layer(shards, layer)
        for tensor in own:
            tensor.requires_grad_(tensor is own[i])
        loss = own_loss(linear_cross_entropy, shards, own, target, **options)
        (found,) = torch.autograd.grad(loss * 3, own[i])
        assert_near(found, right[i] if i == 0 else right[i][shards.own], 1e-5, i)
    with torch.no_grad():
        loss = own_loss(linear_cross_entropy, shards, own, target, **options)
    assert not loss.requires_grad
    assert_near(loss, wanted.loss, 1e-6, "no_grad")
    _check_parts_of_grad_hidden(shards, layer, target, right[0] / 3)
    _check_graphs(shards, layer, target)
    if shards.n_ranks == 2:  # compiling takes seconds
        _check_compiled(shards, layer, target)


def _check_parts_of_grad_hidden(shards, layer, target, right):
    """With reduce_grad_hidden=False, the sum over the ranks is the gradient."""
    for reduction in ("mean", "none"):
        own = own_layer(shards, layer)
        options = {"reduce_grad_hidden": False, "chunk_rows": 5, "reduction": reduction}
        loss = own_loss(linear_cross_entropy, shards, own, target, **options)
        if reduction == "none":
            loss = loss.sum() / (target != -100).sum()
        (found,) = torch.autograd.grad(loss, own[0])
        dist.all_reduce(found)
        assert_near(found, right, 1e-5, reduction)


def _check_graphs(shards, layer, target):
    own = own_layer(shards, layer)
    loss = own_loss(linear_cross_entropy, shards, own, target)
    with pytest.raises(RuntimeError, match="process_group must be None for create_graph=True"):
        torch.autograd.grad(loss, own, create_graph=True)
    loss = own_loss(linear_cross_entropy, shards, own, target, reduction="none")
    with pytest.raises(RuntimeError, match="process_group must be None for is_grads_batched=True"):
        torch.autograd.grad(loss, own, torch.eye(N_ROWS), is_grads_batched=True)


def _check_compiled(shards, layer, target):
    """Compiled code has the same results: it breaks its graph at the collectives."""

    def function(hidden, linear_weight, bias):
        given = {"linear_bias": bias, "chunk_rows": 5, **shards.given}
        loss = linear_cross_entropy(hidden * 2, linear_weight, target, **given)
        selected = linear_selective_log_softmax(hidden, linear_weight, target, **given)
        return loss * 2 + selected.sum()

    own = own_layer(shards, layer)
    right, found = function(*own), torch.compile(function, backend="eager")(*own)
    assert_near(found, right, 1e-6, "compiled")
    for one, other in zip(*(torch.autograd.grad(x, own) for x in (found, right)), strict=True):
        assert_near(one, other, 1e-6, "compiled")


# ---- communication and memory --------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest memory that an operation has returned, but for that of leaf-sized tensors.

    So it does not note the leaves, their gradients, and views of them.
    """

    def __init__(self, leaves):
        super().__init__()
        self.leaves, self.size, self.maker = {x.numel() for x in leaves}, 0, None

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        results = function(*arguments, **(options or {}))
        for x in results if isinstance(results, (tuple, list)) else (results,):
            if torch.is_tensor(x):
                size = x.untyped_storage().nbytes() // x.element_size()
                if size > self.size and size not in self.leaves:
                    self.size, self.maker = size, function
        return results


def check_communication():
    """Two collectives of a chunk, three with sequence parallelism; the same on all ranks."""
    shards, chunk_rows = Shards(), 6
    layer, (target, _) = make_layer(shards.n_classes), make_labels("index", shards.n_classes)
    n_rows = chunk_rows // shards.n_ranks  # of a rank
    state, hidden = 3 * chunk_rows + 2, chunk_rows * N_FEATURES
    of_chunk = {
        False: [("gather", state), ("reduce", hidden)],
        True: [("gather", n_rows * N_FEATURES), ("gather", state), ("scatter", hidden)],
    }
    for sequence_parallel in (False, True):
        own = own_layer(shards, layer, sequence_parallel)
        options = {"chunk_rows": chunk_rows, "sequence_parallel": sequence_parallel}
        noted = []
        with noting_collectives(noted):
            loss = own_loss(linear_cross_entropy, shards, own, target, **options)
            of_forward = list(noted)
            loss.backward()
            assert noted == of_forward
            noted.clear()
            loss = own_loss(linear_cross_entropy, shards, own, target, reduction="none", **options)
            loss.sum().backward()
        n_chunks = N_ROWS // chunk_rows
        assert sorted(of_forward) == sorted(of_chunk[sequence_parallel] * n_chunks)
        recomputed = [x for x in of_chunk[sequence_parallel] if x[1] != state]
        both = of_chunk[sequence_parallel] + [x for x in recomputed if x[0] == "gather"]
        assert sorted(noted) == sorted(both * n_chunks)
    # The divisor of the mean of class weights is one number more.
    own, noted = own_layer(shards, layer), []
    weight = torch.rand(shards.n_classes)
    with noting_collectives(noted):
        own_loss(linear_cross_entropy, shards, own, target, weight, chunk_rows=chunk_rows)
    assert noted[0] == ("gather", 1)
    assert len(noted) == 1 + 2 * n_chunks
    _check_default_chunks(shards)
    _check_memory(shards)


def _check_default_chunks(shards):
    """Chunks depend on the number of all classes, not on this shard's."""
    fused_xent._linear.CPU_BYTES = 4 * 4 * -(-shards.n_classes // shards.n_ranks)  # 4 rows
    layer, (target, _) = make_layer(shards.n_classes), make_labels("index", shards.n_classes)
    noted = []
    with noting_collectives(noted):
        own_loss(linear_cross_entropy, shards, own_layer(shards, layer), target)
    assert [x for x in noted if x[0] == "reduce"] == [("reduce", 4 * N_FEATURES)] * 3


def _check_memory(shards):
    """Only the logits and hidden states of one chunk are stored."""
    n_rows, chunk_rows = 96, 6
    hidden, linear_weight, _ = make_layer(shards.n_classes, rows=(n_rows,))
    target = torch.randint(shards.n_classes, (n_rows,))
    for sequence_parallel, reduction in itertools.product((False, True), ("mean", "none")):
        rows = shards.rows(hidden) if sequence_parallel else hidden
        own = leaves((rows, linear_weight[shards.own]))
        options = {"reduction": reduction, "sequence_parallel": sequence_parallel}
        with Largest(own) as largest:
            options |= {"chunk_rows": chunk_rows, **shards.given}
            linear_cross_entropy(*own, target, **options).sum().backward()
        of_chunk = chunk_rows * max(len(own[1]), N_FEATURES)
        assert largest.size <= max(of_chunk, 4 * n_rows), (largest.maker, options)


# ---- processes -----------------------------------------------------------------------------------


def check_losses():
    check_options()
    check_numbers()


@pytest.mark.parametrize("n_processes", SIZES)
def test_losses(n_processes):
    """Every option and dtype. Starting processes takes most of the time, so these share them."""
    processes.run(check_losses, n_processes)


def check_calls():
    check_shapes()
    check_autograd()
    check_communication()


@pytest.mark.parametrize("n_processes", SIZES)
def test_calls(n_processes):
    """Shapes, autograd, communication and memory."""
    processes.run(check_calls, n_processes)


# ---- errors --------------------------------------------------------------------------------------


def check_errors():
    shards = Shards()
    hidden, linear_weight, _ = make_layer(shards.n_classes)
    linear_weight = linear_weight[shards.own]
    target, _ = make_labels("index", shards.n_classes)

    def fails(error, message, input=hidden, weights=linear_weight, labels=target, **options):
        options = {**shards.given, **options}
        for function in (linear_cross_entropy, linear_cross_entropy_with_statistics):
            with pytest.raises(error, match=message):
                function(input, weights, labels, **options)

    wide = linear_weight.unsqueeze(1)
    message = r"linear_weight must have shape \(C, H\) with process_group"
    fails(ValueError, message, weights=wide)
    for bias in (False, True):
        module = fused_xent.LinearCrossEntropyLoss(
            hidden.shape[1],
            shards.n_classes,
            out_features=(2,),
            bias=bias,
            process_group=shards.group,
        )
        with pytest.raises(ValueError, match=message):
            module(hidden, target)
    bad = target.clone()
    bad[1] = shards.n_classes
    message = rf"target must be in \[0, {shards.n_classes}\).*got {shards.n_classes} at position"
    fails(IndexError, message, labels=bad)
    fails(ValueError, "the ranks' shards must be", num_classes=shards.n_classes + 1)
    fails(TypeError, "process_group must be a ProcessGroup", process_group=3)
    fails(ValueError, "num_classes must be given with vocab_start", num_classes=None)
    parallel = {"sequence_parallel": True}
    fails(ValueError, "reduce_grad_hidden must be True with", reduce_grad_hidden=False, **parallel)
    fails(TypeError, "sequence_parallel must be a bool, got int", sequence_parallel=1)
    fails(TypeError, "reduce_grad_hidden must be a bool, got int", reduce_grad_hidden=1)
    rows = hidden[: N_ROWS // 2]
    fails(ValueError, "shift must be 0 with sequence_parallel, got 1", rows, shift=1, **parallel)
    fails(ValueError, "drop_ignored must be False with", rows, drop_ignored=True, **parallel)
    fails(ValueError, "sequence_parallel must be False where input has no", hidden[0], **parallel)
    fails(ValueError, r"target must have shape \(24,\) \(class indices\)", **parallel)
    dense = torch.rand(N_ROWS, len(linear_weight))
    fails(ValueError, "target and weight must not be float64 beside", labels=dense.double())
    learned = dense.requires_grad_()
    fails(RuntimeError, "target must not require a gradient with process_group", labels=learned)
    weight = torch.rand(len(linear_weight), requires_grad=True)
    fails(RuntimeError, "weight must not require a gradient with process_group", weight=weight)
    tokens = torch.rand(N_ROWS, requires_grad=True)
    fails(RuntimeError, "token_weight must not require a gradient", token_weight=tokens)
    with pytest.raises(RuntimeError, match="process_group must be None under the transforms"):
        torch.func.grad(lambda x: linear_cross_entropy(x, linear_weight, target, **shards.given))(
            hidden
        )
    with pytest.raises(TypeError, match="process_group must be a ProcessGroup"):
        fused_xent.LinearCrossEntropyLoss(4, 9, process_group=3)


def test_errors():
    processes.run(check_errors, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_parallel": True}, "sequence_parallel must be False without a process_group"),
        ({"reduce_grad_hidden": False}, "reduce_grad_hidden must be True without a process_group"),
        ({"num_classes": 9}, "num_classes must be None without a process_group, got 9"),
        ({"vocab_start": 0}, "vocab_start must be None without a process_group, got 0"),
    ],
)
def test_errors_without_a_group(options, message):
    arguments = torch.ones(4, 3), torch.ones(5, 3), torch.zeros(4, dtype=torch.int64)
    for function in (linear_cross_entropy, linear_cross_entropy_with_statistics):
        with pytest.raises(ValueError, match=message):
            function(*arguments, **options)
