"""Accuracy where cancellation or long sums lose digits, and results at extreme values."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, make_logits
from compare import NEAR_1_OPTIONS, assert_gradient, assert_loss, check_near_1, truth
from modes import MODES, has_mode, loss_and_gradient, roundings

import fused_xent
from fused_xent import cross_entropy, cross_entropy_with_statistics, selective_log_softmax

pytestmark = pytest.mark.kernels
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
by_mode = pytest.mark.parametrize("mode", MODES)
HALF = (torch.bfloat16, torch.float16)
# (shape of the logits, by which kernels): models' vocabularies, and images of as many classes
LARGE = {
    "llama, 4 rows": (4, 128256),
    "gemma, one row": (1, 262144),
    "gpt2, odd": (3, 50257),
    "mistral, more rows than threads split": (20, 32000),
    "strided classes": (1, 50257, 3),
    "strided classes, one column": (2, 128256, 1),
    "imagenet": (64, 1000),
    "small": (500, 100),
}
NEAR_1_SHAPES = [(40, 2), (40, 10), (40, 128), (4, 129), (4, 1000), (4, 2049), (4, 32000)]
NEAR_1_SHAPES += [(2, 10, 5, 6), (2, 21, 5, 6), (2, 1000, 5, 6), (1, 5000, 30)]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("shape", LARGE)
def test_loss_is_within_5e_6(shape, probabilities, scale, dtype, device):
    logits = make_logits(LARGE[shape], dtype, scale)
    if probabilities:
        target = logits.float().roll(7, 1).softmax(1)
        exact = F.cross_entropy(logits.double(), target.double(), reduction="none")
    else:
        target = torch.randint(0, logits.shape[1], logits.select(1, 0).shape)
        exact = F.cross_entropy(logits.double(), target, reduction="none")
    loss = fused_xent.cross_entropy(logits, target, reduction="none", loss_dtype=torch.float32)
    spacing = (exact.abs() / 16).clamp(min=1)  # float32 spacing grows above 16, where it is 2e-6
    assert ((loss.double() - exact).abs() / spacing).max() <= 5e-6
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(fused_xent.cross_entropy(logits, target, reduction="none"), loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("label", "absolute"), [(0, 5e-7), (1, 2e-6)])
def test_many_small_exponentials_beside_a_large_one(label, absolute, dtype):
    """Each is lost when added to 1, but together they count in a row this long.

    Above 16, float32 numbers are 1.9e-6 apart: rounding the second loss costs up to 9.5e-7. Also,
    the CPU adds up to 16 classes before it keeps rounding errors, so that those in the group of the
    large one are lost if that is not the target: 8e-7.
    """
    logits = torch.full((1, 262144, 9), -16.64).to(dtype)
    logits[:, 0] = 0
    target = torch.full((1, 9), label)
    loss = fused_xent.cross_entropy(logits, target, reduction="none", loss_dtype=torch.float32)
    exact = F.cross_entropy(logits.double(), target, reduction="none")
    assert (loss.double() - exact).abs().max() <= absolute


@by_dtype
@by_mode
@pytest.mark.parametrize("shape", LARGE)
def test_gradient_of_large_vocabulary(shape, mode, dtype):
    if not has_mode(mode, dtype):
        pytest.skip("float16 has no fused mode")
    logits = make_logits(LARGE[shape], dtype)
    rows = logits.select(1, 0).shape
    target = torch.randint(0, logits.shape[1], rows)
    for labels in (target, logits.roll(7, 1).softmax(1)):
        exact = truth(logits, labels, 1.0, reduction="sum")
        loss, gradient = loss_and_gradient(logits, labels, 1.0, mode, reduction="sum")
        assert_loss(loss, exact, torch.promote_types(dtype, torch.float32))
        assert_gradient(gradient, exact, dtype, roundings(mode))


@pytest.mark.parametrize("n_classes", [7, 300])
def test_differences_whose_rounding_errors_are_large(n_classes):
    logits = torch.randn(300, n_classes) * 1e30
    target = torch.randint(n_classes, (300,))
    loss = fused_xent.cross_entropy(logits, target, reduction="none")
    exact = F.cross_entropy(logits.double(), target, reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("n_classes", [2, 5, 40, 130, 300])
@pytest.mark.parametrize("mask", [-torch.inf, -3e38, -1e30, -1e10, -1e9])
def test_masked_classes_before_small_logits(mask, n_classes):
    """At some maxima the exponential of the distance from the mask was infinite times 0."""
    maxima = torch.arange(-1000, 0, 0.02)
    logits = torch.full((len(maxima), n_classes), mask)
    for i in range(min(n_classes - 1, 3)):
        logits[:, -1 - i] = maxima - i
    target = torch.full((len(maxima),), n_classes - 1)
    loss = fused_xent.cross_entropy(logits, target, reduction="none")
    exact = F.cross_entropy(logits.double(), target, reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


@by_dtype
@by_mode
def test_gradient_of_a_target_far_above_all_others_in_the_first_block(mode, dtype):
    """Exponentials of later blocks are relative to a maximum that the target has raised."""
    if not has_mode(mode, dtype):
        pytest.skip("float16 has no fused mode")
    logits = torch.zeros(3, 5000, dtype=dtype)
    logits[:, 7] = 2000
    target = torch.tensor([7, 7, 4000])
    loss, gradient = loss_and_gradient(logits, target, mode=mode, reduction="sum")
    expected = torch.zeros(3, 5000, dtype=dtype)
    expected[2, 7], expected[2, 4000] = 1, -1
    assert loss == 2000
    assert (gradient - expected).abs().max() <= 1e-6


@by_dtype
@by_mode
@pytest.mark.parametrize("n_classes", [2, 10, 200, 32000])
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999, 0.9999])
def test_gradient_at_a_confident_target(p, n_classes, mode, dtype):
    """It is p - 1, rounded once; before that its error is at most torch's in float32, or 1e-6."""
    if not has_mode(mode, dtype):
        pytest.skip("float16 has no fused mode")
    target = torch.arange(8) * (n_classes - 1) // 7
    margin = math.log(p / (1 - p) * (n_classes - 1))
    logits = torch.zeros(8, n_classes).scatter(1, target[:, None], margin).to(dtype)

    def at_target(gradient):
        return gradient.gather(1, target[:, None]).double()

    right = at_target(F.softmax(logits.double(), 1)) - 1
    leaf = logits.float().requires_grad_()
    F.cross_entropy(leaf, target, reduction="sum").backward()
    torchs_error = (at_target(leaf.grad) - right).abs()
    _, gradient = loss_and_gradient(logits, target, mode=mode, reduction="sum")
    error = (at_target(gradient) - right).abs()
    assert (error <= torch.finfo(dtype).eps / 2 * right.abs() + torchs_error.clamp(min=1e-6)).all()


@pytest.mark.parametrize(
    ("dtype", "greatest", "relative", "absolute"),
    [
        (torch.float32, 5.0, 5e-7, 2e-7),
        (torch.float32, 16.0, 1.5e-6, 2e-7),
        (torch.float64, 16.0, 4e-15, 1e-15),
    ],
    ids=str,
)
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("n_classes", [2, 9, 200, 3000])
def test_exponentials_and_logarithms_of_all_sizes(
    n_classes, statistics, dtype, greatest, relative, absolute
):
    """Two classes, all others at -inf; each is the target once. Accurate to the last digits."""
    distances = torch.linspace(0, greatest, 600, dtype=dtype)
    pair, classes = torch.stack([0 * distances, -distances], 1), [0, n_classes // 2]
    logits = torch.full((600, n_classes), -math.inf, dtype=dtype)
    logits[:, classes] = pair
    p = pair.double().softmax(1)
    function = cross_entropy_with_statistics if statistics else cross_entropy
    for at, other in ((0, 1), (1, 0)):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf, torch.full((600,), classes[at]), reduction="none")
        loss = loss.loss if statistics else loss
        loss.sum().backward()
        exact = -pair.double().log_softmax(1)[:, at]
        torch.testing.assert_close(loss.double(), exact, rtol=absolute, atol=absolute)
        gradient = leaf.grad[:, classes].double()
        torch.testing.assert_close(gradient[:, other], p[:, other], rtol=relative, atol=0)
        torch.testing.assert_close(gradient[:, at], -p[:, other], rtol=0, atol=absolute)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 1e-9])
@pytest.mark.parametrize("n_classes", [2, 15, 16, 17, 33, 100, 128])
def test_losses_near_0_are_accurate(n_classes, label_smoothing, statistics, dtype):
    """With a row per lane: small exponentials before and after the largest one must count."""
    logits = make_logits((n_classes, n_classes), dtype, 1.0)
    target = torch.arange(n_classes)
    for margin in (8.0, 14.0, 20.0):
        logits[target, target] = margin
        function = cross_entropy_with_statistics if statistics else cross_entropy
        options = {"reduction": "none", "label_smoothing": label_smoothing}
        leaf, exact_leaf = (
            logits.to(to, copy=True).requires_grad_() for to in (dtype, torch.float64)
        )
        loss = function(leaf, target, **options)
        loss = loss.loss if statistics else loss
        exact = F.cross_entropy(exact_leaf, target, **options)
        torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)
        pairs = ((loss, leaf), (exact, exact_leaf))
        gradients = (torch.autograd.grad(loss.sum(), leaf)[0].double() for loss, leaf in pairs)
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=0)


@pytest.mark.cpu("kernels of the CPU")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", NEAR_1_OPTIONS)
@pytest.mark.parametrize("shape", NEAR_1_SHAPES, ids=str)
def test_loss_and_target_gradient_as_p_approaches_1(shape, option, dtype):
    """The loss is the sum of the other classes' small exponentials, which 1 + sum would lose."""
    is_tile = (len(shape) > 2 or shape[1] <= 128) and option != "softcap"
    for mode in MODES:
        goal = 1e-6 if is_tile else 2e-6
        check_near_1(shape, dtype, option, mode, goal)


def test_other_derivatives_as_p_approaches_1():
    """Those that torch operations compute: by weights, of gradients, and under ``vmap``."""
    logits, target = torch.zeros(2, 100), torch.tensor([3, 4])
    logits[0, 3] = logits[1, 4] = 25.0
    exact = math.log1p(99 * math.exp(-25.0))
    weight, token_weight = torch.ones(100), torch.ones(2)

    def loss(logits, weight, token_weight):
        return cross_entropy(logits, target, weight, token_weight=token_weight, reduction="sum")

    by_weight, by_token = torch.func.grad(loss, (1, 2))(logits, weight, token_weight)
    near = {"rel": 4e-6, "abs": 0}
    assert by_weight[[3, 4]].tolist() == pytest.approx([exact, exact], **near)
    assert by_token.tolist() == pytest.approx([exact, exact], **near)
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, None, None), leaf, create_graph=True)
    (second,) = torch.autograd.grad(gradient[0, 3], leaf)
    assert second[0, [3, 5]].tolist() == pytest.approx([exact, -exact / 99], **near)
    losses = torch.func.vmap(cross_entropy)(logits, target)
    selected = torch.func.vmap(selective_log_softmax)(logits, target)
    assert losses.tolist() == pytest.approx([exact, exact], **near)
    assert selected.tolist() == pytest.approx([-exact, -exact], **near)


@by_dtype
@pytest.mark.parametrize("n_classes", [100, 2048, 32000])
@pytest.mark.parametrize("strided", [False, True])
def test_many_small_probabilities_beside_a_large_one(strided, n_classes, dtype):
    """Each is half a unit in the last place of 1: added one by one, all would be lost."""
    logits = torch.full((2, n_classes), math.log(2**-24 * 0.99)).to(dtype)
    logits[0, 0] = logits[1, n_classes // 2] = 0
    logits = logits.T.contiguous().T if strided else logits
    target = torch.tensor([0, n_classes // 2])
    exact = F.cross_entropy(logits.double(), target, reduction="none")
    loss, _ = loss_and_gradient(logits, target, reduction="none")
    assert (loss.double() - exact).abs().max() <= 5e-6


@by_mode
@pytest.mark.parametrize("offset", [3e4, -3e4, 1e6])
@pytest.mark.parametrize("shape", [(6, 50), (6, 5000), (3, 17000), (2, 150, 7)], ids=str)
def test_offset_of_all_logits(shape, offset, mode):
    logits = (torch.randn(shape) * 2 * 64).round() / 64 + offset  # rounded so that this is exact
    target = torch.randint(0, shape[1], logits.select(1, 0).shape)
    for labels in (target, torch.rand(shape).softmax(1)):
        exact = truth(logits, labels, 1.0, reduction="none")
        loss, gradient = loss_and_gradient(logits, labels, 1.0, mode, reduction="none")
        assert (loss.double() - exact.loss).abs().max() <= 5e-6
        assert_gradient(gradient, exact, torch.float32)
        same, same_gradient = loss_and_gradient(
            logits - offset, labels, 1.0, mode, reduction="none"
        )
        torch.testing.assert_close(loss, same, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, same_gradient, rtol=1e-5, atol=0)


@by_dtype
@by_mode
@pytest.mark.parametrize("masked", ["-inf", "finfo.min"])
@pytest.mark.parametrize("n_classes", [6, 30, 200, 40000])
def test_masked_classes(n_classes, masked, mode, dtype):
    """Masks: first half, last half, every other class, all but the target."""
    if not has_mode(mode, dtype):
        pytest.skip("float16 has no fused mode")
    logits = make_logits((4, n_classes), dtype)
    mask = torch.zeros(logits.shape, dtype=torch.bool)
    mask[0, : n_classes // 2] = mask[1, n_classes // 2 :] = mask[2, ::2] = mask[3] = True
    target = torch.tensor([n_classes - 1, 0, 1, n_classes // 2])
    mask[3, target[3]] = False
    least = -math.inf if masked == "-inf" else torch.finfo(dtype).min
    logits = logits.masked_fill(mask, least)
    exact = truth(logits, target, 1.5, reduction="sum")
    assert exact.loss.isfinite()
    loss, gradient = loss_and_gradient(logits, target, 1.5, mode, reduction="sum")
    assert_loss(loss, exact, torch.promote_types(dtype, torch.float32))
    assert_gradient(gradient, exact, dtype, roundings(mode))
    assert (gradient[mask] == 0).all()


@by_dtype
@by_mode
@pytest.mark.parametrize("n_classes", [6, 200, 20000])
def test_probability_0_of_a_masked_class_adds_0(n_classes, mode, dtype):
    """torch gives 0 * (-inf) = NaN; here the masked classes add 0."""
    if not has_mode(mode, dtype):
        pytest.skip("float16 has no fused mode")
    logits = make_logits((4, n_classes), dtype)
    labels = torch.rand(4, n_classes // 2).softmax(1).to(dtype)
    exact = truth(logits[:, 1::2], labels, 1.5, reduction="sum")
    logits[:, ::2] = -math.inf
    target = torch.stack([torch.zeros_like(labels), labels], 2).view_as(logits)
    loss, gradient = loss_and_gradient(logits, target, 1.5, mode, reduction="sum")
    assert_loss(loss, exact, torch.promote_types(dtype, torch.float32))
    assert_gradient(gradient[:, 1::2], exact, dtype, roundings(mode))
    assert (gradient[:, ::2] == 0).all()


# Special logits of one row, by class index; the target is class 2.
SPECIAL = {
    "target -inf": {2: -math.inf},
    "other +inf": {1: math.inf},
    "target +inf": {2: math.inf},
    "two +inf": {1: math.inf, 2: math.inf},
    "other NaN": {-1: math.nan},
    "target NaN": {2: math.nan},
    "NaN and +inf": {0: math.inf, -2: math.nan},
    "NaN and -inf": {0: math.nan, -2: -math.inf},
    "all -inf": {...: -math.inf},
    "all NaN": {...: math.nan},
    "all +inf": {...: math.inf},
    "all least": {...: "min"},
    "all greatest": {...: "max"},
    "greatest and least": {0: "max", 1: "min", 2: "max"},
    "target greatest": {2: "max"},
    "other greatest": {1: "max"},
    "other least": {1: "min"},
}


@by_dtype
@by_mode
@pytest.mark.parametrize("n_classes", [5, 9, 200, 33000])
@pytest.mark.parametrize("special", SPECIAL)
def test_infinities_nan_and_extremes_match_torch(special, n_classes, mode, dtype):
    """All rows agree with torch, the special row and its neighbours."""
    if not has_mode(mode, dtype):
        pytest.skip("float16 has no fused mode")
    finfo = torch.finfo(dtype)
    logits = make_logits((3, n_classes), dtype)
    for index, value in SPECIAL[special].items():
        logits[1, index] = {"min": finfo.min, "max": finfo.max}.get(value, value)
    target = torch.tensor([0, 2, n_classes - 1])
    loss, gradient = loss_and_gradient(logits, target, 1.0, mode, reduction="none")
    leaf = logits.float() if dtype in HALF else logits.clone()
    leaf.requires_grad_()
    expected = F.cross_entropy(leaf, target, reduction="none")
    expected.sum().backward()
    torch.testing.assert_close(loss, expected.detach(), equal_nan=True, rtol=2e-6, atol=1e-5)
    expected_gradient = leaf.grad.to(dtype)
    torch.testing.assert_close(gradient, expected_gradient, equal_nan=True, rtol=1e-2, atol=1e-6)


@pytest.mark.cpu("sets the number of threads")
@by_dtype
@by_mode
@pytest.mark.parametrize(
    "shape",
    [
        *((1, 262144), (3, 40000), (5, 20000), (7, 16390), (50, 1000), (999, 10), (2, 60, 999)),
        (20011, 3),  # several threads sum its losses and weights
    ],
)
@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
def test_results_do_not_depend_on_the_number_of_threads(threads, probabilities, shape, mode, dtype):
    if not has_mode(mode, dtype):
        pytest.skip("float16 has no fused mode")
    logits = make_logits(shape, dtype)
    target = torch.randint(0, shape[1], logits.select(1, 0).shape)
    target = torch.rand(shape).softmax(1).to(dtype) if probabilities else target
    token_weight = torch.rand(logits.select(1, 0).shape)
    results = []
    for count in (1, 2, 2, 5):
        threads(count)
        options = {"label_smoothing": 0.1, "token_weight": token_weight}
        results.append(loss_and_gradient(logits, target, 1.5, mode, **options))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@by_dtype
@by_mode
@pytest.mark.parametrize("n_classes", [3, 200, 20000])
@pytest.mark.parametrize("other", [math.inf, math.nan, 3e38])
def test_weight_of_an_absent_class(other, n_classes, mode, dtype):
    """1 / count gives absent classes an infinite weight, which must not reach any gradient."""
    if not has_mode(mode, dtype):
        pytest.skip("float16 has no fused mode")
    logits, target = make_logits((4, n_classes), dtype), torch.tensor([0, 1, 0, 1])
    weight = torch.full((n_classes,), other).to(dtype)
    weight[0] = weight[1] = 1
    for scale in (1.0, 0.5):  # plain and general kernels
        options = {"reduction": "sum", "logit_scale": scale}
        _, plain = loss_and_gradient(logits, target, 1.0, mode, **options)
        _, gradient = loss_and_gradient(logits, target, 1.0, mode, **options, weight=weight)
        assert torch.equal(gradient, plain)


@by_dtype
@pytest.mark.parametrize("rise", [7.5, 50, 95, 400])
def test_class_far_above_earlier_ones(rise, dtype):
    """The first classes give a guess of the maximum; exponentials relative to it may overflow."""
    logits = make_logits((3, 2100), dtype, 0.1)
    for row, at in enumerate((70, 1999, 2099)):
        logits[row, at] = rise
    target = torch.tensor([70, 3, 2099])
    exact = truth(logits, target, reduction="none")
    for mode in MODES:
        if has_mode(mode, dtype):
            loss, gradient = loss_and_gradient(logits, target, 1.0, mode, reduction="none")
            assert_loss(loss, exact, torch.promote_types(dtype, torch.float32))
            assert_gradient(gradient, exact, dtype)


@by_dtype
@pytest.mark.parametrize("n_classes", [20, 129, 5000])
def test_log_sum_is_never_below_0(n_classes, dtype):
    """Nor where another class than the target has all of the probability, by rounding."""
    logits = torch.randn(4000, n_classes).to(dtype)
    logits[:, 7] = torch.linspace(20, 120, 4000).to(dtype)
    target = torch.zeros(4000, dtype=torch.int64)
    _, _, state = torch.ops.fused_xent.forward(logits, target, None, None, None, 1, 1)
    row_max, log_sum = state
    assert torch.equal(row_max, logits[:, 7].to(row_max.dtype))
    assert (log_sum >= 0).all()


@by_dtype
@pytest.mark.parametrize("n_classes", [20, 129, 5000])
def test_loss_is_never_below_0(n_classes, dtype):
    """One class has all of the probability."""
    top = torch.arange(1, 401).div(4).unsqueeze(1) + 20
    logits = F.pad(top, (n_classes // 2, n_classes - 1 - n_classes // 2)).to(dtype)
    target = torch.full((400,), n_classes // 2)
    loss, gradient = loss_and_gradient(logits, target, 1.0, reduction="none")
    assert (loss >= 0).all()
    assert (gradient.gather(1, target.unsqueeze(1)) <= 0).all()


@pytest.mark.parametrize("shape", [(1, 128256, 4), (2, 128256)], ids=["strided", "rows"])
def test_ascending_logits_with_spread_labels(shape):
    """The running maximum changes at every step."""
    logits = torch.linspace(-30, 0, shape[1]).view(1, -1, *[1] * (len(shape) - 2))
    logits = logits.expand(shape).contiguous()
    target = torch.full(shape, 0.7 / shape[1])
    loss, _ = loss_and_gradient(logits, target, reduction="mean")
    assert_loss(loss, truth(logits, target), torch.float32)


@by_mode
def test_sum_beyond_float32_is_infinite(mode):
    logits = torch.tensor([[1e38, -1e38]] * 2)
    loss, _ = loss_and_gradient(logits, torch.tensor([1, 1]), 1.0, mode, reduction="sum")
    assert loss == math.inf


@pytest.mark.parametrize("n_classes", [100, 200])
def test_least_number_among_spread_labels(n_classes):
    logits = torch.zeros(1, n_classes)
    logits[0, 5] = torch.finfo(torch.float32).min
    target = torch.tensor([0])
    loss, _ = loss_and_gradient(logits, target, label_smoothing=0.1)
    expected = F.cross_entropy(logits.double(), target, label_smoothing=0.1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("n_classes", [5, 200])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_target_of_weight_0_does_not_hide_nan(value, n_classes):
    logits = torch.zeros(1, n_classes)
    logits[0, 3] = value
    weight = torch.ones(n_classes)
    weight[0] = 0
    loss, _ = loss_and_gradient(logits, torch.tensor([0]), reduction="sum", weight=weight)
    assert loss.isnan()


@pytest.mark.parametrize("n_classes", [24, 200])
@pytest.mark.parametrize(("low", "high"), [(0, 20), (20, 0)])
def test_overflowing_distance_gives_no_wrong_loss(n_classes, low, high):
    """The loss is 6e36, but intermediate values overflow: it must be right or infinite."""
    logits = torch.full((1, n_classes), -3e38)
    logits[0, high] = 3e38
    target = torch.zeros_like(logits)
    target[0, low], target[0, high] = 0.01, 0.99
    loss, _ = loss_and_gradient(logits, target)
    assert loss == math.inf or torch.isclose(loss, torch.tensor(6e36), rtol=1e-5)
