"""Log-probabilities of selected classes from hidden states, against float64."""

import pytest
import torch
import torch.nn.functional as F
from layers import DTYPES, by_classes, doubled, gradients_of, in_chunks, make_layer
from test_selected import exact, make_index
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close

import fused_xent
from fused_xent import SelectedLogProbs, _linear, _ops, linear_selective_log_softmax

pytestmark = pytest.mark.usefixtures("few_logits_in_chunks")
OPTIONS = {"softcap": 4.0, "logit_scale": 0.7}
# Of gradients, relative to the greatest: the logits and their gradient are rounded to the dtype.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}


def selected(layer, index, **options):
    hidden, linear_weight, *bias = layer
    options |= {"linear_bias": bias[0]} if bias else {}
    return linear_selective_log_softmax(hidden, linear_weight, index, **options)


def by_logits(layer, index, dtype=None, **options):
    """Return the results in float64, from logits that are rounded to a dtype."""
    logits = F.linear(*layer)
    if dtype is not None:
        logits = logits + (logits.to(dtype).double() - logits).detach()
    return exact(logits, index, **options)


def assert_close_to_greatest(found, expected, relative):
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max().item()
        assert_close(one.double(), other, rtol=0, atol=relative * scale + 1e-30)


SHAPES = {"rows": (11,), "sequences": (2, 3), "one row": (), "three": (2, 2, 3)}


@pytest.mark.parametrize("layout", ["chunks", "classes"])
@pytest.mark.parametrize("n_selected", [None, 1, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype, shape, n_selected, layout, monkeypatch, device):
    if layout == "classes" and device != "cpu":
        pytest.skip("only the CPU stores logits class by class")
    {"chunks": in_chunks, "classes": by_classes}[layout](monkeypatch)
    layer = make_layer(dtype, rows=SHAPES[shape], classes=(37,))
    index = make_index((*SHAPES[shape], 37), 37, n_selected)
    exact_layer, relative = doubled(layer), TOLERANCES[dtype]
    for with_entropy in (False, True):
        for options in ({}, OPTIONS):
            found = selected(layer, index, with_entropy=with_entropy, **options)
            expected = by_logits(exact_layer, index, dtype, **options)
            assert isinstance(found, SelectedLogProbs) == with_entropy
            found, expected = (found, expected) if with_entropy else ([found], expected[:1])
            for one, other in zip(found, expected, strict=True):
                assert one.dtype == torch.promote_types(dtype, torch.float32)
                # A logit may be rounded in the other direction.
                assert_close(one.double(), other, rtol=relative, atol=relative)
            grads = [torch.randn(x.shape, dtype=x.dtype) for x in found]
            gradients = torch.autograd.grad(found, layer, grads)
            grads = [grad.double() for grad in grads]
            exact_gradients = torch.autograd.grad(expected, exact_layer, grads)
            assert [x.dtype for x in gradients] == [dtype] * 3
            assert_close_to_greatest(gradients, exact_gradients, relative)


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_a_chunk(dtype, chunk_rows, monkeypatch):
    """The number of rows in a chunk changes nothing but the order of sums."""
    monkeypatch.setattr("fused_xent.linear.FEW_LOGITS", 1 << 20)
    layer = make_layer(dtype, rows=(7,), classes=(300,))
    index = make_index((7, 300), 300, 4)
    at_once = selected(layer, index, with_entropy=True, **OPTIONS)  # through all logits
    by_chunks = selected(layer, index, with_entropy=True, chunk_rows=chunk_rows, **OPTIONS)
    assert_close(by_chunks, at_once, rtol=1e-5, atol=1e-5)
    sums = (x.log_probs.sum() + x.entropy.sum() for x in (by_chunks, at_once))
    gradients = [gradients_of(x, layer) for x in sums]
    assert_close_to_greatest(gradients[0], doubled(gradients[1]), TOLERANCES[dtype] / 2)


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_the_gradient_of_one_tensor_alone(needed, monkeypatch):
    in_chunks(monkeypatch)
    layer = [x.detach() for x in make_layer(rows=(6,))]
    layer[needed].requires_grad_()
    index = make_index((6, 37), 37, 3)
    expected = by_logits([x.double() for x in layer], index).log_probs
    for x in (selected(layer, index), expected):
        (gradient,) = torch.autograd.grad(x.sum(), layer[needed])
        if x is not expected:
            found = gradient
    assert_close(found, gradient, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_entropy_alone():
    layer = make_layer(rows=(6,))
    index = make_index((6, 37), 37, 3)
    found = selected(layer, index, with_entropy=True).entropy
    expected = by_logits(doubled(layer), index)
    exact_layer = doubled(layer)
    expected = by_logits(exact_layer, index).entropy
    gradients = gradients_of(found.sum(), layer), gradients_of(expected.sum(), exact_layer)
    assert_close_to_greatest(*gradients, 1e-5)


@pytest.mark.parametrize("n_selected", [None, 3])
def test_rows_of_padding(n_selected, monkeypatch):
    """Hidden states of such a row may be NaN: its results and its own gradient are 0."""
    in_chunks(monkeypatch)
    layer = make_layer(rows=(6,))
    index = make_index((6, 37), 37, n_selected)
    with torch.no_grad():
        layer[0][1] = torch.nan
    found = selected(layer, index, with_entropy=True)
    assert all(x[1].eq(0).all() and x.isfinite().all() for x in found)
    (gradient,) = torch.autograd.grad(found.log_probs.sum(), layer[0])
    assert gradient[1].eq(0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_float32_logits_of_16_bit_layers(chunk_rows, monkeypatch):
    """Also under autocast, and also of few logits."""
    monkeypatch.setattr("fused_xent.linear.FEW_LOGITS", 1 << 20)
    layer = make_layer(torch.bfloat16, rows=(6,))
    target = torch.randint(37, (6,))
    expected = by_logits(doubled(layer), target).log_probs
    options = {"logits_dtype": torch.float32, "chunk_rows": chunk_rows}
    loss = {"reduction": "none", "loss_dtype": torch.float32, "linear_bias": layer[2], **options}
    for enabled in (False, True):
        with torch.autocast(layer[0].device.type, torch.bfloat16, enabled=enabled):
            assert_close(
                selected(layer, target, **options).double(), expected, rtol=1e-5, atol=1e-5
            )
            found = -fused_xent.linear_cross_entropy(*layer[:2], target, **loss)
            assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_autocast(chunk_rows):
    layer = make_layer(rows=(6,))
    index = make_index((6, 37), 37, 3)
    with torch.autocast(layer[0].device.type, torch.bfloat16):
        found = selected(layer, index, chunk_rows=chunk_rows)
    expected = selected([x.bfloat16() for x in layer], index, chunk_rows=chunk_rows)
    assert found.dtype == torch.float32
    assert_close(found, expected, rtol=0, atol=1e-6)
    gradients = [gradients_of(x.sum(), layer) for x in (found, expected)]
    assert_close(*gradients)


# ---- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_all_logits_never_exist_at_once(chunk_rows, monkeypatch):
    """Nor those of a small problem, if the size of a chunk is given."""
    if chunk_rows is None:
        in_chunks(monkeypatch)
    else:
        monkeypatch.setattr("fused_xent.linear.FEW_LOGITS", 1 << 20)
    seen, saved, n_rows, n_classes = [], [], 40, 300

    def noting(operator):
        def run(first, *arguments):
            logits = first if isinstance(first, torch.Tensor) else first.logits
            seen.append((operator.__name__, logits.untyped_storage().nbytes() // 4))
            return operator(first, *arguments)

        return run

    for name in ("forward", "backward", "backward_", "selected_log_probs"):
        monkeypatch.setattr(_ops, name, noting(getattr(_ops, name)))
    layer = make_layer(rows=(n_rows,), classes=(n_classes,))
    index = make_index((n_rows, n_classes), n_classes, 5)
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        found = selected(layer, index, chunk_rows=chunk_rows)
    assert sum(x.nbytes for x in saved) == sum(x.nbytes for x in (*layer, index))
    found.sum().backward()
    n_chunks, size = n_rows // 4, 4 * n_classes
    of_backward = [("forward", size), ("backward_", size)] * n_chunks
    assert seen == [("selected_log_probs", size)] * n_chunks + of_backward


def test_four_products(monkeypatch):
    in_chunks(monkeypatch)
    layer, index, calls = make_layer(rows=(8,)), make_index((8, 37), 37, 3), []
    product = _linear.product
    monkeypatch.setattr(_linear, "product", lambda *x, **y: calls.append(0) or product(*x, **y))
    selected(layer, index, with_entropy=True).log_probs.sum().backward()
    assert len(calls) == 4 * 2  # in two chunks


# ---- derivatives and transforms ----------------------------------------------------------------


def small(dtype=torch.float64):
    layer = make_layer(dtype, rows=(4,), classes=(7,), n_features=3)
    index = torch.tensor([[1, -100, 3], [6, 6, 0], [-100, -100, -100], [2, 2, 2]])
    return layer, index


INDEXES = {"K": lambda index: index, "one class": lambda index: index[:, 0]}
by_index = pytest.mark.parametrize("which", INDEXES)


@by_index
@pytest.mark.parametrize("derivative", [gradcheck, gradgradcheck])
def test_finite_differences(derivative, which):
    layer, index = small()
    index = INDEXES[which](index)

    def outputs(*layer):
        return tuple(selected(layer, index, with_entropy=True, chunk_rows=3, **OPTIONS))

    assert derivative(outputs, layer)
    assert derivative(lambda *layer: selected(layer, index, chunk_rows=3), layer)


func = torch.func
TRANSFORMS = {
    "grad": lambda f: lambda *x: func.grad(f, (0, 1, 2))(*x),
    "hessian": lambda f: func.hessian(f, (0, 1)),
    "jvp": lambda f: lambda *x: func.jvp(f, x, tuple(y.cos() for y in x)),
    "vmap": lambda f: lambda *x: func.vmap(f, (0, None, None))(torch.stack([x[0]] * 2), *x[1:]),
}


@by_index
@pytest.mark.filterwarnings("ignore")  # of torch's own forward-mode formulas
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func(transform, which):
    layer, index = small()
    index, layer = INDEXES[which](index), [x.detach() for x in layer]

    def total(function):
        def run(*layer):
            results = function(layer)
            return results.log_probs.exp().sum() + results.entropy.square().sum()

        return run

    apply = TRANSFORMS[transform]
    found = apply(total(lambda layer: selected(layer, index, with_entropy=True, chunk_rows=2)))
    expected = apply(total(lambda layer: by_logits(layer, index)))
    assert_close(found(*layer), expected(*layer))


def test_batched_gradients():
    layer, index = small()
    found = selected(layer, index, chunk_rows=2)
    grads = torch.randn(3, *found.shape, dtype=found.dtype)
    expected = [torch.autograd.grad(found, layer, grad, retain_graph=True) for grad in grads]
    batched = torch.autograd.grad(found, layer, grads, is_grads_batched=True)
    assert_close(batched, tuple(map(torch.stack, zip(*expected, strict=True))))


@pytest.mark.filterwarnings("ignore")  # of torch.compile
@pytest.mark.parametrize("which", ["K", "one class"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(backend, which):
    torch.compiler.reset()
    layer, index = small(torch.float32)
    index = INDEXES[which](index)

    def model(*layer):
        results = selected(layer, index, with_entropy=True, chunk_rows=2, **OPTIONS)
        return results.log_probs.exp().sum() + results.entropy.sum() + selected(layer, index).sum()

    found = torch.compile(model, backend=backend, fullgraph=True)(*layer)
    assert_close(found, model(*layer))
    assert_close(*(gradients_of(x, layer) for x in (found, model(*layer))))


class Model(torch.nn.Module):
    def __init__(self, index):
        super().__init__()
        self.layer, self.index = torch.nn.Linear(3, 7), index

    def forward(self, hidden):
        layer = (hidden, self.layer.weight, self.layer.bias)
        return tuple(selected(layer, self.index, with_entropy=True, **OPTIONS))


@by_index
@pytest.mark.filterwarnings("ignore")  # of torch.export
@pytest.mark.parametrize("strict", [False, True])
def test_exported_and_decomposed_programs(strict, which):
    (hidden, *_), index = small(torch.float32)
    model = Model(INDEXES[which](index))
    program = torch.export.export(model, (hidden.detach(),), strict=strict)
    table = torch.export.default_decompositions() | fused_xent.decompositions()
    decomposed = program.run_decompositions(table)
    assert "fused_xent" in str(program.graph)
    assert "fused_xent" not in str(decomposed.graph)
    layer = (hidden, model.layer.weight, model.layer.bias)
    expected = tuple(x.float() for x in by_logits(layer, model.index, **OPTIONS))
    for each in (program, decomposed):
        found = each.module()(hidden)
        assert_close(found, expected)
        gradients = (
            torch.autograd.grad(x, hidden, x, retain_graph=True) for x in (found, expected)
        )
        assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_opcheck(with_entropy):
    operator = torch.ops.fused_xent.linear_selected_log_probs.default
    layer, index = small(torch.float32)
    arguments = (*layer, index, with_entropy, torch.float32)
    torch.library.opcheck(operator, (*arguments, 3), OPTIONS)
    torch.library.opcheck(operator, (*layer[:2], None, *arguments[3:], None))


def test_subclasses_take_precedence():
    class Named(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), options=None):
            return function.__name__, len(arguments), sorted(options or {})

    layer, index = small(torch.float32)
    names = {"chunk_rows", "linear_bias", "logit_scale", "logits_dtype", "softcap", "with_entropy"}
    names |= {"process_group", "vocab_start", "num_classes"}
    names |= {"sequence_parallel", "reduce_grad_hidden"}
    for i in range(3):
        mixed = [x.detach().as_subclass(Named) if i == j else x for j, x in enumerate(layer)]
        assert selected(mixed, index) == ("linear_selective_log_softmax", 3, sorted(names))


# ---- errors ------------------------------------------------------------------------------------

HIDDEN, WEIGHT = torch.randn(4, 3), torch.randn(9, 3)
CLASSES = torch.zeros(4, dtype=torch.int64)
REFUSED = {  # arguments, options, the error and the start of its message
    "positions": (
        (HIDDEN, torch.randn(9, 2, 3), CLASSES),
        {},
        ValueError,
        r"linear_weight must have shape \(C, H\) for C classes and H features, got \(9, 2, 3\)",
    ),
    "features": (
        (HIDDEN, WEIGHT[:, :2], CLASSES),
        {},
        ValueError,
        "linear_weight must have input's",
    ),
    "bias": (
        (HIDDEN, WEIGHT, CLASSES),
        {"linear_bias": HIDDEN[0]},
        ValueError,
        r"linear_bias must have shape \(9,\)",
    ),
    "dtype": (
        (HIDDEN, WEIGHT.half(), CLASSES),
        {},
        ValueError,
        "linear_weight must have input's dt",
    ),
    "logits": (
        (HIDDEN, WEIGHT, CLASSES),
        {"logits_dtype": torch.float16},
        ValueError,
        "logits_dtype must be None",
    ),
    "index": (
        (HIDDEN, WEIGHT, CLASSES[:3]),
        {},
        ValueError,
        r"index must have shape \(4,\) \(one class in each row\) or \(4, K\), with K from 1 to "
        r"1024, got \(3,\)",
    ),
    "bytes": ((HIDDEN, WEIGHT, CLASSES.byte()), {}, ValueError, "index must be int64 or int32"),
    "chunk": ((HIDDEN, WEIGHT, CLASSES), {"chunk_rows": 0}, ValueError, "chunk_rows must be at le"),
    "softcap": ((HIDDEN, WEIGHT, CLASSES), {"softcap": -1}, ValueError, "softcap must be in"),
    "entropy": ((HIDDEN, WEIGHT, CLASSES), {"with_entropy": 1}, TypeError, "with_entropy must be"),
    "range": (
        (HIDDEN, WEIGHT, CLASSES + 9),
        {},
        IndexError,
        r"index must be in \[0, 9\) or -100 \(padding\), got 9 at position \(0,\)",
    ),
    "range of K": (
        (HIDDEN, WEIGHT, torch.tensor([[0, 1], [2, 3], [4, -3], [9, 9]])),
        {},
        IndexError,
        r"index must be in \[0, 9\) or -100 \(padding\), got -3 at position \(2, 1\)",
    ),
}


@pytest.mark.cpu("the tensors are made at import")
@pytest.mark.parametrize("chunk_rows", [None, 2])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, chunk_rows, monkeypatch):
    monkeypatch.setattr("fused_xent.linear.FEW_LOGITS", 1 << 20)
    arguments, options, error, message = REFUSED[name]
    with pytest.raises(error, match=f"^{message}"):
        linear_selective_log_softmax(*arguments, **{"chunk_rows": chunk_rows, **options})


@pytest.mark.parametrize("n_selected", [None, 2])
def test_nothing_to_compute(n_selected):
    """No rows, no classes, no features."""
    extra = () if n_selected is None else (n_selected,)
    for n_rows, n_classes, n_features in ((0, 5, 3), (2, 0, 3), (2, 5, 0)):
        hidden = torch.randn(n_rows, n_features, requires_grad=True)
        index = torch.full((n_rows, *extra), -100 if n_classes == 0 else 1)
        weight = torch.randn(n_classes, n_features)
        found = linear_selective_log_softmax(hidden, weight, index, with_entropy=True)
        expected = -torch.tensor(5.0).log() if n_classes else torch.zeros(())
        assert_close(found.log_probs, expected.expand(index.shape))
        assert torch.autograd.grad(found.log_probs.sum(), hidden)[0].shape == hidden.shape
