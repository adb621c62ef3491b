"""Memory layouts: strides, offsets, expanded tensors; and rows that may hold any values."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, Labels, make_logits, make_target, make_upstream
from compare import assert_gradient, assert_loss, truth
from modes import MODES, has_mode, loss_and_gradient, roundings

import fused_xent

pytestmark = pytest.mark.kernels
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def strided(shape, strides, offset=0):
    """Return a function that makes logits with this shape, strides and offset."""

    def make(dtype):
        size = offset + 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        return make_logits((size,), dtype).as_strided(shape, strides, offset)

    return make


LAYOUTS = {
    "transposed": strided((6, 9), (1, 6)),
    "transposed, many classes": strided((6, 300), (1, 6)),
    "transposed, rows beyond a tile": strided((300, 5), (1, 300)),
    "rows with a gap": strided((5, 131), (150, 1)),
    "every other row": strided((5, 200), (400, 1)),
    "every other row, few classes": strided((70, 11), (22, 1)),
    "every other class": strided((5, 200), (400, 2)),
    "every third class": strided((40, 21), (64, 3)),
    "every third class, few": strided((40, 5), (15, 3)),
    "long rows with a gap": strided((2, 17000), (17003, 1), 3),
    "every other class of long rows": strided((2, 17000), (34000, 2)),
    "equal rows (stride 0)": strided((6, 200), (0, 1)),
    "equal rows, few classes": strided((6, 7), (0, 1)),
    "equal classes (stride 0)": strided((6, 7), (1, 0)),
    "one number (stride 0)": strided((6, 150), (0, 0)),
    "overlapping rows": strided((6, 200), (3, 1)),
    "channels last": strided((2, 5, 6, 7), (210, 1, 35, 5)),
    "channels last, many classes": strided((2, 150, 4, 3), (1800, 1, 450, 150)),
    "channels last, long rows": strided((1, 17000, 1, 2), (34000, 1, 34000, 17000)),
    "height and width swapped": strided((2, 5, 6, 7), (210, 42, 1, 6)),
    "batch innermost": strided((4, 5, 6, 7), (1, 168, 28, 4)),
    "sliced image": strided((2, 5, 6, 7), (1000, 110, 10, 1), 12),
    "sliced wide image": strided((2, 3, 2, 300), (2000, 640, 310, 1)),
    "image columns with a step": strided((2, 5, 6, 7), (560, 112, 16, 2)),
    "volume, permuted": strided((2, 3, 2, 4, 5), (60, 1, 120, 3, 12)),
    "sequence with classes last": strided((2, 150, 5), (750, 1, 150)),
    "no row dimensions merge": strided((2, 3, 2, 2, 2), (7, 200, 100, 3, 40)),
    "no row dimensions merge, classes last": strided((2, 3, 2, 3, 2, 2), (3, 1, 200, 30, 14, 100)),
    "windows of a sequence": strided((7, 150), (1, 1)),
    "windows of a sequence, more of them than classes": strided((200, 150), (1, 1)),
    "windows of a sequence, few classes": strided((40, 9), (1, 1)),
    "no batch, with a step": strided((9,), (3,)),
    "no batch, stride 0": strided((9,), (0,)),
}


@by_dtype
@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_logits(layout, probabilities, dtype):
    logits = LAYOUTS[layout](dtype)
    target = make_target(logits, Labels(probabilities))
    upstream = make_upstream(logits.sum(min(1, logits.dim() - 1)).shape, "none")
    exact = truth(logits, target, upstream, reduction="none", label_smoothing=0.1)
    leaf = logits.detach().requires_grad_()
    options = {"reduction": "none", "label_smoothing": 0.1}
    loss = fused_xent.cross_entropy(leaf, target, loss_dtype=exact.loss.dtype, **options)
    assert_loss(loss, exact, torch.float64)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))
    assert_gradient(gradient, exact, dtype)


@pytest.mark.parametrize("mode", ["inplace", "fused"])
@pytest.mark.parametrize(
    "permutation", [(0, 1, 2, 3), (0, 3, 1, 2), (1, 0, 2, 3), (0, 1, 3, 2), (3, 2, 1, 0)]
)
def test_strides_of_overwritten_logits(permutation, mode):
    logits = make_logits((4, 5, 3, 6), torch.float32).permute(permutation)
    target = make_target(logits, Labels())
    upstream = make_upstream(target.shape, "none")
    loss, gradient = loss_and_gradient(logits, target, upstream, mode, reduction="none")
    exact = truth(logits, target, upstream, reduction="none")
    assert_loss(loss, exact, torch.float32)
    assert_gradient(gradient, exact, torch.float32, roundings(mode))


@by_dtype
@pytest.mark.parametrize("shape", [(3, 201), (5, 13), (2, 16390)], ids=str)
@pytest.mark.parametrize("offset", range(18))
def test_misaligned_storage(offset, shape, dtype):
    for row_gap in (0, 1):  # rows of different alignment, or all of the same
        logits = strided(shape, (shape[1] + row_gap, 1), offset)(dtype)
        target = make_target(logits, Labels())
        exact = truth(logits, target, 1.0, reduction="sum")
        loss, gradient = loss_and_gradient(logits, target, reduction="sum")
        assert_loss(loss, exact, torch.promote_types(dtype, torch.float32))
        assert_gradient(gradient, exact, dtype)
        soft = strided(shape, (shape[1] + row_gap, 1), offset)(dtype).abs()
        exact = truth(logits, soft, 1.0, reduction="sum")
        loss, gradient = loss_and_gradient(logits, soft, reduction="sum")
        assert_loss(loss, exact, torch.promote_types(dtype, torch.float32))
        assert_gradient(gradient, exact, dtype)


@by_dtype
@pytest.mark.parametrize("offset", [1, 3, 17])
@pytest.mark.parametrize("mode", ["inplace", "fused"])
@pytest.mark.parametrize("strided", [False, True], ids=["rows", "columns"])
def test_nothing_is_written_outside_the_logits(strided, mode, offset, dtype):
    if not has_mode(mode, dtype):
        pytest.skip("float16 has no fused mode")
    for n_classes in (5, 31, 130, 201, 2049):
        memory = torch.full((3 * n_classes + offset + 64,), 7.0, dtype=dtype)
        rows = slice(offset, offset + 3 * n_classes)
        memory[rows] = make_logits((3 * n_classes,), dtype)
        before = memory.clone()
        logits = memory[rows].view(n_classes, 3).mT if strided else memory[rows].view(3, n_classes)
        logits = logits.detach().requires_grad_()
        target = make_target(logits, Labels())
        computed = _Alias.apply(logits)
        fused_xent.cross_entropy(computed, target, **MODES[mode]).backward()
        outside = torch.ones_like(memory, dtype=torch.bool)
        outside[rows] = False
        assert torch.equal(memory[outside], before[outside])
        assert (memory[rows] != before[rows]).all()


class _Alias(torch.autograd.Function):
    """Returns its input as a computed tensor in the same memory, like a preallocated output."""

    @staticmethod
    def forward(ctx, input):
        return input.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


UPSTREAMS = {
    "expanded": lambda rows: torch.tensor(1.5).expand(rows),
    "expanded along one dimension": lambda rows: (torch.rand(rows[:-1]) + 0.5)[..., None].expand(
        rows
    ),
    "transposed": lambda rows: torch.rand(rows[::-1]).permute(*reversed(range(len(rows)))),
    "every other": lambda rows: torch.rand(*rows[:-1], 2 * rows[-1])[..., ::2],
    "zeros": lambda rows: torch.zeros(rows),
    "1 only in the first row": lambda rows: torch.arange(1.0, 1 + math.prod(rows)).view(rows),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(4, 7, 5), (4, 150, 5), (2, 5, 3, 300), (6, 200)], ids=str)
@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_strides_of_upstream_gradient(upstream, shape, mode):
    logits = make_logits(shape, torch.float32)
    target = make_target(logits, Labels(ignored=0.2))
    upstream = UPSTREAMS[upstream](tuple(target.shape))
    loss, gradient = loss_and_gradient(logits, target, upstream, mode, reduction="none")
    exact = truth(logits, target, upstream, reduction="none")
    assert_loss(loss, exact, torch.float32)
    assert_gradient(gradient, exact, torch.float32, roundings(mode))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("shape", [(6, 200), (40, 7), (3, 7, 6), (3, 150, 6)], ids=str)
def test_strides_of_class_indices(shape, dtype):
    logits = make_logits(shape, torch.float32)
    target = make_target(logits, Labels(dtype=dtype))
    expected = loss_and_gradient(logits, target, reduction="sum")
    double = torch.stack([target, 0 * target - 1], -1)  # reading a -1 would raise an error
    for same in (double[..., 0], target.mT.contiguous().mT if target.dim() > 1 else double[:, 0]):
        actual = loss_and_gradient(logits, same, reduction="sum")
        assert all(map(torch.equal, actual, expected))
    constant = torch.tensor(3, dtype=dtype).expand(target.shape)
    actual = fused_xent.cross_entropy(logits, constant)
    torch.testing.assert_close(actual, F.cross_entropy(logits, constant.long()))


@by_dtype
@pytest.mark.parametrize("layout", ["transposed", "every other class", "rows with a gap", "image"])
def test_strides_of_probabilities(layout, dtype):
    make = {**LAYOUTS, "image": LAYOUTS["channels last"]}[layout]
    target = make(dtype).abs()
    target = make(dtype).copy_(target)  # restores the layout, which abs() may change
    logits = make_logits(target.shape, dtype)
    exact = truth(logits, target, 1.0, reduction="sum")
    loss, gradient = loss_and_gradient(logits, target, reduction="sum")
    assert_loss(loss, exact, torch.promote_types(dtype, torch.float32))
    assert_gradient(gradient, exact, dtype)


@by_dtype
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("anything", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shape", [(6, 7), (6, 200), (3, 17000), (2, 5, 300), (2, 150, 3)], ids=str)
def test_ignored_rows_may_hold_anything(shape, anything, mode, dtype):
    if not has_mode(mode, dtype):
        pytest.skip("float16 has no fused mode")
    logits = make_logits(shape, dtype)
    target = make_target(logits, Labels(ignored=0.5))
    target.view(-1)[0] = -100
    for label_smoothing in (0.0, 0.1):
        exact = truth(logits, target, 1.5, reduction="sum", label_smoothing=label_smoothing)
        spoilt = torch.where((target == -100).unsqueeze(1), anything, logits)
        loss, gradient = loss_and_gradient(
            spoilt, target, 1.5, mode, reduction="sum", label_smoothing=label_smoothing
        )
        assert_loss(loss, exact, torch.promote_types(dtype, torch.float32))
        assert_gradient(gradient, exact, dtype, roundings(mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("anything", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(6, 7), (6, 200), (3, 17000)], ids=str)
def test_upstream_of_dropped_rows_may_be_anything(shape, anything, soft, mode):
    """Ignored rows and rows of token weight 0 have gradient 0, whatever their upstream."""
    logits = make_logits(shape, torch.float32)
    target = make_target(logits, Labels(soft))
    token_weight = torch.ones(shape[0])
    token_weight[1::3] = 0
    left_out = token_weight == 0
    if not soft:
        target[0] = -100
        left_out[0] = True
    upstream = make_upstream((shape[0],), "none")
    exact = truth(logits, target, upstream * ~left_out, reduction="none")
    upstream[left_out] = anything
    options = {"reduction": "none", "token_weight": token_weight}
    loss, gradient = loss_and_gradient(logits, target, upstream, mode, **options)
    assert (loss[left_out] == 0).all()
    assert_gradient(gradient, exact, torch.float32, roundings(mode))


@by_dtype
@pytest.mark.parametrize("stride", [2**30, 2**31 + 7])
@pytest.mark.parametrize("dim", [0, 1], ids=["rows far apart", "classes far apart"])
def test_offsets_of_more_than_32_bits(dim, stride, dtype):
    """The memory is only reserved: untouched pages take no space."""
    try:
        memory = torch.empty(2 * stride + 200, dtype=dtype)
    except RuntimeError:
        pytest.skip(f"no {2 * stride * dtype.itemsize >> 30} GiB of address space")
    shape, strides = ((3, 150), (stride, 1)) if dim == 0 else ((150, 3), (1, stride))
    logits = memory.as_strided(shape, strides)
    logits.copy_(make_logits(shape, dtype))
    target = make_target(logits, Labels())
    exact = truth(logits, target, 1.0, reduction="sum")
    loss, gradient = loss_and_gradient(logits, target, reduction="sum")
    assert_loss(loss, exact, torch.promote_types(dtype, torch.float32))
    assert_gradient(gradient, exact, dtype)
    computed = _Alias.apply(logits.detach().requires_grad_())
    fused_xent.cross_entropy(computed, target, reduction="sum", inplace_backward=True).backward()
    assert_gradient(logits, exact, dtype)
