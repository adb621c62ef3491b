"""The operators: opcheck, meta implementations, refusal of wrong arguments, derivatives."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cases import DTYPES, LABELS, make_logits, make_options, make_target
from torch.library import opcheck

import fused_xent
from fused_xent import reference

ops = torch.ops.fused_xent
SHAPES = ((4, 9), (3, 200), (2, 9, 5), (9,), (2, 17000))
KINDS = ("index", "index, uint8", "index, weighted and smoothed", "probabilities, all options")
REAL = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ALL_NUMBERS = {
    "label_smoothing": 0.1,
    "lse_square_scale": 0.01,
    "focal_gamma": 2.0,
    "softcap": 5.0,
    "logit_scale": 0.5,
}
OPTIONS = ("ignore_index", *ALL_NUMBERS)
OF_FORWARD = ("forward", "forward_with_statistics")
OF_LOSS = ("loss", *OF_FORWARD)
FUSED = ("forward_backward_", "forward_backward_with_statistics_")
OF_BACKWARD = ("logits", "target", "weight", "token_weight", "dim", "reduction", *OPTIONS)


def accumulation_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_arguments(shape=(4, 9), dtype=torch.float32, kind="index", reduction=1, all_options=False):
    """Return the arguments of forward by name; with all_options, set all of them."""
    logits = make_logits(shape, dtype)
    labels = LABELS[kind]
    if labels.dtype == torch.uint8 and max(shape) > 255:
        labels = labels._replace(ignore_index=254)
    target = make_target(logits, labels)
    dim = 0 if len(shape) == 1 else 1
    rows = logits.select(dim, 0).shape
    options = make_options(logits, labels)
    weight = options.pop("weight", None)
    if all_options and weight is not None:
        weight = weight.abs() + 0.1  # positive: the focal loss of a negative cross-entropy is NaN
    return {
        "logits": logits,
        "target": target,
        "weight": weight,
        "token_weight": torch.rand(rows).round(decimals=1) if all_options else None,
        "normalizer": torch.tensor(3.0, dtype=torch.float64) if all_options else None,
        "dim": dim,
        "reduction": reduction,
        "loss_dtype": torch.float32,
        **options,
        **(ALL_NUMBERS if all_options else {}),
    }


def call(name, arguments):
    """Return the results of an operator as a tuple."""
    results = getattr(ops, name)(**arguments)
    return results if isinstance(results, tuple) else (results,)


def run_forward(forward, statistics=False):
    """Return the results of forward by name, and all of them as 'outputs'."""
    names = ("loss", "total_weight", "state", "lse", "entropy", "argmax")
    outputs = getattr(ops, OF_FORWARD[statistics])(**forward)
    return dict(zip(names, outputs, strict=statistics)) | {"outputs": outputs}


def make_backward(forward, statistics=False):
    """Run forward; return the arguments of backward, and the outputs of forward."""
    found = run_forward(forward, statistics)
    rows = torch.ones_like(found["lse"]) if statistics else None
    backward = {
        **{name: forward[name] for name in OF_BACKWARD if name in forward},
        "total_weight": found["total_weight"],
        "state": found["state"],
        "entropy": found.get("entropy"),
        "grad_loss": torch.ones_like(found["loss"]),
        "grad_lse": rows,
        "grad_entropy": rows,
    }
    return backward, found["outputs"]


def clone(arguments, *names):
    """Return the arguments with the named tensors copied; without names, all tensors."""
    return {
        name: value.clone() if torch.is_tensor(value) and name in (names or arguments) else value
        for name, value in arguments.items()
    }


OPCHECKED = [
    *((torch.float32, shape, kind) for shape in ((9,), (4, 9), (2, 9, 5)) for kind in KINDS),
    *((dtype, (3, 200), "index") for dtype in DTYPES),
]


@pytest.mark.parametrize("all_options", [False, True], ids=["plain", "all options"])
@pytest.mark.parametrize(("dtype", "shape", "kind"), OPCHECKED, ids=str)
def test_opcheck(dtype, shape, kind, all_options):
    forward = make_arguments(shape, dtype, kind, int(all_options), all_options)
    for name in OF_LOSS:
        opcheck(getattr(ops, name).default, (), forward)
    for statistics in (False, True):
        backward, (loss, *_) = make_backward(forward, statistics)
        opcheck(ops.backward.default, (), backward)
        opcheck(ops.backward_.default, (), clone(backward, "logits"))
    for name in FUSED:
        opcheck(getattr(ops, name).default, (), clone(forward, "logits"))
    scale = {
        "grad_logits": ops.backward(**backward),
        "grad_loss": 2 * torch.ones_like(loss),
        "target": forward["target"],
        "token_weight": forward["token_weight"],
        "dim": forward["dim"],
        "ignore_index": forward.get("ignore_index", -100),
    }
    opcheck(ops.scale_gradient_.default, (), scale)
    opcheck(ops.multiply_.default, (scale["grad_logits"], torch.tensor(1.5)))


def recorded(forward):
    """Return copies of the arguments in which all differentiable tensors require a gradient."""
    names = ("logits", "target", "weight", "token_weight", "normalizer")
    return {
        name: value.clone().requires_grad_()
        if name in names and value is not None and value.is_floating_point()
        else value
        for name, value in forward.items()
    }


@pytest.mark.parametrize("all_options", [False, True], ids=["plain", "all options"])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_with_gradients(kind, all_options):
    """Autograd formulas are registered, and compiled graphs give the same gradients."""
    forward = make_arguments(kind=kind, reduction=int(all_options), all_options=all_options)
    for name in OF_LOSS:
        opcheck(getattr(ops, name).default, (), recorded(forward))
    backward, _ = make_backward(forward, statistics=all_options)
    opcheck(ops.backward.default, (), recorded(backward))


def test_differentiable_losses_have_the_requested_dtype():
    forward = recorded(make_arguments())
    for dtype in (None, *DTYPES):
        for name in OF_LOSS:
            loss, *_ = call(name, forward | {"loss_dtype": dtype})
            assert loss.requires_grad
            assert loss.dtype == (dtype or torch.float32)


def to_meta(arguments):
    return {name: x.to("meta") if torch.is_tensor(x) else x for name, x in arguments.items()}


def assert_of_one_kind(real, fake):
    assert [x.device.type for x in fake] == ["meta"] * len(fake)
    assert [(x.shape, x.dtype, x.stride()) for x in real] == [
        (x.shape, x.dtype, x.stride()) for x in fake
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("all_options", [False, True], ids=["plain", "all options"])
def test_meta_implementations_agree_in_strides(all_options, reduction, transposed, shape):
    forward = make_arguments(shape, reduction=reduction, all_options=all_options)
    if transposed and len(shape) > 1:
        forward["logits"] = forward["logits"].mT.contiguous().mT
    for name in (*OF_LOSS, *FUSED):
        in_place = clone(forward, "logits")
        assert_of_one_kind(call(name, in_place), call(name, to_meta(in_place)))
    for statistics in (False, True):
        backward, _ = make_backward(forward, statistics)
        assert_of_one_kind(call("backward", backward), call("backward", to_meta(backward)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_meta_implementations_agree_in_dtypes(reduction, loss_dtype, dtype):
    """loss_dtype None means the dtype of the logits."""
    forward = make_arguments(dtype=dtype, reduction=reduction) | {"loss_dtype": loss_dtype}
    for name in (*OF_LOSS, *FUSED):
        real = call(name, clone(forward, "logits"))
        assert_of_one_kind(real, call(name, to_meta(forward)))
        assert real[0].dtype == (loss_dtype or dtype)


@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("name", ALL_NUMBERS)
def test_meta_implementations_agree_by_each_option_alone(name, soft):
    """The size of state depends on them: it holds the slope, and label_mass of probabilities."""
    forward = make_arguments(kind="probabilities" if soft else "index")
    forward |= {name: ALL_NUMBERS[name]}
    real = run_forward(forward)["outputs"]
    assert_of_one_kind(real, ops.forward(**to_meta(forward)))
    assert len(real[2]) == 2 + soft + (name == "focal_gamma")


@pytest.mark.parametrize("name", ["backward_", "scale_gradient_", "multiply_"])
def test_overwriting_operators_accept_meta_tensors(name):
    assert getattr(ops, name)(**to_meta(OVERWRITING[name].arguments)) is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_returns_state_and_total_weight(dtype, shape):
    """row_max and log_sum, whose sum is the log-sum-exp, and total_weight in float64."""
    forward = make_arguments(shape, dtype)
    logits, dim = forward["logits"], forward["dim"]
    weight = torch.rand(shape[dim], dtype=accumulation_dtype(dtype))
    _, total_weight, state = ops.forward(
        **forward | {"weight": weight, "loss_dtype": torch.float64}
    )
    row_max, log_sum = state
    assert torch.equal(row_max, logits.amax(dim).to(row_max.dtype))
    torch.testing.assert_close(
        (row_max + log_sum).double(), logits.double().logsumexp(dim), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(total_weight, weight[forward["target"]].double().sum())
    assert state.dtype == accumulation_dtype(dtype)
    assert state.shape == (2, *logits.select(dim, 0).shape)
    assert state.is_contiguous()


@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_of_all_options(dtype, shape, soft):
    """state holds row_max and log_sum of the transformed logits, label_mass and loss_slope."""
    forward = make_arguments(
        shape, dtype, "probabilities" if soft else "index", reduction=0, all_options=True
    )
    logits, target, dim = (forward[name] for name in ("logits", "target", "dim"))
    weight = torch.rand(shape[dim], dtype=accumulation_dtype(dtype)) + 0.1
    tokens = torch.rand(logits.select(dim, 0).shape) + 0.5  # none is 0, so every row counts
    forward |= {"weight": weight, "token_weight": tokens, "normalizer": None}
    row_max, log_sum, *others = run_forward(forward)["state"]
    seen = reference.transform(logits.double(), ALL_NUMBERS["softcap"], ALL_NUMBERS["logit_scale"])
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(row_max.double(), seen.amax(dim), **close)
    torch.testing.assert_close((row_max + log_sum).double(), seen.logsumexp(dim), **close)
    smoothing, gamma = ALL_NUMBERS["label_smoothing"], ALL_NUMBERS["focal_gamma"]
    weight = weight.double().view([-1] + [1] * (logits.dim() - dim - 1))
    n_classes = shape[dim]
    if soft:
        q = (1 - smoothing) * target.double() + smoothing / n_classes
    else:
        one_hot = torch.zeros_like(seen).scatter(dim, target.unsqueeze(dim), 1)
        q = (1 - smoothing) * one_hot + smoothing / n_classes
    q = q * weight
    mass, cross_entropy = q.sum(dim), -(q * seen.log_softmax(dim)).sum(dim).requires_grad_()
    focal = ((-torch.expm1(-cross_entropy / mass)) ** gamma * cross_entropy).sum()
    (slope,) = torch.autograd.grad(focal, cross_entropy)
    for actual, expected in zip(others, [*([mass] if soft else []), slope], strict=True):
        torch.testing.assert_close(actual.double(), expected, **close)


@pytest.mark.parametrize("all_options", [False, True], ids=["plain", "all options"])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 5000)], ids=str)
def test_fused_mode_returns_the_results_of_forward(shape, all_options):
    """Loss and statistics are those of forward, in the same order."""
    forward = make_arguments(shape, all_options=all_options)
    found = run_forward(forward, statistics=True)
    with_statistics = [found[name] for name in ("loss", "lse", "entropy", "argmax")]
    torch.testing.assert_close(found["lse"], found["state"][:2].sum(0))
    fused = ops.forward_backward_with_statistics_(**clone(forward, "logits"))
    torch.testing.assert_close(list(fused), with_statistics)
    loss = ops.forward_backward_(**clone(forward, "logits"))
    torch.testing.assert_close(loss, run_forward(forward)["loss"])
    assert torch.equal(ops.loss(**forward), run_forward(forward)["loss"])


@pytest.mark.parametrize("all_options", [False, True], ids=["plain", "all options"])
def test_gradient_of_the_fused_mode_is_that_of_the_loss(all_options):
    """With statistics or without, the gradient is the same."""
    forward = make_arguments((3, 200), all_options=all_options)
    backward, _ = make_backward(forward)
    for name in FUSED:
        in_place = clone(forward, "logits")
        getattr(ops, name)(**in_place)
        torch.testing.assert_close(in_place["logits"], ops.backward(**backward))


def test_a_normalizer_divides_the_gradient():
    forward = make_arguments(reduction=1)
    normalizer = torch.tensor(2.5, dtype=torch.float64)
    divided, _ = make_backward(forward | {"normalizer": normalizer})
    summed, _ = make_backward(forward | {"reduction": 2})
    torch.testing.assert_close(divided["total_weight"], normalizer)
    torch.testing.assert_close(ops.backward(**divided), ops.backward(**summed) / 2.5)


def with_step(tensor):
    """Return the same values with stride 2 in the last dimension."""
    return torch.stack([tensor, torch.full_like(tensor, 99)], -1)[..., 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("other", [*REAL, torch.int32, torch.uint8, torch.bool], ids=str)
def test_weights_of_rows_have_any_real_dtype_and_strides(other, dtype):
    """Token weights may have any real dtype, class weights any floating-point dtype."""
    forward = make_arguments(dtype=dtype, all_options=True)
    tokens = torch.tensor([1, 0, 1, 1] if other == torch.bool else [2, 0, 3, 1]).to(other)
    forward["token_weight"] = tokens
    if other.is_floating_point:
        forward["weight"] = (torch.rand(9) + 0.1).to(other)
    acc = accumulation_dtype(dtype)
    cast = {name: x.to(acc) for name, x in forward.items() if "weight" in name and x is not None}
    strided = {name: with_step(forward[name]) for name in cast}
    assert not any(x.is_contiguous() for x in strided.values())
    for statistics in (False, True):
        expected, outputs = make_backward(forward | cast, statistics)
        for given in (forward, forward | strided):
            backward, actual = make_backward(given, statistics)
            assert all(map(torch.equal, actual, outputs))
            assert torch.equal(ops.backward(**backward), ops.backward(**expected))
            in_place, cast_in_place = clone(given, "logits"), clone(forward | cast, "logits")
            getattr(ops, FUSED[statistics])(**in_place)
            getattr(ops, FUSED[statistics])(**cast_in_place)
            assert torch.equal(in_place["logits"], cast_in_place["logits"])
    gradient = expected["logits"].clone()
    for weights in (tokens, with_step(tokens)):
        scaled = gradient.clone()
        ops.scale_gradient_(scaled, torch.tensor(2.0), forward["target"], weights, 1, -100)
        right = torch.where(tokens[:, None] != 0, 2 * gradient, 0)
        torch.testing.assert_close(scaled, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("other", REAL, ids=str)
def test_upstream_gradients_have_any_floating_dtype_and_strides(other, dtype):
    forward = make_arguments(dtype=dtype, reduction=0, all_options=True) | {"normalizer": None}
    backward, _ = make_backward(forward, statistics=True)
    names = ("grad_loss", "grad_lse", "grad_entropy")
    given = {name: torch.arange(i, i + 4.0).to(other) for i, name in enumerate(names)}
    cast = {name: x.to(accumulation_dtype(dtype)) for name, x in given.items()}
    expected = ops.backward(**backward | cast)
    assert expected.abs().max() > 0
    for upstream in (given, {name: with_step(x) for name, x in given.items()}):
        assert torch.equal(ops.backward(**backward | upstream), expected)
        in_place = clone(backward, "logits") | upstream
        ops.backward_(**in_place)
        assert torch.equal(in_place["logits"], expected)
    expanded = torch.tensor(2.0).to(other).expand(4)
    one = torch.tensor(2.0)
    assert torch.equal(
        ops.backward(**backward | {"grad_loss": expanded}),
        ops.backward(**backward | {"grad_loss": one}),
    )


def test_missing_upstream_gradients_are_0():
    backward, _ = make_backward(make_arguments(reduction=0), statistics=True)
    names = ("grad_loss", "grad_lse", "grad_entropy")
    without = dict.fromkeys(names)
    assert not ops.backward(**backward | without).any()
    parts = [ops.backward(**backward | without | {name: backward[name]}) for name in names]
    assert all(part.any() for part in parts)
    torch.testing.assert_close(sum(parts), ops.backward(**backward))


LOGITS, TARGET = torch.randn(4, 9), torch.arange(4)
SOFT, EXPANDED = LOGITS.softmax(1), torch.randn(9).expand(4, 9)
ROW_WEIGHT = torch.ones(4)
FORWARD = {
    "logits": LOGITS,
    "target": TARGET,
    "weight": None,
    "token_weight": None,
    "normalizer": None,
    "dim": 1,
    "reduction": 1,
    "loss_dtype": torch.float32,
}
WRONG_FORWARD = {
    "dim too high": {"dim": 2},
    "dim negative": {"dim": -1},
    "dim of another target": {"dim": 0},
    "scalar logits": {"logits": torch.tensor(1.0), "target": torch.tensor(0), "dim": 0},
    "integer logits": {"logits": LOGITS.long()},
    "complex logits": {"logits": LOGITS * 1j},
    "too few targets": {"target": TARGET[1:]},
    "too many targets": {"target": torch.zeros(5, dtype=torch.long)},
    "targets of two dimensions": {"target": TARGET[:, None]},
    "target out of range": {"target": TARGET + 100},
    "int16 targets": {"target": TARGET.short()},
    "bool targets": {"target": TARGET > 1},
    "complex targets": {"target": SOFT * 1j},
    "probabilities of other shape": {"target": SOFT[:, 1:]},
    "probabilities of more precision": {"target": SOFT.double()},
    "probabilities of less precision": {"target": SOFT.half()},
    "float32 probabilities under float64": {"logits": LOGITS.double(), "target": SOFT},
    "probabilities of another 16-bit type": {"logits": LOGITS.half(), "target": SOFT.bfloat16()},
    "float64 probabilities under 16 bits": {"logits": LOGITS.half(), "target": SOFT.double()},
    "transposed probabilities": {"target": SOFT.mT},
    "short weight": {"weight": torch.ones(8)},
    "long weight": {"weight": torch.ones(10)},
    "integer weight": {"weight": torch.ones(9).long()},
    "bool weight": {"weight": torch.ones(9).bool()},
    "complex weight": {"weight": torch.ones(9) * 1j},
    "weight of two dimensions": {"weight": torch.ones(9, 1)},
    "short token_weight": {"token_weight": ROW_WEIGHT[1:]},
    "complex token_weight": {"token_weight": ROW_WEIGHT * 1j},
    "complex128 token_weight": {"token_weight": ROW_WEIGHT.double() * 1j},
    "token_weight of two dimensions": {"token_weight": torch.ones(4, 1)},
    "normalizer of float32": {"normalizer": torch.tensor(4.0)},
    "normalizer of one dimension": {"normalizer": torch.tensor([4.0]).double()},
    "complex normalizer": {"normalizer": torch.tensor(4j, dtype=torch.complex128)},
    "unknown reduction": {"reduction": 3},
    "negative reduction": {"reduction": -1},
    "loss of integers": {"loss_dtype": torch.int64},
    "complex loss": {"loss_dtype": torch.complex64},
    "target out of range beside a normalizer": {
        "target": TARGET + 6,
        "normalizer": torch.tensor(4.0).double(),
    },
}
FOCAL = {"focal_gamma": 2.0}
BACKWARD, _ = make_backward(FORWARD, statistics=True)
BACKWARD |= {"entropy": None, "grad_lse": None, "grad_entropy": None}
STATE, ROWS = BACKWARD["state"], BACKWARD["state"][0]
THREE, FOUR = torch.ones(3, 4), torch.ones(4, 4)  # states of more numbers per row
WITH_ENTROPY = {"grad_entropy": ROWS, "entropy": ROWS}
WRONG_BACKWARD = {
    "upstream of other shape": {"grad_loss": torch.ones(5)},
    "upstream of two dimensions": {"grad_loss": torch.ones(4, 9)},
    "upstream of one row": {"grad_loss": torch.ones(1)},
    "complex upstream": {"grad_loss": torch.tensor(1j)},
    "complex upstream of rows": {"grad_loss": ROWS * 1j},
    "state of fewer rows": {"state": STATE[:, 1:].contiguous()},
    "state of more rows": {"state": torch.ones(2, 5)},
    "state of one number per row": {"state": STATE[:1]},
    "state of three numbers per row": {"state": THREE},
    "state without the rows": {"state": STATE.flatten()},
    "state of a batch": {"state": STATE[None]},
    "state after the rows": {"state": STATE.mT.contiguous()},
    "state of float64": {"state": STATE.double()},
    "state of 16 bits": {"state": STATE.half()},
    "complex state": {"state": STATE * 1j},
    "state of float32 under float64": {"logits": LOGITS.double()},
    "state with a step": {"state": torch.ones(2, 8)[:, ::2]},
    "state whose rows are adjacent": {"state": torch.ones(4, 2).mT},
    "expanded state": {"state": torch.ones(2, 1).expand(2, 4)},
    "probabilities without label_mass": {"target": SOFT},
    "probabilities with a slope as well": {"target": SOFT, "state": FOUR},
    "focal loss without its slope": FOCAL,
    "focal loss of two slopes": FOCAL | {"state": FOUR},
    "focal loss of probabilities without a slope": FOCAL | {"target": SOFT, "state": THREE},
    "label_mass of other shape": {"target": SOFT, "state": torch.ones(3, 3)},
    "label_mass of other dtype": {"target": SOFT, "state": THREE.double()},
    "label_mass with a step": {"target": SOFT, "state": torch.ones(3, 8)[:, ::2]},
    "slope of other shape": FOCAL | {"state": torch.ones(3, 3)},
    "slope of other dtype": FOCAL | {"state": THREE.double()},
    "total_weight of float32": {"total_weight": torch.tensor(4.0)},
    "total_weight of one dimension": {"total_weight": torch.tensor([4.0]).double()},
    "no total_weight of a mean": {"total_weight": None},
    "target out of range": {"target": TARGET + 100},
    "logits of other shape": {"logits": torch.randn(5, 9)},
    "integer weight": {"weight": torch.ones(9).long()},
    "short weight": {"weight": torch.ones(8)},
    "short token_weight": {"token_weight": ROW_WEIGHT[1:]},
    "complex token_weight": {"token_weight": ROW_WEIGHT * 1j},
    "short grad_lse": {"grad_lse": ROWS[1:]},
    "grad_lse of a scalar": {"grad_lse": torch.tensor(1.0)},
    "grad_lse of a batch": {"grad_lse": ROWS[None]},
    "complex grad_lse": {"grad_lse": ROWS * 1j},
    "short grad_entropy": {"grad_entropy": ROWS[1:], "entropy": ROWS},
    "complex grad_entropy": {"grad_entropy": ROWS * 1j, "entropy": ROWS},
    "grad_entropy without an entropy": {"grad_entropy": ROWS},
    "short entropy": {"grad_entropy": ROWS, "entropy": ROWS[1:]},
    "complex entropy": {"grad_entropy": ROWS, "entropy": ROWS * 1j},
    "unknown reduction": {"reduction": 3},
    "negative reduction": {"reduction": -1},
}


def skip_what_only_the_cpu_refuses(wrong, device):
    if "target out of range" in wrong and device != "cpu":
        pytest.skip("a GPU gives NaN for such rows: test_cuda.py")


@pytest.mark.parametrize("wrong", WRONG_FORWARD)
def test_wrong_arguments_of_forward_are_refused(wrong, device):
    skip_what_only_the_cpu_refuses(wrong, device)
    arguments = FORWARD | WRONG_FORWARD[wrong]
    before = arguments["logits"].clone()
    for name in (*OF_LOSS, *FUSED):
        with pytest.raises((ValueError, RuntimeError, IndexError), match="must"):
            getattr(ops, name)(**arguments)
        assert torch.equal(arguments["logits"], before)


def test_statistics_of_2_31_classes_are_refused():
    logits = torch.ones(1, 1).expand(0, 2**31)
    for name in (OF_FORWARD[1], FUSED[1]):
        with pytest.raises((ValueError, RuntimeError), match="must"):
            getattr(ops, name)(**FORWARD | {"logits": logits, "target": TARGET[:0]})


def test_sparse_labels_of_2_31_classes_are_refused():
    """The kernels read a row's class as int32: of class 2**31 they would make none."""
    logits = torch.ones(1, 1).expand(0, 2**31)
    classes = torch.zeros(0, 1, dtype=torch.long)
    labels = {"logits": logits, "target": torch.ones(0, 1), "target_indices": classes}
    for name in (*OF_LOSS, *FUSED):
        with pytest.raises((ValueError, RuntimeError), match="classes for target_indices"):
            getattr(ops, name)(**FORWARD | labels)
    with pytest.raises((ValueError, RuntimeError), match="classes for target_indices"):
        ops.selected_log_probs(logits, classes, 1, False)


@pytest.mark.parametrize("wrong", WRONG_BACKWARD)
def test_wrong_arguments_of_backward_are_refused(wrong, device):
    skip_what_only_the_cpu_refuses(wrong, device)
    arguments = BACKWARD | WRONG_BACKWARD[wrong]
    before = arguments["logits"].clone()
    arguments = arguments | {"logits": before.clone()}
    for operator in (ops.backward, ops.backward_):
        with pytest.raises((ValueError, RuntimeError, IndexError), match="must"):
            operator(**arguments)
    assert torch.equal(arguments["logits"], before)


def test_unchanged_arguments_of_the_tables_are_accepted():
    """Otherwise a refusal could have another cause than the change."""
    for name in OF_LOSS:
        getattr(ops, name)(**FORWARD)
    for others in ({}, WITH_ENTROPY, {"reduction": 2, "total_weight": None}):
        ops.backward(**BACKWARD | others)
    ops.backward(**BACKWARD | {"target": SOFT, "state": THREE})
    ops.backward(**BACKWARD | FOCAL | {"state": THREE})
    ops.backward(**BACKWARD | FOCAL | {"target": SOFT, "state": FOUR})


STRIDES = {  # shape, strides, and True if elements share memory
    "one row after the other": ((4, 6), (6, 1), False),
    "a row begins in the last element of the previous one": ((4, 6), (5, 1), True),
    "classes and rows with the same stride": ((4, 6), (1, 1), True),
    "columns": ((4, 6), (1, 4), False),
    "columns that overlap": ((4, 6), (1, 3), True),
    "three dimensions, one after the other": ((4, 6, 3), (18, 3, 1), False),
    "the outermost stride exceeds only the extent of the middle": ((4, 6, 3), (16, 3, 1), True),
    "the outermost stride is one short of the others' extent": ((4, 6, 3), (17, 3, 1), True),
    "dimensions of size 1 have any stride": ((4, 6, 1), (6, 1, 0), False),
    "gaps": ((4, 6, 3), (100, 12, 4), False),
    "one number": ((4, 6), (0, 0), True),
}


@pytest.mark.parametrize("strides", STRIDES)
def test_operators_refuse_shared_memory(strides):
    """Overwriting operators write if each element has its own memory, and refuse otherwise."""
    shape, strides, is_shared = STRIDES[strides]
    logits = torch.randn(400).as_strided(shape, strides)
    target = torch.randint(6, shape[:1] + shape[2:])
    forward = FORWARD | {"logits": logits, "target": target}
    backward, _ = make_backward(forward)
    scale = (logits, 2 * backward["grad_loss"], target, None, 1, -100)
    expected = ops.backward(**backward)
    before = logits.clone()
    if is_shared:
        for operator in (
            lambda: ops.backward_(**backward),
            lambda: ops.scale_gradient_(*scale),
            lambda: ops.multiply_(logits, torch.tensor(2.0)),
        ):
            with pytest.raises((ValueError, RuntimeError), match="must have one memory location"):
                operator()
        assert torch.equal(logits, before)
    else:
        ops.backward_(**backward)
        assert torch.equal(logits, expected)
        ops.scale_gradient_(*scale)
        torch.testing.assert_close(logits, 2 * expected)
        ops.multiply_(logits, torch.tensor(2.0))
        torch.testing.assert_close(logits, 4 * expected)


def test_more_than_4_row_dimensions_are_not_overwritten():
    """Operators that only read can copy the logits instead."""
    logits = torch.randn((9, *[4] * 6))[:, ::2, ::2, ::2, ::2, ::2].movedim(0, 1)
    target = torch.zeros(logits.shape[:1] + logits.shape[2:], dtype=torch.int64)
    forward = FORWARD | {"logits": logits, "target": target}
    before = logits.clone()
    for name in FUSED:
        with pytest.raises((ValueError, RuntimeError), match="at most 4 row dimensions"):
            getattr(ops, name)(**forward)
    backward, _ = make_backward(forward)
    with pytest.raises((ValueError, RuntimeError), match="at most 4 row dimensions"):
        ops.backward_(**backward)
    with pytest.raises((ValueError, RuntimeError), match="at most 4 row dimensions"):
        ops.multiply_(logits, torch.tensor(2.0))
    assert torch.equal(logits, before)
    expected = ops.backward(**backward | {"logits": logits.contiguous()})
    torch.testing.assert_close(ops.backward(**backward), expected)


def test_dimensions_of_size_1_do_not_count():
    """Kernels take four row dimensions that do not merge; size 1 dimensions do not count."""
    shape, strides = (2, 9, 1, 3, 1, 2, 1, 2), (1, 300, 77, 7, 1000, 29, 500, 90)
    logits = torch.randn(4000).as_strided(shape, strides)
    target = torch.randint(9, shape[:1] + shape[2:])
    backward, _ = make_backward(FORWARD | {"logits": logits, "target": target})
    expected = ops.backward(**backward | {"logits": logits.contiguous()})
    ops.backward_(**backward)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
def test_rows_of_no_classes(soft):
    """Their loss is 0 and their argmax -1."""
    logits = torch.empty(4, 0)
    target = torch.empty(4, 0) if soft else torch.full((4,), -100)
    arguments = FORWARD | FOCAL | {"logits": logits, "target": target, "reduction": 0}
    loss, _, state, lse, entropy, argmax = ops.forward_with_statistics(**arguments)
    assert torch.equal(state, torch.zeros(3 + soft, 4))
    for rows in (loss, lse, entropy, ops.forward(**arguments)[0], ops.loss(**arguments)):
        assert torch.equal(rows, torch.zeros(4))
    assert torch.equal(argmax, torch.full((4,), -1))
    assert not ops.forward_backward_(**arguments).any()
    fused = ops.forward_backward_with_statistics_(**arguments)
    assert all(map(torch.equal, fused, (loss, lse, entropy, argmax)))
    for statistics in (False, True):
        backward, _ = make_backward(arguments, statistics)
        assert ops.backward(**backward).shape == (4, 0)
        ops.backward_(**backward)
    ops.scale_gradient_(logits, torch.tensor(2.0), target, None, 1, -100)
    ops.multiply_(logits, torch.tensor(2.0))


@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_no_rows(reduction, soft):
    logits = torch.empty(0, 9)
    target = torch.empty(0, 9) if soft else torch.empty(0, dtype=torch.int64)
    arguments = FORWARD | FOCAL | {"logits": logits, "target": target, "reduction": reduction}
    backward, (loss, _, state, *rows) = make_backward(arguments, statistics=True)
    assert state.shape == (3 + soft, 0)
    assert [x.shape for x in rows] == [(0,)] * 3
    assert loss.isnan() if reduction == 1 else loss.sum() == 0
    assert ops.backward(**backward).shape == (0, 9)
    ops.multiply_(logits, torch.tensor(2.0))


@pytest.mark.parametrize("ignore_index", [7, -1])
def test_scaled_gradients_of_ignored_rows_stay_0(ignore_index):
    gradient, target = torch.ones(4, 9), torch.tensor([1, ignore_index, 2, ignore_index])
    gradient[1::2] = 0
    upstream = torch.tensor([2.0, torch.nan, 3.0, torch.inf])
    ops.scale_gradient_(gradient, upstream, target, None, 1, ignore_index)
    assert torch.equal(gradient, torch.tensor([2.0, 0, 3, 0])[:, None].expand(4, 9))


HUGE_PAGES = r"""
import re
from pathlib import Path
import torch
import fused_xent
logits = torch.randn(2000, 5000, requires_grad=True)
loss = fused_xent.cross_entropy(logits, torch.randint(5000, (2000,)))
(gradient,) = torch.autograd.grad(loss, logits)
begin = gradient.data_ptr()
end, page = begin + gradient.nbytes, 2 << 20
asked = []
for mapping in re.findall(
    r"(?m)^([0-9a-f]+-[0-9a-f]+) (?:(?!VmFlags).*\n)*.*VmFlags:.* hg",
    Path("/proc/self/smaps").read_text(),
):
    first, last = (int(address, 16) for address in mapping.split("-"))
    if first < end and begin < last:
        asked.append((first, last))
assert all(begin <= first and last <= end for first, last in asked)
assert sum(last - first for first, last in asked) > end - begin - 2 * page
"""


@pytest.mark.cpu("huge pages are requested for CPU memory only")
@pytest.mark.parametrize("kept", ["0", "1"])
def test_huge_pages_are_requested_within_the_gradient(kept, run_python):
    """In /proc/self/smaps, flag hg marks mappings for which huge pages were requested."""
    needed = ("/proc/self/smaps", "/sys/kernel/mm/transparent_hugepage")
    if not all(Path(path).exists() for path in needed):
        pytest.skip("this system has no transparent huge pages")
    result = run_python("-c", HUGE_PAGES, FUSED_XENT_KEEP_GRADIENT=kept)
    assert result.returncode == 0, result.stderr


def test_overlapping_memory_is_not_written_to():
    before = EXPANDED.clone()
    scale = (EXPANDED, 2 * BACKWARD["grad_loss"], TARGET, None, 1, -100)
    for operator in (
        lambda: ops.backward_(**BACKWARD | {"logits": EXPANDED}),
        *(lambda f=name: getattr(ops, f)(**FORWARD | {"logits": EXPANDED}) for name in FUSED),
        lambda: ops.scale_gradient_(*scale),
        lambda: ops.multiply_(EXPANDED, torch.tensor(2.0)),
    ):
        with pytest.raises((ValueError, RuntimeError), match="must have one memory location"):
            operator()
    assert torch.equal(EXPANDED, before)


class Overwriting(NamedTuple):
    """A call of an overwriting operator, and a change of arguments that makes it refuse."""

    arguments: dict
    overwritten: str
    wrong: dict


OVERWRITING = {
    **{name: Overwriting(FORWARD, "logits", {"target": TARGET[1:]}) for name in FUSED},
    "backward_": Overwriting(BACKWARD, "logits", {"target": TARGET[1:]}),
    "scale_gradient_": Overwriting(
        {
            "grad_logits": LOGITS,
            "grad_loss": 2 * BACKWARD["grad_loss"],
            "target": TARGET,
            "token_weight": None,
            "dim": 1,
            "ignore_index": -100,
        },
        "grad_logits",
        {"target": TARGET[1:]},
    ),
    "multiply_": Overwriting(
        {"gradient": LOGITS, "factor": torch.tensor(2.0)}, "gradient", {"factor": torch.ones(1)}
    ),
}


def test_table_has_all_overwriting_operators():
    """The table has every operator whose schema marks an argument as written."""
    operators = {name: getattr(ops, name) for name in dir(ops)}
    arguments = {
        name: operator.default._schema.arguments
        for name, operator in operators.items()
        if hasattr(operator, "default")
    }
    written = {name: [x.name for x in given if x.is_write] for name, given in arguments.items()}
    found = {name: names for name, names in written.items() if names}
    assert found == {name: [call.overwritten] for name, call in OVERWRITING.items()}


@pytest.mark.parametrize("name", OVERWRITING)
def test_version_of_the_overwritten_tensor(name):
    """A call raises the version of the overwritten tensor by 1; a refused call changes none."""
    arguments, overwritten, wrong = OVERWRITING[name]
    arguments = clone(arguments)
    before = {n: x._version for n, x in arguments.items() if torch.is_tensor(x)}
    with pytest.raises((ValueError, RuntimeError), match="must"):
        getattr(ops, name)(**arguments | wrong)
    assert {n: arguments[n]._version for n in before} == before
    getattr(ops, name)(**arguments)
    after = before | {overwritten: before[overwritten] + 1}
    assert {n: arguments[n]._version for n in before} == after


@pytest.mark.parametrize("name", OVERWRITING)
def test_autograd_knows_that_a_saved_tensor_was_overwritten(name):
    arguments, overwritten, _ = OVERWRITING[name]
    arguments = clone(arguments)
    scale = torch.ones((), requires_grad=True)
    product = scale * arguments[overwritten]
    getattr(ops, name)(**arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize(
    ("gradient", "upstream", "target"),
    [
        (LOGITS, torch.ones(5), TARGET),
        (LOGITS, torch.ones(4, 1), TARGET),
        (LOGITS[1:], torch.ones(4), TARGET),
        (LOGITS, torch.ones(4), TARGET[1:]),
        (LOGITS.long(), torch.ones(4), TARGET),
        (LOGITS, torch.ones(4) * 1j, TARGET),
        (LOGITS, torch.tensor(1j), TARGET),
    ],
)
def test_wrong_arguments_of_scale_gradient_are_refused(gradient, upstream, target):
    before, gradient = gradient, gradient.clone()
    with pytest.raises((ValueError, RuntimeError), match="must"):
        ops.scale_gradient_(gradient, upstream, target, None, 1, -100)
    assert torch.equal(gradient, before)


# ---- multiply_ ---------------------------------------------------------------------------------


def same_bits(one, other):
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x.clone(),
    "with a step": lambda x: with_step(x),
    "rows apart": lambda x: torch.cat([x, torch.full_like(x, 99)], -1)[..., : x.shape[-1]],
    "dimensions reversed": lambda x: (
        x.permute(*range(x.dim() - 1, -1, -1)).contiguous().permute(*range(x.dim() - 1, -1, -1))
    ),
}


@pytest.mark.kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 10), (2, 3, 4, 70), (1, 40000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multiply(dtype, shape, layout):
    """Each product is rounded once; memory between the elements is not written."""
    gradient = LAYOUTS[layout](make_logits(shape, dtype))
    memory = gradient.as_strided((gradient.untyped_storage().nbytes() // gradient.itemsize,), (1,))
    factor = torch.tensor(1.3, dtype=accumulation_dtype(dtype))
    expected = (gradient.to(factor.dtype) * factor).to(dtype)
    beside = memory == 99
    assert ops.multiply_(gradient, factor) is None
    assert torch.equal(gradient, expected)
    assert (memory[beside] == 99).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("other", REAL, ids=str)
def test_multiply_by_a_factor_of_any_floating_dtype(other, dtype):
    """The factor is cast to the accumulation dtype, not to that of the gradient."""
    gradient = make_logits((7, 50), dtype)
    factor = torch.tensor(1 / 3, dtype=torch.float64).to(other)
    acc = accumulation_dtype(dtype)
    expected = (gradient.to(acc) * factor.to(acc)).to(dtype)
    ops.multiply_(gradient, factor)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3e38])
def test_multiply_follows_ieee_754(factor, dtype):
    """0 times infinity is NaN; a float64 factor beyond float32 becomes infinity."""
    acc = accumulation_dtype(dtype)
    rows = [[0.0, -0.0, 1.0, -2.0], [0.0] * 4, [torch.inf, -torch.inf, torch.nan, 1.0]]
    gradient = torch.tensor(rows).repeat(1, 70).to(dtype)
    for value in (torch.tensor(factor, dtype=acc), torch.tensor(factor).double() * 10):
        expected = (gradient.to(acc) * value.to(acc)).to(dtype)
        actual = gradient.clone()
        ops.multiply_(actual, value)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        signs = expected.signbit() & ~expected.isnan()
        assert torch.equal(actual.signbit() & ~actual.isnan(), signs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [torch.tensor(1.0), torch.tensor(1.0).double()], ids=str)
def test_multiply_by_1_keeps_all_bits_and_raises_the_version(factor, dtype):
    """Even NaN keeps its bits, which a product would change."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    gradient = torch.randint(-(2**15), 2**15, (40, 300)).to(bits)
    gradient = (gradient << 8 * (dtype.itemsize - 2)).view(dtype)
    assert gradient.isnan().any()
    before, version, address = gradient.clone(), gradient._version, gradient.data_ptr()
    ops.multiply_(gradient, factor)
    assert same_bits(gradient, before)
    assert gradient._version == version + 1
    assert gradient.data_ptr() == address


def test_multiply_casts_the_factor_to_the_accumulation_dtype():
    """1 + 2^-30 rounds to 1 in float32 but not in float64."""
    factor = torch.tensor(1 + 2**-30, dtype=torch.float64)
    for dtype in DTYPES:
        gradient = make_logits((4, 9), dtype)
        before = gradient.clone()
        ops.multiply_(gradient, factor)
        assert torch.equal(gradient, before) == (dtype != torch.float64)


@pytest.mark.parametrize(
    ("gradient", "factor"),
    [
        (LOGITS, torch.ones(1)),
        (LOGITS, torch.ones(4)),
        (LOGITS, torch.ones(4, 9)),
        (LOGITS, torch.tensor(1j)),
        (torch.tensor(2.0), torch.tensor(2.0)),
        (LOGITS.long(), torch.tensor(2.0)),
        (LOGITS * 1j, torch.tensor(2.0)),
    ],
)
def test_wrong_arguments_of_multiply_are_refused(gradient, factor):
    before, gradient = gradient, gradient.clone()
    version = gradient._version
    with pytest.raises((ValueError, RuntimeError), match="must"):
        ops.multiply_(gradient, factor)
    assert torch.equal(gradient, before)
    assert gradient._version == version


# ---- autograd formulas -------------------------------------------------------------------------

TENSORS = ("logits", "target", "weight", "token_weight", "normalizer")
UPSTREAM = ("grad_loss", "grad_lse", "grad_entropy")
NAMES = {0: "none", 1: "mean", 2: "sum"}
by_labels = pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
by_reduction = pytest.mark.parametrize("reduction", NAMES, ids=NAMES.values())


def differentiable(soft, reduction):
    """Return float64 arguments of forward with all options, an ignored row and a weight of 0."""
    logits = torch.randn(4, 5, dtype=torch.float64)
    target = torch.tensor([1, 4, -100, 0])
    return {
        "logits": logits,
        "target": torch.randn(4, 5, dtype=torch.float64).softmax(1) if soft else target,
        "weight": torch.rand(5, dtype=torch.float64) + 0.5,
        "token_weight": torch.tensor([1.5, 0.0, 0.7, 0.4], dtype=torch.float64),
        "normalizer": torch.tensor(2.5, dtype=torch.float64) if reduction == 1 else None,
        "dim": 1,
        "reduction": reduction,
        **ALL_NUMBERS,
        "lse_square_scale": 0.05,
        "focal_gamma": 1.5,
    }


def variables_of(arguments, *names):
    """Return the names of the differentiable tensors, and copies that require a gradient."""
    found = {
        name: arguments[name].clone().requires_grad_()
        for name in names
        if arguments[name] is not None and arguments[name].is_floating_point()
    }
    return list(found), tuple(found.values())


def shift_token_weights(names, variables):
    """Return the variables with token weights above 0, where the results are not smooth."""
    return [
        x.detach().add(0.3).requires_grad_() if name == "token_weight" else x
        for name, x in zip(names, variables, strict=True)
    ]


def exactly(arguments):
    """Return loss, lse and entropy from fused_xent.reference."""
    options = {
        name: value for name, value in arguments.items() if name not in ("logits", "loss_dtype")
    }
    options["reduction"] = NAMES[options["reduction"]]
    return reference.cross_entropy_with_statistics(arguments["logits"], **options)


def raw(name, arguments):
    """Return the differentiable results of an operator."""
    if name == "loss":
        return call(name, arguments)
    found = run_forward(arguments, name == OF_FORWARD[1])
    return tuple(found[name] for name in ("loss", "lse", "entropy") if name in found)


@by_reduction
@by_labels
@pytest.mark.parametrize("name", OF_LOSS)
@pytest.mark.parametrize("of", [("logits",), TENSORS], ids=["logits", "all tensors"])
def test_derivatives_of_forward(of, name, soft, reduction):
    """First and second derivatives; first ones also with batched upstream gradients."""
    forward = differentiable(soft, reduction)
    names, variables = variables_of(forward, *of)
    variables = shift_token_weights(names, variables)

    def function(*variables):
        return raw(name, forward | dict(zip(names, variables, strict=True)))

    assert torch.autograd.gradcheck(function, variables, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, variables)


@by_reduction
@by_labels
def test_gradients_of_forward_equal_the_reference(soft, reduction):
    """Including rows that are ignored or have token weight 0."""
    forward = differentiable(soft, reduction)
    names, variables = variables_of(forward, *TENSORS)
    arguments = forward | dict(zip(names, variables, strict=True))
    exact = exactly(arguments)
    upstream = [torch.rand_like(x) for x in (exact.loss, exact.lse, exact.entropy)]
    gradients = [
        torch.autograd.grad(outputs, variables, upstream)
        for outputs in (raw(OF_FORWARD[1], arguments), (exact.loss, exact.lse, exact.entropy))
    ]
    torch.testing.assert_close(*gradients)


@by_labels
def test_non_differentiable_results(soft):
    forward = differentiable(soft, 1)
    names, variables = variables_of(forward, *TENSORS)
    found = run_forward(forward | dict(zip(names, variables, strict=True)), statistics=True)
    having = {name for name, x in found.items() if name != "outputs" and x.requires_grad}
    assert having == {"loss", "lse", "entropy"}


@by_reduction
@by_labels
def test_derivatives_of_backward(soft, reduction):
    """state and entropy are recomputed, since they are functions of the logits."""
    forward = differentiable(soft, reduction)
    backward, _ = make_backward(forward, statistics=True)
    backward |= {name: torch.rand_like(backward[name]) for name in UPSTREAM}
    with_total = ("logits", "target", "weight", "token_weight", *UPSTREAM)
    names, variables = variables_of(backward, *with_total, *["total_weight"][: reduction == 1])
    variables = shift_token_weights(names, variables)

    def function(*variables):
        arguments = backward | dict(zip(names, variables, strict=True))
        with torch.no_grad():
            saved = {name: arguments.get(name) for name in forward if name != "normalizer"}
            found = run_forward(saved | {"normalizer": arguments["total_weight"]}, statistics=True)
        saved = {name: found[name] for name in ("state", "entropy")}
        return ops.backward(**arguments | saved)

    assert torch.autograd.gradcheck(function, variables)
    assert torch.autograd.gradgradcheck(function, variables, fast_mode=True)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", [*OF_LOSS, "backward"])
def test_no_graph_without_requires_grad(name, context):
    forward = differentiable(False, 1)
    backward, _ = make_backward(forward)
    arguments = backward if name == "backward" else forward
    if context is not torch.enable_grad:
        arguments = arguments | {"logits": arguments["logits"].clone().requires_grad_()}
    with context():
        outputs = call(name, arguments)
    assert not any(x.requires_grad for x in outputs)


def test_gradient_of_forward_in_the_logits_memory():
    """It works once, since it modifies the logits."""
    forward = differentiable(False, 1)
    _, (leaf,) = variables_of(forward, "logits")
    logits = leaf * 1
    loss, _, _ = ops.forward(**forward | {"logits": logits, "inplace_backward": True})
    (expected,) = torch.autograd.grad(exactly(forward | {"logits": leaf}).loss, leaf)
    version = logits._version
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(gradient, expected)
    assert gradient.data_ptr() == logits.data_ptr()
    assert logits._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradient_in_the_logits_memory_has_no_graph():
    forward = differentiable(False, 1)
    logits = forward["logits"].requires_grad_() * 1
    loss, _, _ = ops.forward(**forward | {"logits": logits, "inplace_backward": True})
    before = logits.detach().clone()
    with pytest.raises(RuntimeError, match="inplace_backward must be False for create_graph=True"):
        torch.autograd.grad(loss, logits, create_graph=True)
    assert torch.equal(logits, before)


RECORDED = [  # each overwriting operator, and an argument that requires a gradient
    *((name, of) for name in FUSED for of in ("logits", "weight", "token_weight", "normalizer")),
    *(("backward_", of) for of in ("logits", "weight", "token_weight", "total_weight", *UPSTREAM)),
    *(("scale_gradient_", of) for of in ("grad_logits", "grad_loss", "token_weight")),
    *(("multiply_", of) for of in ("gradient", "factor")),
]


def overwriting(name):
    """Return arguments with all tensors set, and the name of the overwritten one."""
    forward = differentiable(False, 1)
    backward, _ = make_backward(forward, statistics=True)
    if name in FUSED:
        return forward, "logits"
    if name == "backward_":
        return backward, "logits"
    arguments, overwritten, _ = OVERWRITING[name]
    if name == "scale_gradient_":
        arguments = arguments | {"token_weight": ROW_WEIGHT}
    return clone(arguments), overwritten


@pytest.mark.parametrize(("name", "of"), RECORDED)
def test_overwriting_operators_have_no_derivative(name, of):
    """The error comes before anything is written, whichever argument requires a gradient."""
    arguments, overwritten = overwriting(name)
    leaf = arguments[of].clone().requires_grad_()
    arguments = arguments | {of: leaf * 1}  # not a leaf: torch itself would refuse it
    for given in (arguments, arguments | {of: leaf}):
        before, version = given[overwritten].detach().clone(), given[overwritten]._version
        with pytest.raises(RuntimeError, match=f"fused_xent::{name} has no derivative"):
            getattr(ops, name)(**given)
        assert torch.equal(given[overwritten], before)
        assert given[overwritten]._version == version


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("name", "of"), RECORDED)
def test_overwriting_operators_without_gradients(name, of, context):
    """An argument is a leaf that was made outside the context, or inside it."""
    arguments, overwritten = overwriting(name)
    plain = clone(arguments)
    results = call(name, plain)
    assert not torch.equal(plain[overwritten], arguments[overwritten])
    leaf = arguments | {of: arguments[of].clone().requires_grad_()}
    with context():
        for given in (clone(leaf, overwritten), clone(leaf)):
            found = call(name, given)
            for one, other in zip(found, results, strict=True):
                assert (one is other is None) or torch.equal(one, other)
            assert torch.equal(given[overwritten], plain[overwritten])
    if of == overwritten:
        version = leaf[of]._version
        with context():
            getattr(ops, name)(**leaf)
        assert torch.equal(leaf[of], plain[of])
        assert leaf[of]._version == version + 1


@by_labels
@pytest.mark.parametrize("name", OF_LOSS)
def test_forward_under_torch_func(name, soft):
    """torch.func.grad, once and nested, for each tensor; vjp; jacrev."""
    forward = differentiable(soft, 1)
    names, variables = variables_of(forward, *TENSORS)
    variables = [x.detach() for x in shift_token_weights(names, variables)]

    def ours(*variables):
        outputs = raw(name, forward | dict(zip(names, variables, strict=True)))
        return sum(output.sum() * (i + 1) for i, output in enumerate(outputs))

    def theirs(*variables):
        exact = exactly(forward | dict(zip(names, variables, strict=True)))
        outputs = (exact.loss, exact.lse, exact.entropy)[: 3 if name == OF_FORWARD[1] else 1]
        return sum(output.sum() * (i + 1) for i, output in enumerate(outputs))

    numbers = tuple(range(len(variables)))
    results = []
    for function in (ours, theirs):
        first = torch.func.grad(function, argnums=numbers)

        def squares(*variables, first=first):
            return sum(x.square().sum() for x in first(*variables))

        _, vjp = torch.func.vjp(function, *variables)
        second = torch.func.grad(squares, argnums=numbers)
        jacobian = torch.func.jacrev(first, argnums=0)
        results.append(
            (
                first(*variables),
                torch.func.grad(function)(*variables),
                second(*variables),
                vjp(torch.tensor(2.0, dtype=torch.float64)),
                jacobian(*variables),
            )
        )
    torch.testing.assert_close(*results)


@by_labels
def test_backward_under_torch_func(soft):
    forward = differentiable(soft, 0)
    backward, _ = make_backward(forward, statistics=True)

    def function(upstream):
        return ops.backward(**backward | {"grad_loss": upstream}).square().sum()

    upstream = torch.rand(4, dtype=torch.float64)
    leaf = upstream.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(function)(upstream), expected)
    batch = torch.rand(3, 4, dtype=torch.float64)
    gradients = torch.func.vmap(lambda g: ops.backward(**backward | {"grad_loss": g}))(batch)
    each = [ops.backward(**backward | {"grad_loss": g}) for g in batch]
    assert torch.equal(gradients, torch.stack(each))


# ---- numbers -----------------------------------------------------------------------------------


@pytest.mark.kernels
@pytest.mark.parametrize("n_classes", [64, 1024], ids=["one row per lane", "one class per lane"])
@pytest.mark.parametrize("factor", [0.5, 1.5, 1 + 2**-8, 2**-9 * 1.25, 3e4, "NaN of all ones"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["scale_gradient_", "multiply_"])
def test_all_16_bit_numbers_are_read_and_rounded_to_nearest_even(name, dtype, factor, n_classes):
    """Including infinities, NaN, subnormal numbers, and products halfway between two numbers."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, n_classes)
    target = torch.zeros(len(numbers), dtype=torch.int64)
    gradient = numbers.clone()
    if factor == "NaN of all ones":  # rounding up by integer addition would give 0
        factor = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    if name == "multiply_":
        ops.multiply_(gradient, torch.as_tensor(factor))
    else:
        ops.scale_gradient_(gradient, torch.as_tensor(factor), target, None, 1, -100)
    expected = (numbers.float() * factor).to(dtype)
    if dtype == torch.bfloat16 and fused_xent.cpu_capability() == "avx512_bf16":
        # The conversion instruction flushes subnormal numbers to 0.
        below = (numbers.float() * factor).abs() < torch.finfo(dtype).tiny
        gradient = gradient.where(~below | (gradient != 0), expected)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)


def test_capability_is_one_of_those_documented():
    assert fused_xent.cpu_capability() in ("avx512_bf16", "avx512", "avx2", "portable")


def test_more_dimensions_than_torchs_operations_take():
    """72 dimensions are accepted; the results are those of the same logits in two dimensions."""
    logits = torch.randn(2, 9, *[1] * 70)
    target = torch.tensor([3, 5]).view(2, *[1] * 70)
    arguments = (logits, target, None, None, None, 1, 0)
    loss, total_weight, state = torch.ops.fused_xent.forward(*arguments)
    flat = torch.ops.fused_xent.forward(logits.view(2, 9), target.view(2), None, None, None, 1, 0)
    assert torch.equal(loss.flatten(), flat[0])
    assert state.shape == (2, 2, *[1] * 70)
    assert torch.equal(state.flatten(1), flat[2])
    assert torch.equal(total_weight, flat[1])
