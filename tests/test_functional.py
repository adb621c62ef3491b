"""cross_entropy as a drop-in: torch's sample inputs, and its rules of dtype, shape, reduction."""

import functools
import inspect
import itertools
import typing
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, REDUCTIONS, Labels, make_logits, make_target
from compare import assert_gradient, assert_loss, truth
from modes import MODES

import fused_xent
from fused_xent import _ops

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
HALF = (torch.bfloat16, torch.float16)


@functools.cache
def torchs_operator():
    """Return the OpInfo of torch.nn.functional.cross_entropy."""
    pytest.importorskip("expecttest", reason="torch's samples need expecttest")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on import
        from torch.testing._internal.common_methods_invocations import op_db
    return next(op for op in op_db if op.name == "nn.functional.cross_entropy")


def samples(dtype, device):
    """Yield input, target and options of torch's samples, contiguous and non-contiguous."""
    for sample in torchs_operator().sample_inputs(device, dtype, requires_grad=True):
        for variant in (sample, sample.noncontiguous()):
            yield variant.input, *variant.args, variant.kwargs


def with_gradients(loss_function, input, target, kwargs, upstream=1.0):
    """Return the loss and the gradients of input and, if it holds probabilities, target."""
    input = input.detach().requires_grad_()
    inputs = [input]
    if target.is_floating_point():
        target = target.detach().requires_grad_()
        inputs.append(target)
    loss = loss_function(input, target, **kwargs)
    gradients = torch.autograd.grad(loss, inputs, torch.full_like(loss, upstream))
    return loss.detach(), *gradients


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_torchs_samples(dtype, device):
    count = 0
    for input, target, kwargs in samples(dtype, device):
        for upstream in (1.0, -0.75):
            expected = with_gradients(F.cross_entropy, input, target, kwargs, upstream)
            actual = with_gradients(fused_xent.cross_entropy, input, target, kwargs, upstream)
            torch.testing.assert_close(actual, expected)  # compares dtypes and shapes too
        count += 1
    assert count >= 40


@pytest.mark.parametrize("dtype", HALF)
def test_torchs_samples_in_16_bits(dtype, device):
    """The error is at most that of torch in the same dtype, plus two units in the last place."""
    given = list(samples(dtype, device))
    assert len(given) >= 40
    for input, target, kwargs in given:
        double = {k: v.double() if k == "weight" else v for k, v in kwargs.items()}
        target64 = target.double() if target.is_floating_point() else target
        exact = with_gradients(F.cross_entropy, input.double(), target64, double)
        torchs = with_gradients(F.cross_entropy, input, target, kwargs)
        ours = with_gradients(fused_xent.cross_entropy, input, target, kwargs)
        for right, theirs, our in zip(exact, torchs, ours, strict=True):
            assert our.dtype == theirs.dtype
            assert our.shape == theirs.shape
            error, bound = (our.double() - right).abs(), (theirs.double() - right).abs()
            assert (error <= bound + 2 * torch.finfo(dtype).eps * right.abs() + 1e-7).all()


EMPTY_SHAPES = [
    ((0, 5), (0,)),
    ((2, 3, 0), (2, 0)),
    ((0, 3, 4), (0, 4)),
]


@by_dtype
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize(("shape", "rows"), EMPTY_SHAPES)
def test_no_rows(shape, rows, probabilities, reduction, dtype):
    input = torch.empty(shape, dtype=dtype)
    target = torch.empty_like(input) if probabilities else torch.empty(rows, dtype=torch.int64)
    expected = with_gradients(F.cross_entropy, input, target, {"reduction": reduction})
    actual = with_gradients(fused_xent.cross_entropy, input, target, {"reduction": reduction})
    torch.testing.assert_close(actual, expected, equal_nan=True)


@by_dtype
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(4, 6), (4, 300), (2, 20000), (2, 6, 5)], ids=str)
def test_all_rows_ignored(shape, weighted, label_smoothing, reduction, dtype):
    """The mean is NaN and its gradient 0, as in torch."""
    input = make_logits(shape, dtype)
    target = torch.full(input.select(1, 0).shape, -100)
    kwargs = {"reduction": reduction, "label_smoothing": label_smoothing}
    kwargs["weight"] = torch.ones(shape[1], dtype=dtype) if weighted else None
    expected = with_gradients(F.cross_entropy, input, target, kwargs)
    actual = with_gradients(fused_xent.cross_entropy, input, target, kwargs)
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_weights_0(reduction):
    input, target = make_logits((4, 6), torch.float32), torch.arange(4)
    kwargs = {"weight": torch.zeros(6), "reduction": reduction}
    expected = with_gradients(F.cross_entropy, input, target, kwargs)
    actual = with_gradients(fused_xent.cross_entropy, input, target, kwargs)
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("weight_dtype", [None, *DTYPES])
def test_dtype_of_mixed_probabilities(dtypes, weight_dtype):
    """The loss is promoted as in torch; each gradient has the dtype of its input."""
    input = make_logits((4, 9), dtypes[0])
    target = torch.rand(4, 9).softmax(1).to(dtypes[1])
    weight = None if weight_dtype is None else torch.rand(9).to(weight_dtype)
    expected = with_gradients(F.cross_entropy, input, target, {"weight": weight})
    actual = with_gradients(fused_xent.cross_entropy, input, target, {"weight": weight})
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    if any(tensor.dtype in HALF for tensor in (input, target, expected[0])):
        tolerance = {"rtol": 5e-2, "atol": 2e-2}
    torch.testing.assert_close(actual, expected, **tolerance)


@by_dtype
@pytest.mark.parametrize("loss_dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_dtype(reduction, loss_dtype, dtype):
    input, target = make_logits((4, 9), dtype), torch.arange(4)
    exact = truth(input, target, reduction=reduction)
    leaf = input.detach().requires_grad_()
    loss = fused_xent.cross_entropy(leaf, target, reduction=reduction, loss_dtype=loss_dtype)
    assert_loss(loss, exact, loss_dtype)
    loss.backward(torch.ones_like(loss))
    assert_gradient(leaf.grad, exact, dtype)


@by_dtype
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("labels", ["index", "probabilities", "float32 probabilities"])
def test_autocast(labels, label_smoothing, dtype, device):
    """The loss is float32 (float64 for float64) as in torch, and no less accurate."""
    input = make_logits((4, 300), dtype)
    target = make_target(input, Labels("probabilities" in labels))
    target = target.float() if "float32" in labels else target
    kwargs = {"label_smoothing": label_smoothing, "weight": torch.rand(300).to(dtype)}
    with torch.autocast(device, dtype=torch.bfloat16):
        expected = F.cross_entropy(input, target, **kwargs)
        leaf = input.detach().requires_grad_()
        loss = fused_xent.cross_entropy(leaf, target, **kwargs)
    assert loss.dtype == expected.dtype
    loss.backward()
    exact = truth(input, target, **kwargs)
    assert_loss(loss, exact, expected.dtype)
    assert_gradient(leaf.grad, exact, dtype)


def test_loss_dtype_beside_probabilities_and_under_autocast(device):
    """loss_dtype takes precedence over promotion."""
    input, soft = torch.randn(4, 9).bfloat16(), torch.rand(4, 9)
    for dtype in (torch.float64, torch.bfloat16):
        assert fused_xent.cross_entropy(input, soft, loss_dtype=dtype).dtype == dtype
        with torch.autocast(device, dtype=torch.bfloat16):
            for target in (soft, torch.arange(4)):
                assert fused_xent.cross_entropy(input, target, loss_dtype=dtype).dtype == dtype


def test_autocast_of_logits_and_class_indices_alone(device):
    leaf, target = torch.randn(4, 9).bfloat16().requires_grad_(), torch.arange(4)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = fused_xent.cross_entropy(leaf, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(leaf.float(), target))


def test_autocast_with_a_float32_weight_beside_bfloat16_logits(device):
    """The weight of a module stays float32 while autocast makes the logits bfloat16."""
    input, target, weight = make_logits((4, 9), torch.bfloat16), torch.arange(4), torch.rand(9)
    with torch.autocast(device, dtype=torch.bfloat16):
        expected = F.cross_entropy(input, target, weight)
        actual = fused_xent.cross_entropy(input, target, weight)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 3, 8, 255, 10**6, -(2**40)])
@pytest.mark.parametrize("shape", [(20, 9), (20, 300), (4, 9, 5)], ids=str)
def test_ignore_index(shape, ignore_index, dtype):
    """Negative, a class index, above the classes, or outside the target's dtype."""
    input = make_logits(shape, torch.float32)
    target = torch.randint(0, 9, input.select(1, 0).shape)
    fits = torch.iinfo(dtype).min <= ignore_index <= torch.iinfo(dtype).max
    if fits:
        target[::3] = ignore_index
    kwargs = {"ignore_index": ignore_index, "label_smoothing": 0.1}
    expected = with_gradients(F.cross_entropy, input, target, kwargs)
    actual = with_gradients(fused_xent.cross_entropy, input, target.to(dtype), kwargs)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("strided", [False, True])
def test_uint8_targets_above_127(strided):
    input, target = make_logits((20, 256), torch.float32), torch.arange(236, 256)
    if strided:
        input = input.t().contiguous().t()
    expected = with_gradients(F.cross_entropy, input, target, {})
    actual = with_gradients(fused_xent.cross_entropy, input, target.to(torch.uint8), {})
    torch.testing.assert_close(actual, expected)


@by_dtype
@pytest.mark.parametrize("options", ["", "weight", "token_weight", "weight and token_weight"])
@pytest.mark.parametrize("labels", ["index", "probabilities"])
@pytest.mark.parametrize("n_rows", [8191, 8193, 16387])
def test_totals_of_many_rows(n_rows, labels, options, dtype):
    """Totals are summed by blocks: the mean of equal losses equals each to the last digits."""
    logits = torch.tensor([[0.1, 1.7, -0.3]]).to(dtype).expand(n_rows, 3)
    target = torch.full((n_rows,), 2)
    target[5::7] = -100
    rows = (target != -100).double()
    if labels == "probabilities":
        target, rows = F.one_hot(torch.full_like(target, 2), 3).to(dtype), torch.ones(n_rows)
    arguments = {"loss_dtype": torch.float64}
    weighted = options.startswith("weight")
    if weighted:
        arguments["weight"] = torch.tensor([0.5, 2.0, 0.75]).to(dtype)
    if "token_weight" in options:
        arguments["token_weight"] = torch.arange(n_rows) % 5 + 0.25 * (torch.arange(n_rows) > 8192)
        rows = rows * arguments["token_weight"]
    tolerance = {"rtol": 2e-7 if dtype != torch.float64 else 1e-12, "atol": 0.0}
    one = F.cross_entropy(logits[:1].double(), torch.tensor([2]))
    weight = 0.75 if weighted else 1.0
    total = fused_xent.cross_entropy(logits, target, reduction="sum", **arguments)
    torch.testing.assert_close(total, one * weight * rows.sum().double(), **tolerance)
    mean = fused_xent.cross_entropy(logits, target, **arguments)
    divided = 1.0 if labels == "index" else weight
    torch.testing.assert_close(mean, one * divided, **tolerance)


LEGACY = list(itertools.product([None, False, True], [None, False, True]))[1:]


@pytest.mark.parametrize(("size_average", "reduce"), LEGACY)
def test_legacy_reduction(size_average, reduce):
    input, target = make_logits((4, 9), torch.float32), torch.arange(4)
    legacy = {"size_average": size_average, "reduce": reduce}
    with pytest.warns(UserWarning, match="size_average and reduce"):
        expected = F.cross_entropy(input, target, **legacy)
    with pytest.warns(UserWarning, match="size_average and reduce"):
        actual = fused_xent.cross_entropy(input, target, **legacy)
    torch.testing.assert_close(actual, expected)
    with pytest.warns(UserWarning, match="size_average and reduce"):
        results = fused_xent.cross_entropy_with_statistics(input, target, **legacy)
    torch.testing.assert_close(results.loss, expected)


def test_positional_arguments_match_torch():
    input, target, weight = make_logits((4, 9), torch.float32), torch.arange(4), torch.rand(9)
    arguments = (input, target, weight, None, 2, None, "sum", 0.1)
    torch.testing.assert_close(fused_xent.cross_entropy(*arguments), F.cross_entropy(*arguments))


def test_strided_class_weights():
    input, target, weight = make_logits((4, 9), torch.float32), torch.arange(4), torch.rand(18)
    for view in (weight[::2], weight[:1].expand(9), weight[9:]):
        expected = F.cross_entropy(input, target, view.contiguous())
        torch.testing.assert_close(fused_xent.cross_entropy(input, target, view), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(5, 0), (0,), (2, 0, 3), (0, 5)], ids=str)
def test_probabilities_of_no_classes(shape, mode):
    """As in torch: empty probabilities, with the loss of each row."""
    logits = torch.zeros(shape, requires_grad=True)
    target = torch.zeros(shape)
    for reduction in ("none", "sum", "mean"):
        actual = fused_xent.cross_entropy(logits * 1, target, reduction=reduction, **MODES[mode])
        expected = F.cross_entropy(logits, target, reduction=reduction)
        torch.testing.assert_close(actual, expected, equal_nan=True)
        actual.sum().backward()
        assert logits.grad.shape == shape


@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
def test_statistics_of_no_classes(soft):
    """Sums are empty, argmax is -1 and correct is False."""
    logits = torch.zeros(5, 0)
    target = torch.zeros(5, 0) if soft else torch.full((5,), -100)
    results = fused_xent.cross_entropy_with_statistics(
        logits, target, reduction="none", lse_square_scale=0.5
    )
    for one in results[:4]:
        assert torch.equal(one, torch.zeros(5))
    assert torch.equal(results.argmax, torch.full((5,), -1))
    assert not results.correct.any()


NARROW = [
    (torch.uint8, 156, -100),  # equal modulo 2^8
    (torch.uint8, 5, 2**8 + 5),
    (torch.int32, 5, 2**32 + 5),
    (torch.int32, 5, -(2**32) + 5),
]
BY_TORCH = {
    "kernels": lambda loss, x, y: loss(x, y),
    "token_weight": lambda loss, x, y: loss(
        x, y, token_weight=torch.ones(2, requires_grad=True)
    ).detach(),
    "vmap": lambda loss, x, y: torch.func.vmap(loss)(x[None], y[None])[0],
    "jvp": lambda loss, x, y: torch.func.jvp(lambda x: loss(x, y), (x,), (x.cos(),))[1],
    "second derivative": lambda loss, x, y: torch.func.grad(
        lambda x: torch.func.grad(lambda x: loss(x, y).sum())(x).square().sum()
    )(x),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("way", BY_TORCH)
@pytest.mark.parametrize(("dtype", "index", "ignore_index"), NARROW, ids=str)
def test_ignore_index_beyond_the_targets_type(dtype, index, ignore_index, way):
    logits, target = torch.randn(2, 200), torch.tensor([index, 3], dtype=dtype)

    def ours(x, y, **options):
        options |= {"reduction": "none", "ignore_index": ignore_index}
        return fused_xent.cross_entropy(x, y, **options)

    def theirs(x, y, token_weight=None):
        return F.cross_entropy(x, y.to(torch.int64), reduction="none")

    pair = (BY_TORCH[way](loss, logits, target) for loss in (ours, theirs))
    torch.testing.assert_close(*pair)
    with pytest.raises(IndexError):
        BY_TORCH["token_weight"](ours, logits[:, : index - 2], target)


def test_gradient_of_probabilities_at_logits_of_minus_infinity():
    """It is 0 if the term's weight or probability is 0, with and without create_graph."""
    logits, weight = torch.randn(3, 5).double(), torch.tensor([1.0, 1, 1, 1, 0]).double()
    logits[:, 4] = -torch.inf
    for weights, last in ((weight, 0.5), (None, 0.0)):
        target = torch.rand(3, 5).double()
        target[:, 4] = last
        target.requires_grad_()
        loss = fused_xent.cross_entropy(logits, target, weights, reduction="sum")
        assert loss.isfinite()
        for create_graph in (False, True):
            gradient = torch.autograd.grad(
                loss, target, retain_graph=True, create_graph=create_graph
            )[0]
            expected = -logits.log_softmax(1)
            torch.testing.assert_close(gradient[:, :4], expected[:, :4])
            assert (gradient[:, 4] == 0).all()


def test_plain_tensor_subclasses():
    class Plain(torch.Tensor):
        pass

    input, target = make_logits((4, 9), torch.float32), torch.arange(4)
    loss = fused_xent.cross_entropy(input.as_subclass(Plain), target)
    assert type(loss) is Plain
    results = fused_xent.cross_entropy_with_statistics(input.as_subclass(Plain), target)
    assert type(results) is fused_xent.CrossEntropyStatistics
    assert {type(result) for result in results} == {Plain}
    expected = fused_xent.cross_entropy_with_statistics(input, target)
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


@pytest.mark.parametrize("name", ["cross_entropy", "cross_entropy_with_statistics"])
@pytest.mark.parametrize("argument", ["input", "target", "weight", "token_weight", "normalizer"])
def test_torch_function_takes_precedence(argument, name):
    function = getattr(fused_xent, name)

    class Asked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, called, types, args=(), kwargs=None):
            if called is function:
                return "asked", kwargs["reduction"]
            return super().__torch_function__(called, types, args, kwargs)

    arguments = {"input": make_logits((4, 9), torch.float32), "target": torch.arange(4)}
    values = arguments.get(argument, torch.ones(()))
    arguments |= {argument: values.as_subclass(Asked), "reduction": "sum"}
    assert function(**arguments) == ("asked", "sum")


@pytest.mark.parametrize("name", ["cross_entropy", "cross_entropy_with_statistics"])
def test_torch_function_gets_all_arguments(name):
    function, given = getattr(fused_xent, name), {}

    class Asked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, called, types, args=(), kwargs=None):
            given.update(kwargs or {})

    tensors = {key: torch.ones(()) for key in ("weight", "token_weight", "normalizer")}
    options = {"size_average": False, "reduce": True, "ignore_index": 3, "softcap": 2.0}
    logits = torch.randn(4, 9).as_subclass(Asked)
    function(logits, torch.arange(4), **tensors, **options)
    assert {key: given[key] for key in (*tensors, *options)} == tensors | options


def test_meta_tensors_have_shapes_and_dtypes():
    input = torch.empty(4, 9, 5, device="meta", dtype=torch.bfloat16, requires_grad=True)
    target = torch.empty(4, 5, device="meta", dtype=torch.int64)
    loss = fused_xent.cross_entropy(input, target, reduction="none")
    assert (loss.shape, loss.dtype, loss.device.type) == ((4, 5), torch.bfloat16, "meta")
    loss.sum().backward()
    assert input.grad.shape == input.shape


@pytest.mark.parametrize("normalizer", [3, 2.5, torch.tensor(3.0), torch.tensor(3).half()])
def test_normalizer_goes_to_the_logits_device(normalizer, monkeypatch):
    """A number or CPU tensor becomes a float64 scalar on the device of the logits."""
    given, forward = [], _ops.forward
    monkeypatch.setattr(_ops, "forward", lambda p: given.append(p.normalizer) or forward(p))
    input = torch.empty(4, 9, device="meta", requires_grad=True)
    target = torch.empty(4, device="meta", dtype=torch.int64)
    loss = fused_xent.cross_entropy(input, target, normalizer=normalizer)
    assert [(x.device.type, x.dtype, x.shape) for x in given] == [("meta", torch.float64, ())]
    assert (loss.shape, loss.dtype, loss.device.type) == ((), torch.float32, "meta")
    loss.backward()
    assert input.grad.device.type == "meta"


def test_float64_class_weights_promote_the_sums():
    """As in torch, weights that overflow float32 stay finite."""
    logits, target = torch.randn(4, 9), torch.rand(4, 9).softmax(1)
    weight = torch.full((9,), 1e300, dtype=torch.float64)
    expected = F.cross_entropy(logits.double(), target.double(), weight)
    loss = fused_xent.cross_entropy(logits, target, weight)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        (fused_xent.cross_entropy, F.cross_entropy),
        (fused_xent.CrossEntropyLoss, torch.nn.CrossEntropyLoss),
        (fused_xent.linear_cross_entropy, getattr(F, "linear_cross_entropy", None)),
        (fused_xent.LinearCrossEntropyLoss, getattr(torch.nn, "LinearCrossEntropyLoss", None)),
    ],
    ids=lambda function: function.__name__ if function else "not in this torch",
)
def test_torchs_arguments_come_first_with_torchs_defaults(ours, torchs):
    if torchs is None:
        pytest.skip("torch before 2.13 has no loss of a linear layer")
    ours, torchs = (inspect.signature(function).parameters for function in (ours, torchs))
    in_order = [name for name, p in torchs.items() if p.kind is not p.KEYWORD_ONLY]
    assert list(ours)[: len(in_order)] == in_order
    for name, torchs_own in torchs.items():
        assert (ours[name].default, ours[name].kind) == (torchs_own.default, torchs_own.kind)


@pytest.mark.parametrize("name", fused_xent.__all__)
def test_type_hints_resolve(name):
    """Even if this torch has no LinearCrossEntropyOptions."""
    public = getattr(fused_xent, name)
    is_module = isinstance(public, type) and issubclass(public, torch.nn.Module)
    assert typing.get_type_hints(public.__init__ if is_module else public)
