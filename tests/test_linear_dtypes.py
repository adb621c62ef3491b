"""The loss of a linear layer: dtypes of target, layer and logits, and dropped rows."""

import pytest
import torch
import torch.nn.functional as F
from layers import (
    DTYPES,
    H,
    by_classes,
    doubled,
    fused,
    gradients_of,
    in_chunks,
    make_layer,
    unfused,
)

from fused_xent import LinearCrossEntropyLoss, _linear, _ops

pytestmark = pytest.mark.usefixtures("few_logits_in_chunks")

N, C = 14, 200
LAYOUTS = {"one chunk": lambda monkeypatch: None, "chunks": in_chunks, "classes": by_classes}


@pytest.fixture(params=LAYOUTS)
def layout(request, monkeypatch, device):
    if device != "cpu" and request.param == "classes":
        pytest.skip("only the CPU stores logits class by class")
    LAYOUTS[request.param](monkeypatch)


# ---- class indices in narrow dtypes ------------------------------------------------------------

IGNORED = {  # by the target's dtype: values inside its range, and values outside
    torch.uint8: (None, 0, 199, 255, -100, 256 + 5, -(2**32) + 5),
    torch.int32: (None, 0, 199, -7, 2**32 + 5, -(2**32) + 5),
    torch.int64: (None, 0, -(2**40)),
}
NARROW = [(dtype, index) for dtype, indices in IGNORED.items() for index in indices]
CLASSES = (5, 156, 199, 0, 17, 128)  # 5 and 156 equal some ignored values modulo 256


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("drop", [False, True], ids=["all rows", "drop_ignored"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("dtype", "ignore_index"), NARROW, ids=str)
def test_narrow_targets(dtype, ignore_index, reduction, drop, weighted, layout):
    """As torch with int64: neither ignore_index nor a class wraps around in the narrow dtype."""
    layer = make_layer(torch.float64, (N,), (C,))
    target = torch.tensor(CLASSES).repeat(3)[:N]
    info, index = torch.iinfo(dtype), -100 if ignore_index is None else ignore_index
    if info.min <= index <= info.max:
        target[::3] = index
    options = {"reduction": reduction, "ignore_index": index}
    if weighted:
        options["weight"] = torch.rand(C, dtype=torch.float64) + 0.1
    expected = unfused(F.cross_entropy, layer, target, **options)
    options |= {"ignore_index": ignore_index, "drop_ignored": drop}
    loss = fused(layer, target.to(dtype), **options)
    torch.testing.assert_close(loss, expected)
    upstream = torch.linspace(1, 2, loss.numel(), dtype=torch.float64).view_as(loss)
    torch.testing.assert_close(*(gradients_of(x, layer, upstream) for x in (loss, expected)))


@pytest.mark.cpu("a GPU raises no error for targets out of range")
@pytest.mark.parametrize("drop", [False, True], ids=["all rows", "drop_ignored"])
@pytest.mark.parametrize(("dtype", "ignore_index"), NARROW, ids=str)
def test_narrow_targets_out_of_range(dtype, ignore_index, drop):
    target = torch.tensor([5, 156, 3]).to(dtype)
    options = {"ignore_index": ignore_index, "drop_ignored": drop}
    with pytest.raises(IndexError, match=r"must be in \[0, 150\) .*got 156 at position \(1,\)"):
        fused(make_layer(rows=(3,), classes=(150,)), target, **options)
    with pytest.raises(IndexError, match=r"must be in \[0, 4\) .*got 5 at position \(0,\)"):
        fused(make_layer(rows=(3,), classes=(4,)), target, **options)


# ---- layers, probabilities and weights of any dtype --------------------------------------------


def in_double(logits, target, **options):
    """Compute torch's loss of the given (rounded) logits in float64."""
    weights = {name: x.double() for name, x in options.items() if name == "weight"}
    return F.cross_entropy(logits.double(), target.double(), **options | weights)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("of_target", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities_of_another_dtype(dtype, of_target, weighted, reduction, layout):
    """The loss is promoted as in torch, and computed in the promoted dtype."""
    layer = make_layer(dtype, (N,), (30,))
    target = torch.randn(N, 30).softmax(1).to(of_target)
    options = {"reduction": reduction}
    if weighted:
        options["weight"] = (torch.rand(30) + 0.1).to(dtype)
    loss = fused(layer, target, **options)
    assert loss.dtype == unfused(F.cross_entropy, layer, target, **options).dtype
    limit = {torch.float64: 1e-12, torch.float32: 5e-6}.get(loss.dtype, 2e-2)
    exact = unfused(in_double, layer, target, **options)
    torch.testing.assert_close(loss.double(), exact, rtol=limit, atol=0)
    exact_layer = doubled(layer)
    exact = gradients_of(unfused(in_double, exact_layer, target, **options).sum(), exact_layer)
    limit = 1e-12 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
    for one, right in zip(gradients_of(loss.sum(), layer), exact, strict=True):
        assert one.dtype == dtype
        assert (one.double() - right).norm() <= limit * right.norm()


@pytest.mark.cpu("uses autocast of the CPU")
@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_of_layers_of_any_dtype(dtype, amp, soft, layout):
    """Casts the same tensors as torch's autocast, which leaves float64 as it is."""
    layer = make_layer(dtype, (N,), (30,))
    target = torch.randn(N, 30).softmax(1) if soft else torch.arange(N)
    results = []
    for function in (fused, lambda *x: unfused(F.cross_entropy, *x)):
        with torch.autocast("cpu", dtype=amp):
            loss = function(layer, target)
        results.append((loss, *gradients_of(loss, layer)))
    limit = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(amp).eps
    torch.testing.assert_close(results[0][0], results[1][0], rtol=min(limit, 1e-6), atol=0)
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= limit * other.norm()


@pytest.mark.cpu("uses autocast of the CPU")
def test_autocast_of_a_layer_of_several_dtypes(layout):
    """Hidden states are bfloat16 already, parameters are float32."""
    hidden, *parameters = make_layer(torch.float32, (N,), (30,))
    layer, target = [hidden.detach().bfloat16().requires_grad_(), *parameters], torch.arange(N)
    results = []
    for function in (fused, lambda *x: unfused(F.cross_entropy, *x)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = function(layer, target)
        results.append((loss, *gradients_of(loss, layer)))
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("loss_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_dtype(dtype, reduction, loss_dtype, layout):
    """The loss is rounded once, at the end: partial sums that overflow in 16 bits cancel."""
    layer = make_layer(dtype, (N,), (30,), bias=False)
    with torch.no_grad():
        layer[0][:] = 16
        layer[1][:, :] = 0
        layer[1][1] = 400  # a loss of 400 * 16 * H = 57600 in each row
    target, tokens = torch.zeros(N, dtype=torch.int64), torch.ones(N)
    tokens[1::2] = -1
    tokens[0] = 1 + 1 / 64
    options = {"reduction": reduction, "token_weight": tokens, "loss_dtype": loss_dtype}
    loss = fused(layer, target, **options)
    assert loss.dtype == (loss_dtype or dtype)
    exact = {"none": 57600 * tokens, "sum": torch.tensor(900.0), "mean": torch.tensor(57600.0)}
    assert torch.equal(loss, exact[reduction].to(loss.dtype))


# ---- logits in float32 of a layer in 16 bits ---------------------------------------------------

HALVES = [torch.bfloat16, torch.float16]
WAYS = ("one chunk", "chunks", "few logits", "sequences")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_logits_in_float32_of_a_layer_in_16_bits(dtype, way, monkeypatch):
    """The loss is that of a float32 layer; gradients have the dtype of the given layer."""
    monkeypatch.setattr(_linear, "FEW_BYTES", 0)  # and yet no class-by-class layout in 16 bits
    if way == "few logits":
        monkeypatch.setattr("fused_xent.linear.FEW_LOGITS", 1 << 20)
    rows = (2, 7) if way == "sequences" else (N,)
    layer, target = make_layer(dtype, rows, (30,)), torch.randint(30, rows)
    options = {"chunk_rows": 4} if way == "chunks" else {}
    loss = fused(layer, target, logits_dtype=torch.float32, **options)
    exact_layer = doubled(layer)
    hidden, *parameters = exact_layer
    exact = F.cross_entropy(F.linear(hidden.flatten(0, -2), *parameters), target.flatten())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    gradients = (gradients_of(loss, layer), gradients_of(exact, exact_layer))
    for one, right in zip(*gradients, strict=True):
        assert one.dtype == dtype
        assert (one.double() - right).norm() <= 4 * torch.finfo(dtype).eps * right.norm()


@pytest.mark.parametrize(("logits_dtype", "expected"), [(None, [8, 8]), (torch.float32, [4] * 4)])
def test_chunks_of_float32_logits_have_half_as_many_rows(logits_dtype, expected, monkeypatch):
    for device in ("CPU", "GPU"):
        monkeypatch.setattr(_linear, f"{device}_BYTES", 8 * 2 * C)
    rows, run = [], _ops.forward_backward_
    monkeypatch.setattr(
        _ops, "forward_backward_", lambda problem: rows.append(len(problem.logits)) or run(problem)
    )
    layer = make_layer(torch.bfloat16, (16,), (C,))
    fused(layer, torch.arange(16), logits_dtype=logits_dtype)
    assert rows == expected


@pytest.mark.parametrize("logits_dtype", [None, torch.float32], ids=str)
def test_second_derivatives_use_the_loss_dtype(logits_dtype):
    """From all logits at once: a reduced loss is rounded and differentiated in its own dtype."""
    layer, target = make_layer(torch.bfloat16, (N,), (30,)), torch.arange(N)
    loss = fused(layer, target, logits_dtype=logits_dtype)
    firsts = torch.autograd.grad(loss, layer, create_graph=True)
    seconds = gradients_of(sum(x.square().sum() for x in firsts), layer)
    exact_layer = doubled(layer)
    exact = unfused(F.cross_entropy, exact_layer, target)
    exact_firsts = torch.autograd.grad(exact, exact_layer, create_graph=True)
    exact_seconds = gradients_of(sum(x.square().sum() for x in exact_firsts), exact_layer)
    for one, right in zip((*firsts, *seconds), (*exact_firsts, *exact_seconds), strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - right).norm() <= 0.05 * right.norm()


# ---- rows of several positions, some of them ignored -------------------------------------------


@pytest.fixture
def multiplied(monkeypatch):
    """Records the first dimension (rows or classes) of each matrix product."""
    found, product = [], _linear.product

    def noting(one, *others, **beta):
        found.append(one.shape[0])
        return product(one, *others, **beta)

    monkeypatch.setattr(_linear, "product", noting)
    return found


WITHOUT = {
    "ignored": lambda target, tokens: target.index_put_((ROW, POSITION), torch.tensor(-100)),
    "of token weight 0": lambda target, tokens: tokens.index_put_(
        (ROW, POSITION), 0 * tokens[0, 0]
    ),
}
ROW = torch.tensor([0, 0, 0, 3, 3, 3, 5, 6, 6])
POSITION = torch.tensor([0, 1, 2, 0, 1, 2, 1, 0, 2])


@pytest.mark.parametrize("without", WITHOUT)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_row_is_dropped_if_all_its_positions_are(reduction, without, multiplied):
    layer = make_layer(torch.float64, (8,), (30, 3), bias=False)
    target, tokens = torch.randint(30, (8, 3)), torch.rand(8, 3, dtype=torch.float64) + 0.1
    WITHOUT[without](target, tokens)
    options = {"reduction": reduction, "token_weight": tokens}
    loss = fused(layer, target, drop_ignored=True, **options)
    gradients = gradients_of(loss.sum(), layer)
    assert multiplied[0] == 6
    rows = unfused(F.cross_entropy, layer, target, reduction="none") * tokens
    kept = tokens.masked_fill(target == -100, 0)
    expected = rows if reduction == "none" else rows.sum() / kept.sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, gradients_of(expected.sum(), layer))


@pytest.mark.parametrize("drop", [False, True])
def test_drop_ignored_of_the_module(drop, multiplied):
    target = torch.full((50,), -100)
    target[7:10] = 1
    module = LinearCrossEntropyLoss(H, C, drop_ignored=drop)
    module(torch.randn(50, H), target).backward()
    assert multiplied[0] == (3 if drop else 50)
