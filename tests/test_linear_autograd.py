"""The loss of a linear layer under autograd, torch.func, torch.compile, and as a module."""

import copy
import io
import itertools
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from layers import (
    DTYPES,
    C,
    H,
    N,
    by_classes,
    fused,
    gradients_of,
    in_chunks,
    make_layer,
    make_target,
    unfused,
)
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fused_xent
from fused_xent import LinearCrossEntropyLoss, _linear, _ops, linear_cross_entropy, reference

# Warnings of torch itself: of its forward-mode formulas, of linearize and of torch.compile.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
    pytest.mark.usefixtures("few_logits_in_chunks"),
]
DOUBLE = torch.float64
OPTIONS = {"lse_square_scale": 0.1, "softcap": 4.0, "focal_gamma": 1.5, "label_smoothing": 0.1}


@pytest.fixture(params=["chunks", "classes"])
def layout(request, monkeypatch, device):
    if request.param == "classes" and device != "cpu":
        pytest.skip("only the CPU stores logits class by class")
    {"chunks": in_chunks, "classes": by_classes}[request.param](monkeypatch)


def small_layer():
    return make_layer(DOUBLE, rows=(4,), classes=(6,), n_features=3)


SMALL_TARGET = torch.tensor([1, -100, 5, 0])


# ---- derivatives -------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "all options"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_finite_differences(reduction, options, check, layout):
    def outputs(hidden, linear_weight, bias):
        results = fused_xent.linear_cross_entropy_with_statistics(
            *(hidden, linear_weight, SMALL_TARGET),
            linear_bias=bias,
            reduction=reduction,
            **options,
        )
        return results.loss, results.lse, results.entropy, results.z_loss

    assert check(outputs, small_layer())
    assert check(lambda *layer: fused(layer, SMALL_TARGET, reduction=reduction), small_layer())


@pytest.mark.parametrize("name", ["weight", "token_weight", "normalizer"])
def test_gradient_of_one_option_alone(name):
    layer = [x.detach() for x in small_layer()]
    options = {"weight": torch.rand(6), "token_weight": torch.rand(4), "normalizer": torch.ones(())}
    options = {key: x.double() for key, x in options.items()}
    leaf = options[name].requires_grad_()
    losses = fused(layer, SMALL_TARGET, **options)
    exact = unfused(reference.cross_entropy, layer, SMALL_TARGET, **options)
    torch.testing.assert_close(losses, exact)
    torch.testing.assert_close(*(gradients_of(x, [leaf]) for x in (losses, exact)))


def test_second_derivatives_of_several_positions():
    """The layer has two positions per row; the loss has a normalizer."""
    layer = make_layer(DOUBLE, (3,), (4, 2), n_features=3)
    target, results = torch.randint(4, (3, 2)), []
    exact = unfused(F.cross_entropy, layer, target, reduction="sum") / 2.5
    for loss in (fused(layer, target, normalizer=2.5), exact):
        firsts = torch.autograd.grad(loss, layer, create_graph=True)
        results.append((*firsts, *gradients_of(sum(x.pow(2).sum() for x in firsts), layer)))
    torch.testing.assert_close(*results)


def test_gradients_of_all_inputs(layout):
    layer = small_layer()
    weight, tokens = torch.rand(6, dtype=DOUBLE), torch.rand(4, dtype=DOUBLE)
    soft = torch.rand(4, 6, dtype=DOUBLE)
    others = [x.requires_grad_() for x in (weight, tokens, torch.tensor(3.0, dtype=DOUBLE), soft)]

    def loss(*inputs):
        *layer, weight, tokens, normalizer, soft = inputs
        options = {"token_weight": tokens, "normalizer": normalizer, "weight": weight}
        return fused(layer, soft, **options) + fused(layer, SMALL_TARGET, **options)

    assert gradcheck(loss, (*layer, *others))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("of_layer", [False, True], ids=["target alone", "target and layer"])
def test_gradients_of_probabilities(of_layer, reduction, layout):
    layer, target = small_layer(), torch.rand(4, 6, dtype=DOUBLE, requires_grad=True)
    for leaf in layer:
        leaf.requires_grad_(of_layer)
    leaves = [target, *layer] if of_layer else [target]
    losses = fused(layer, target, reduction=reduction)
    exact = unfused(F.cross_entropy, layer, target, reduction=reduction)
    torch.testing.assert_close(losses, exact)
    torch.testing.assert_close(*(gradients_of(x.sum(), leaves) for x in (losses, exact)))


func = torch.func
TRANSFORMS = {
    "grad": lambda f: lambda *x: func.grad(f, (0, 1, 2))(*x),
    "grad of grad": lambda f: lambda *x: func.grad(lambda *y: func.grad(f)(*y).pow(2).sum())(*x),
    "hessian": lambda f: func.hessian(f, (0, 1)),
    "jacrev": lambda f: func.jacrev(f, (0, 1, 2)),
    "jacfwd": lambda f: func.jacfwd(f, (0, 1, 2)),
    "jvp": lambda f: lambda *x: func.jvp(f, x, tuple(y.cos() for y in x)),
    "vmap": lambda f: lambda *x: func.vmap(f, (0, None, None))(torch.stack([x[0]] * 2), *x[1:]),
    "vmap of grad": lambda f: (
        lambda *x: func.vmap(func.grad(f), (None, 0, None))(x[0], torch.stack([x[1]] * 2), x[2])
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func(name):
    layer = [x.detach() for x in small_layer()]
    results = [
        TRANSFORMS[name](lambda *x, f=f: f(x, SMALL_TARGET))(*layer)
        for f in (fused, lambda x, t: unfused(F.cross_entropy, x, t))
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:])
def test_second_derivatives_of_any_subset(needs, layout):
    layer = small_layer()
    for leaf, needed in zip(layer, needs, strict=True):
        leaf.requires_grad_(needed)
    leaves = [leaf for leaf, needed in zip(layer, needs, strict=True) if needed]
    results = []
    for loss in (fused(layer, SMALL_TARGET), unfused(F.cross_entropy, layer, SMALL_TARGET)):
        firsts = torch.autograd.grad(loss, leaves, create_graph=True)
        results.append((*firsts, *gradients_of(sum(x.pow(2).sum() for x in firsts), leaves)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_grad_skips_the_gradient_products(context, monkeypatch):
    """The gradient would take two more matrix products per chunk, and memory."""
    in_chunks(monkeypatch)
    products, product = [], _linear.product
    monkeypatch.setattr(
        _linear, "product", lambda *x, **beta: products.append(1) or product(*x, **beta)
    )
    layer, target = make_layer(), make_target()
    monkeypatch.setattr(_ops, "forward_backward_", None)
    with context():
        fused(layer, target)
    assert products == [1] * 3  # one per chunk of at most four rows


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_unneeded_gradients_are_empty(needs, dtype):
    """Needed gradients have the dtype of the layer, even with several chunks."""
    layer, target = [x.detach() for x in make_layer(dtype)], make_target()
    inputs = (*layer, target, None, None, None, None, 1, dtype)
    for device in ("cpu", "meta"):
        moved = [x.to(device) if isinstance(x, torch.Tensor) else x for x in inputs]
        results = torch.ops.fused_xent.linear_forward(
            *moved, torch.float32, False, 4, list(map(int, needs))
        )
        expected = [x.numel() if needed else 0 for x, needed in zip(layer, needs, strict=True)]
        assert [x.numel() for x in results[4:]] == expected
        assert [x.dtype for x in results[4:]] == [dtype] * 3
        assert [x.numel() for x in results[1:4]] == [0] * 3


def test_dual_numbers():
    layer = [x.detach() for x in small_layer()]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, x.cos()) for x in layer]
        losses = fused(duals, SMALL_TARGET), unfused(F.cross_entropy, duals, SMALL_TARGET)
        torch.testing.assert_close(*(forward_ad.unpack_dual(x).tangent for x in losses))


def test_same_tensor_as_input_and_weight(layout):
    """The same tensor is input and weight: first and second derivatives add up both parts."""
    both = torch.randn(7, 7, dtype=DOUBLE, requires_grad=True)
    target = torch.arange(7)

    def ours(x):
        return linear_cross_entropy(x, x, target)

    def theirs(x):
        return F.cross_entropy(x @ x.t(), target)

    for create_graph in (False, True):
        losses = (f(both) for f in (ours, theirs))
        gradients = [torch.autograd.grad(x, both, create_graph=create_graph)[0] for x in losses]
        torch.testing.assert_close(*gradients)
    torch.testing.assert_close(*(gradients_of(x.pow(2).sum(), both) for x in gradients))


# ---- use of the gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_repeated_backward(dtype, reduction, layout):
    layer, target = make_layer(dtype), make_target()
    losses = [fused(layer, target, reduction=reduction)]
    losses.append(unfused(fused_xent.cross_entropy, layer, target, reduction=reduction))
    for scale in (1, 2, -0.5, 0):
        upstream = torch.full_like(losses[0], scale)
        results = [torch.autograd.grad(x, layer, upstream, retain_graph=True) for x in losses]
        loose = {} if dtype.itemsize > 2 else {"rtol": 0.05, "atol": 0.05}
        torch.testing.assert_close(*results, **loose)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_batched_upstream_gradients(reduction, layout):
    layer, target = make_layer(DOUBLE), make_target()
    losses = [fused(layer, target, reduction=reduction)]
    losses.append(unfused(F.cross_entropy, layer, target, reduction=reduction))
    upstream = torch.randn(3, *losses[0].shape, dtype=DOUBLE)
    results = [torch.autograd.grad(x, layer, upstream, is_grads_batched=True) for x in losses]
    torch.testing.assert_close(*results)
    losses = [fused(layer, target, reduction=reduction)]
    losses.append(unfused(F.cross_entropy, layer, target, reduction=reduction))
    batched = {"create_graph": True, "is_grads_batched": True}
    firsts = [torch.autograd.grad(x, layer, upstream, **batched) for x in losses]
    torch.testing.assert_close(*firsts)
    seconds = (gradients_of(sum(x.pow(2).sum() for x in first), layer) for first in firsts)
    torch.testing.assert_close(*seconds)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["lse", "entropy", "z_loss", "loss"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_expanded_upstream_gradients(create_graph, name, reduction, layout):
    """The backward of sum() expands a scalar; each output alone, with and without create_graph."""
    hidden, linear_weight, bias = layer = make_layer(DOUBLE)
    target = make_target()
    options = {"lse_square_scale": 0.1, "reduction": reduction}
    results = fused_xent.linear_cross_entropy_with_statistics(
        hidden, linear_weight, target, linear_bias=bias, **options
    )
    exact = unfused(reference.cross_entropy_with_statistics, layer, target, **options)
    values = (getattr(x, name) for x in (results, exact))
    torch.testing.assert_close(
        *(torch.autograd.grad(x.sum(), layer, create_graph=create_graph) for x in values)
    )


USES = {
    "of the loss": lambda r: r.loss,
    "of a statistic": lambda r: r.lse.mean(),
    "of both": lambda r: r.loss + r.lse.mean(),
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("use", USES)
def test_gradients_are_freed_by_backward(use, create_graph):
    layer, target = make_layer(bias=False), make_target()
    results = fused_xent.linear_cross_entropy_with_statistics(*layer, target)
    kept = [weakref.ref(x) for x in results.loss.grad_fn.gradients[:2]]
    assert all(ref() is not None for ref in kept)
    torch.autograd.grad(USES[use](results), layer, create_graph=create_graph)
    assert all(ref() is None for ref in kept)


def test_returned_gradients_are_not_modified_later(layout):
    layer, target = make_layer(), make_target()
    loss = fused(layer, target)
    first = torch.autograd.grad(loss, layer, retain_graph=True)
    before = [x.clone() for x in first]
    torch.autograd.grad(loss, layer, torch.tensor(5.0))
    assert all(map(torch.equal, first, before))


def test_parameters_that_change_after_the_forward(layout):
    """The first backward uses the gradient from forward; a second one must raise."""
    layer, target = make_layer(), make_target()
    expected = gradients_of(unfused(F.cross_entropy, layer, target), layer)
    loss = fused(layer, target)
    with torch.no_grad():
        layer[1].mul_(2)
    torch.testing.assert_close(torch.autograd.grad(loss, layer, retain_graph=True), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, layer)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_activation_checkpointing(reduction, reentrant, layout):
    layer, target = make_layer(), make_target()
    expected = gradients_of(
        unfused(F.cross_entropy, layer, target, reduction=reduction).sum(), layer
    )
    loss = checkpoint(
        lambda *x: fused(x, target, reduction=reduction), *layer, use_reentrant=reentrant
    )
    loss.sum().backward()
    torch.testing.assert_close([x.grad for x in layer], list(expected))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_save_on_cpu_and_anomaly_mode(reduction, layout):
    layer, target = make_layer(), make_target()
    expected = gradients_of(
        unfused(F.cross_entropy, layer, target, reduction=reduction).sum(), layer
    )
    with torch.autograd.graph.save_on_cpu(), torch.autograd.detect_anomaly():
        loss = fused(layer, target, reduction=reduction).sum()
        torch.testing.assert_close(gradients_of(loss, layer), expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context, layout):
    layer, target = make_layer(), make_target()
    expected = unfused(F.cross_entropy, layer, target)
    with context():
        loss = fused(layer, target)
    assert loss.grad_fn is None
    torch.testing.assert_close(loss, expected.detach())


@pytest.mark.cpu("uses autocast of the CPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_autocast(create_graph, dtype, layout):
    """As in torch, the loss is float32 and gradients have the dtype of the parameters."""
    layer, target = make_layer(), make_target()
    results = []
    for function in (fused, lambda *x: unfused(F.cross_entropy, *x)):
        with torch.autocast("cpu", dtype=dtype):
            loss = function(layer, target)
        assert loss.dtype == torch.float32
        results.append((loss, *torch.autograd.grad(loss, layer, create_graph=create_graph)))
        assert {x.dtype for x in results[-1]} == {torch.float32}
    torch.testing.assert_close(*results, rtol=0.02, atol=0.005)


@pytest.mark.cpu("uses autocast of the CPU")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_autocast_casts_the_layer_and_nothing_else(dtype, reduction, layout):
    """Loss and gradients are bitwise those of explicit casts, also with create_graph."""
    layer, target = make_layer(), make_target()
    cast = [x.to(dtype) for x in layer]
    expected = fused(cast, target, reduction=reduction, loss_dtype=torch.float32).sum()
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    with autocast:
        loss = fused(layer, target, reduction=reduction).sum()
    assert torch.equal(loss, expected)
    for options in ({"retain_graph": True}, {"create_graph": True}, {"retain_graph": True}):
        right = torch.autograd.grad(expected, layer, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = torch.autograd.grad(loss, layer, **options)
        assert all(map(torch.equal, actual, right))


def test_loss_scale(device):
    """Gradients that underflow to 0 in float16 without a loss scale."""
    layer, target = make_layer(torch.float16, (N,), (4000,)), torch.arange(N)
    exact_layer = [x.detach().double().requires_grad_() for x in layer]
    exact = unfused(F.cross_entropy, exact_layer, target, reduction="sum") / 1e6
    loss = fused(layer, target, normalizer=1e6, loss_dtype=torch.float32)
    actual = gradients_of(loss * 2.0**20, layer)
    for one, right in zip(actual, gradients_of(exact, exact_layer), strict=True):
        error = (one.double() / 2.0**20 - right).norm() / right.norm()
        assert error < 2e-3


# ---- compiled code -----------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()


COMPILED = {
    "plain": {},
    "none": {"reduction": "none"},
    "shift": {"shift": 1, "reduction": "none"},
    "drop": {"drop_ignored": True},
    "all options": OPTIONS | {"normalizer": 7},
}


@pytest.mark.parametrize("name", [*COMPILED, "plain, inductor"])
def test_compiles_to_one_graph(name, fresh_compiler):
    name, _, backend = name.partition(", ")
    layer, target = make_layer(), make_target()

    def model(target, *layer):
        losses = fused([x * 2 for x in layer], target, **COMPILED[name])
        return (losses + 0.01 * losses.square()).sum()

    compiled = torch.compile(model, backend=backend or "aot_eager", fullgraph=True)
    for n in (1, 2):  # twice: a second call must work too
        losses = [f(target, *layer) * n for f in (model, compiled)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(gradients_of(x, layer) for x in losses))


def test_statistics_compile_to_one_graph(fresh_compiler):
    layer, target = make_layer(), make_target()

    def model(target, hidden, linear_weight, bias):
        results = fused_xent.linear_cross_entropy_with_statistics(
            *(hidden * 2, linear_weight, target), linear_bias=bias, **OPTIONS
        )
        return results.loss + (results.lse * results.entropy + results.z_loss).sum()

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    losses = [f(target, *layer) for f in (model, compiled)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(gradients_of(x, layer) for x in losses))


def test_graphs_of_dynamic_shapes(fresh_compiler):
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=True)
    for n_rows, n_classes in ((11, 37), (5, 37), (20, 50)):
        layer = make_layer(rows=(n_rows,), classes=(n_classes,))
        target = torch.randint(n_classes, (n_rows,))
        losses = [f(layer, target) for f in (fused, compiled)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(gradients_of(x, layer) for x in losses))
    assert counters["stats"]["unique_graphs"] == 1


def test_one_graph_of_few_logits_and_of_many(fresh_compiler, monkeypatch):
    monkeypatch.setattr("fused_xent.linear.FEW_LOGITS", 12 * C)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=True)
    for n_rows in (20, 5):
        layer, target = make_layer(rows=(n_rows,)), torch.randint(C, (n_rows,))
        torch.testing.assert_close(compiled(layer, target), fused(layer, target))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_compiled_without_gradients(context, fresh_compiler):
    layer, target = make_layer(), make_target()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    with context():
        torch.testing.assert_close(compiled(layer, target), fused(layer, target))


@pytest.mark.parametrize("needs", [[True] * 3, [False, True, False], [False] * 3])
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
def test_operators(soft, reduction, needs):
    hidden, linear_weight, bias = (x.detach() for x in make_layer())
    target = make_target(soft)
    inputs = (hidden, linear_weight, bias, target, None, torch.rand(N), None, None, reduction)
    inputs += (torch.float32, torch.float32, True, 4, [int(needed) for needed in needs])
    upstream = (torch.rand([N] if reduction == 0 else []), torch.rand(N), None)
    options = {"label_smoothing": 0.1, "lse_square_scale": 0.01, "softcap": 3.0}
    for operator, arguments in (("forward", inputs), ("backward", (*upstream, *inputs))):
        operator = getattr(torch.ops.fused_xent, f"linear_{operator}").default
        torch.library.opcheck(operator, arguments, options)
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("needs", [[1, 1, 1], [0, 1, 0], [1, 0, 1]])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("statistics", [False, True], ids=["", "statistics"])
def test_opcheck_of_linear_forward_with_gradients(statistics, soft, needs):
    """opcheck of the autograd formula of ``linear_forward``."""
    layer = [x.detach().requires_grad_(bool(n)) for x, n in zip(make_layer(), needs, strict=True)]
    inputs = (*layer, make_target(soft), None, torch.rand(N), None, None, 1)
    inputs += (torch.float32, torch.float32, statistics, 4, needs)
    options = {"label_smoothing": 0.1, "lse_square_scale": 0.01, "softcap": 3.0}
    torch.library.opcheck(torch.ops.fused_xent.linear_forward.default, inputs, options)


def forward_of(layer, *tensors, statistics=True, needs=(1, 1, 1)):
    """Call linear_forward with a layer and target, weight and token weight."""
    tensors = (*layer, *tensors, None, None, 1, DOUBLE, DOUBLE, statistics, 2, list(needs))
    return torch.ops.fused_xent.linear_forward(*tensors, **OPTIONS)


def test_linear_operator_under_torch_func_grad():
    layer = [x.detach() for x in small_layer()]

    def loss(*layer):
        return forward_of(layer, SMALL_TARGET, None, None)[0]

    leaves = [x.clone().requires_grad_() for x in layer]
    exact = unfused(reference.cross_entropy, leaves, SMALL_TARGET, **OPTIONS)
    found = torch.func.grad(loss, (0, 1, 2))(*layer)
    torch.testing.assert_close(found, gradients_of(exact, leaves))


@pytest.mark.parametrize("statistics", [False, True])
def test_non_differentiable_results_of_the_layer(statistics):
    results = forward_of(small_layer(), SMALL_TARGET, None, None, statistics=statistics)
    assert [x.requires_grad for x in results] == [True, statistics, statistics, *[False] * 4]


@pytest.mark.parametrize("name", ["linear_forward", "linear_backward"])
def test_linear_operators_have_the_options_of_the_loss(name):
    def options(operator):
        arguments = operator.default._schema.arguments
        return [(x.name, str(x.type), x.default_value) for x in arguments if x.kwarg_only]

    operators = torch.ops.fused_xent
    assert options(getattr(operators, name)) == options(operators.backward)
    assert len(options(operators.backward)) == 6


def test_linear_backward_has_no_derivative():
    """Asking for one raises, instead of giving a gradient of 0."""
    backward = torch.ops.fused_xent.linear_backward
    layer, upstream = small_layer(), torch.ones((), dtype=DOUBLE)
    others = (SMALL_TARGET, None, None, None, None, 1, DOUBLE, DOUBLE, False, None, [1, 1, 1])
    with pytest.raises(RuntimeError, match="linear_backward has no derivative"):
        backward(upstream, None, None, *layer, *others)
    detached = [x.detach() for x in layer]
    with pytest.raises(RuntimeError, match="linear_backward has no derivative"):
        backward(upstream.requires_grad_(), None, None, *detached, *others)
    with torch.no_grad():
        gradients = backward(upstream, None, None, *layer, *others)
    torch.testing.assert_close(gradients, gradients_of(fused(layer, SMALL_TARGET), layer))


@pytest.mark.parametrize("of_weight", [False, True], ids=["layer", "layer and class weight"])
def test_gradients_of_linear_forward(of_weight):
    layer = leaves = small_layer()
    weight = torch.rand(6, dtype=DOUBLE, requires_grad=of_weight)
    if of_weight:
        leaves = [*layer, weight]
    results = forward_of(layer, SMALL_TARGET, weight, None)
    if not of_weight:  # with it, torch operations compute the gradients later
        assert [x.shape for x in results[4:]] == [x.shape for x in layer]
    assert len(results) == 7
    exact = unfused(
        reference.cross_entropy_with_statistics, layer, SMALL_TARGET, weight=weight, **OPTIONS
    )
    values = (
        results[0] + (results[1] * results[2]).sum(),
        exact.loss + (exact.lse * exact.entropy).sum(),
    )
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(gradients_of(x, leaves) for x in values))


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"shift": 1}, {"drop_ignored": True}], ids=str
)
@pytest.mark.parametrize("create_graph", [False, True])
def test_meta_tensors(create_graph, options):
    layer = [x.detach().to("meta").requires_grad_() for x in make_layer()]
    target = torch.empty(N, dtype=torch.int64, device="meta")
    loss = fused(layer, target, **options)
    gradients = torch.autograd.grad(loss.sum(), layer, create_graph=create_graph)
    assert [x.shape for x in gradients] == [x.shape for x in layer]


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"shift": 1}, {"drop_ignored": True}], ids=str
)
def test_fake_tensors_outside_fake_mode(options):
    with FakeTensorMode():
        layer, target = make_layer(), make_target()
    gradients = gradients_of(fused(layer, target, **options).sum(), layer)
    assert [x.shape for x in gradients] == [x.shape for x in layer]


# ---- tensor subclasses, the module -------------------------------------------------------------


TENSORS = ("input", "linear_weight", "target", "linear_bias", "weight", "token_weight")


@pytest.mark.parametrize("name", [*TENSORS, "normalizer"])
def test_torch_function_takes_precedence(name):
    asked = []

    class Asked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, called, types, args=(), kwargs=None):
            asked.append(called)
            return super().__torch_function__(called, types, args, kwargs)

    layer = [x.detach() for x in make_layer()]
    values = (*layer[:2], make_target(), layer[2], torch.rand(C), torch.rand(N))
    tensors = dict(zip(TENSORS, values, strict=True)) | {"normalizer": torch.tensor(3.0)}
    expected = linear_cross_entropy(**tensors, softcap=3.0)
    tensors[name] = tensors[name].as_subclass(Asked)
    for function in (linear_cross_entropy, fused_xent.linear_cross_entropy_with_statistics):
        results = function(**tensors, softcap=3.0)
        loss = results if isinstance(results, torch.Tensor) else results.loss
        assert asked[0] is function
        torch.testing.assert_close(loss.as_subclass(torch.Tensor), expected)
        asked.clear()


@pytest.mark.parametrize("out_features", [(), (2, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_module(bias, out_features):
    arguments = {"bias": bias, "out_features": out_features, "reduction": "sum", "dtype": DOUBLE}
    module = LinearCrossEntropyLoss(H, C, **arguments, label_smoothing=0.1)
    input = torch.randn(N, H, dtype=DOUBLE)
    target = torch.randint(C, (N, *out_features))
    layer = [input, module.linear.weight.view(C, *out_features, H)]
    if bias:
        layer.append(module.linear.bias.view(C, *out_features))
    expected = unfused(F.cross_entropy, layer, target, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(module(input, target), expected)
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        theirs = torch.nn.LinearCrossEntropyLoss(H, C, **arguments, label_smoothing=0.1)
        theirs.load_state_dict(module.state_dict())
        torch.testing.assert_close(module(input, target), theirs(input, target))
        assert {n: p.shape for n, p in module.named_parameters()} == {
            n: p.shape for n, p in theirs.named_parameters()
        }


def test_module_of_no_positions():
    loss = LinearCrossEntropyLoss(3, 2, out_features=(0,), bias=True)
    assert loss(torch.randn(4, 3), torch.full((4, 0), -100)).isnan()


def test_options_and_copies_of_the_module():
    tokens = torch.rand(2, 6)
    options = OPTIONS | {"shift": 1, "drop_ignored": True, "chunk_rows": 3, "ignore_index": 2}
    module = LinearCrossEntropyLoss(H, C, weight=torch.rand(C), **options)
    input, target = torch.randn(2, 6, H), torch.randint(C, (2, 6))
    expected = linear_cross_entropy(
        *(input, module.linear.weight, target),
        weight=module.weight,
        token_weight=tokens,
        normalizer=5,
        **options,
    )
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        torch.testing.assert_close(one(input, target, tokens, normalizer=5), expected)
    for name, value in options.items():
        assert f"{name}={value!r}" in repr(module)
    assert repr(LinearCrossEntropyLoss(3, 5)).startswith("LinearCrossEntropyLoss(\n")


class Model(torch.nn.Module):
    """An embedding, a layer, and a classifier that shares the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(C, H)
        self.layer = torch.nn.Linear(H, H)

    def forward(self, tokens, loss_function):
        hidden = torch.tanh(self.layer(self.words(tokens))) + self.words(tokens)
        return loss_function(hidden, self.words.weight, tokens)


def next_token_loss(hidden, linear_weight, tokens):
    logits = F.linear(hidden, linear_weight)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def test_training_with_tied_weights(layout):
    curves = []
    for function in (
        next_token_loss,
        lambda *x: linear_cross_entropy(*x, shift=1),
        lambda *x: linear_cross_entropy(*x, shift=1, drop_ignored=True),
    ):
        torch.manual_seed(0)
        model = Model().double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        tokens = torch.randint(C, (2, 8)).repeat(1, 2)
        losses = []
        for _ in range(60):
            loss = model(tokens, function)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    torch.testing.assert_close(curves[1], curves[0])
    torch.testing.assert_close(curves[2], curves[0])
    assert curves[0][-1] < curves[0][0] / 2
