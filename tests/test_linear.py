"""The loss of a linear layer: values and gradients, in every memory layout of the logits."""

import functools
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from layers import (
    DTYPES,
    C,
    H,
    N,
    by_classes,
    doubled,
    fused,
    gradients_of,
    in_chunks,
    make_layer,
    make_target,
    unfused,
)

import fused_xent
from fused_xent import _linear, _ops, _products, linear, linear_cross_entropy, reference

pytestmark = pytest.mark.usefixtures("few_logits_in_chunks")

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])

LAYOUTS = {"one chunk": lambda monkeypatch: None, "chunks": in_chunks, "classes": by_classes}


@pytest.fixture(params=LAYOUTS)
def layout(request, monkeypatch, device):
    if device != "cpu" and request.param == "classes":
        pytest.skip("only the CPU stores logits class by class")
    LAYOUTS[request.param](monkeypatch)
    return request.param


def error(actual, exact):
    """Return the error relative to the norm of exact."""
    return float((actual.double() - exact).norm() / exact.norm())


# ---- torch's own samples -----------------------------------------------------------------------


@functools.cache
def torchs_operators():
    """Return the OpInfos of torch.nn.functional.linear_cross_entropy: plain and chunked."""
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch has linear_cross_entropy from 2.13 on")
    pytest.importorskip("expecttest", reason="torch's samples need expecttest")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on import
        from torch.testing._internal.common_methods_invocations import op_db
    return [op for op in op_db if op.name == "nn.functional.linear_cross_entropy"]


@pytest.mark.filterwarnings("ignore:linear_cross_entropy:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_torchs_samples(dtype, layout, device):
    count = 0
    for operator in torchs_operators():
        for sample in operator.sample_inputs(device, dtype, requires_grad=True):
            bias = sample.kwargs.get("linear_bias")
            leaves = [sample.input, sample.args[0]] + ([] if bias is None else [bias])
            results = []
            for function in (linear_cross_entropy, F.linear_cross_entropy):
                loss = function(sample.input, *sample.args, **sample.kwargs)
                upstream = torch.full_like(loss, -0.75)
                results.append((loss, *gradients_of(loss, leaves, upstream)))
            torch.testing.assert_close(*results)
            count += 1
    assert count >= 60


def test_torchs_samples_of_errors(device):
    count = 0
    for operator in torchs_operators()[:1]:
        for wrong in operator.error_inputs_func(operator, device):
            sample = wrong.sample_input
            if "batched" in wrong.error_regex:  # here a single row with many positions is valid
                continue
            with pytest.raises((ValueError, IndexError), match=r" must (be|have) .*, got "):
                linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)
            count += 1
    assert count >= 4


# ---- values and gradients ----------------------------------------------------------------------

ONE_OF_EACH = {
    "plain": {},
    "ignored, weighted, smoothed": {"weight": "class", "label_smoothing": 0.1},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "all options": {
        "token_weight": "token",
        "lse_square_scale": 0.01,
        "softcap": 5.0,
        "logit_scale": 0.7,
        "focal_gamma": 1.5,
    },
    "normalizer": {"normalizer": 7, "token_weight": "token", "weight": "class"},
    "options, unreduced": {"token_weight": "token", "softcap": 5.0, "reduction": "none"},
}


def make_options(name, dtype, n_rows=N, n_classes=C):
    tensors = {
        "class": torch.rand(n_classes).add(0.1).to(dtype),
        "token": torch.rand(n_rows)
        .mul(2)
        .round(decimals=1)
        .masked_fill(torch.arange(n_rows) == 2, 0),
    }
    return {
        key: tensors[value] if key in ("weight", "token_weight") else value
        for key, value in ONE_OF_EACH[name].items()
    }


def as_double(options):
    return {
        key: value.double() if isinstance(value, torch.Tensor) else value
        for key, value in options.items()
    }


@by_dtype
@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_against_float64(name, soft, dtype, layout):
    """Gradients are as close to float64 as those of all logits at once, up to random error."""
    n_rows, n_classes = 96, 150  # large enough that random differences average out
    layer = make_layer(dtype, (n_rows,), (n_classes,), n_features=80)
    target = make_target(soft, dtype, n_rows, n_classes)
    options = make_options(name, dtype, n_rows, n_classes)
    exact_layer = doubled(layer)
    exact_target = target.double() if soft else target
    exact_loss = unfused(
        reference.cross_entropy, exact_layer, exact_target, **as_double(options), dim=1
    )
    upstream = torch.randn_like(exact_loss.detach()).sign()
    exact = gradients_of(exact_loss, exact_layer, upstream)
    options["loss_dtype"] = torch.promote_types(dtype, torch.float32)
    losses = [fused(layer, target, **options)]
    losses.append(unfused(fused_xent.cross_entropy, layer, target, **options))
    # Both use identically rounded logits: the losses differ only by the order of sums.
    torch.testing.assert_close(*losses, rtol=1e-5 if dtype != torch.float64 else 1e-12, atol=0)
    ours, theirs = (gradients_of(loss, layer, upstream.to(loss.dtype)) for loss in losses)
    least = 20 * torch.finfo(options["loss_dtype"]).eps
    for one, other, right in zip(ours, theirs, exact, strict=True):
        assert one.dtype == dtype
        assert error(one, right) <= 1.05 * error(other, right) + least


@by_dtype
def test_sums_over_many_chunks_are_not_rounded(dtype):
    """The error is that of one product; sums of 64 chunks in 16 bits would exceed it by far."""
    n_rows, n_classes = 256, 150
    layer = make_layer(dtype, (n_rows,), (n_classes,), n_features=80)
    target = make_target(n_rows=n_rows, n_classes=n_classes)
    exact_layer = doubled(layer)
    exact = gradients_of(unfused(F.cross_entropy, exact_layer, target), exact_layer)
    whole = gradients_of(unfused(F.cross_entropy, layer, target), layer)
    chunks = gradients_of(fused(layer, target, chunk_rows=4), layer)
    least = 1e-6 if dtype != torch.float64 else 1e-14
    for one, other, right in zip(chunks, whole, exact, strict=True):
        assert error(one, right) <= 1.1 * error(other, right) + least


@by_dtype
@pytest.mark.parametrize("is_slow", [False, True])
def test_16_bit_and_float32_products(is_slow, dtype, layout, monkeypatch):
    """16-bit products, and float32 products for processors where 16 bits are slow.

    The error is that of torch or less, on average over a dozen problems.
    """
    monkeypatch.setattr(_products, "_is_slow", lambda matrix: is_slow and dtype.itemsize == 2)
    for n_rows, n_features, n_classes in ((11, 12, 370), (40, 7, 5), (5, 90, 9)):
        squares = torch.zeros(2, 3)
        for _ in range(12):
            layer = make_layer(dtype, (n_rows,), (n_classes,), n_features)
            target = make_target(n_rows=n_rows, n_classes=n_classes)
            exact_layer = doubled(layer)
            exact = gradients_of(unfused(F.cross_entropy, exact_layer, target), exact_layer)
            losses = fused(layer, target), unfused(F.cross_entropy, layer, target)
            for i, loss in enumerate(losses):
                gradients = gradients_of(loss, layer)
                errors = [error(one, right) for one, right in zip(gradients, exact, strict=True)]
                squares[i] += torch.tensor(errors) ** 2
        ours, theirs = (squares / 12).sqrt()
        assert (ours <= 1.1 * theirs + 1e-6).all()


@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_several_positions_per_row(reduction, soft, layout):
    classes = (C, 2, 3)
    layer = make_layer(torch.float64, classes=classes)
    if soft:
        target = torch.randn(N, *classes, dtype=torch.float64).softmax(1)
    else:
        target = torch.randint(C, (N, 2, 3))
        target[0, 1] = -100
    upstream = torch.randn(N, 2, 3, dtype=torch.float64) if reduction == "none" else None
    results = [
        (loss, *gradients_of(loss, layer, upstream))
        for loss in (
            fused(layer, target, reduction=reduction),
            unfused(F.cross_entropy, layer, target, reduction=reduction),
        )
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("rows", [(), (1,), (3, 5), (2, 3, 2), (0,), (2, 0)])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_rows_of_any_shape(rows, reduction):
    layer, target = make_layer(torch.float64, rows), torch.randint(C, rows)
    loss = fused(layer, target, reduction=reduction)
    assert loss.shape == (rows if reduction == "none" else ())
    flat = F.linear(*layer).reshape(-1, C)
    expected = F.cross_entropy(flat, target.reshape(-1), reduction=reduction).view_as(loss)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(gradients_of(x.sum(), layer) for x in (loss, expected)))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_any_subset_of_gradients(needs, layout):
    layer, target = make_layer(torch.float64), make_target()
    expected = gradients_of(unfused(F.cross_entropy, layer, target), layer)
    for leaf, needed in zip(layer, needs, strict=True):
        leaf.requires_grad_(needed)
    loss = fused(layer, target)
    torch.testing.assert_close(loss, unfused(F.cross_entropy, layer, target))
    assert loss.requires_grad == any(needs)
    if any(needs):
        loss.backward()
    for leaf, needed, right in zip(layer, needs, expected, strict=True):
        assert (leaf.grad is not None) == needed
        if needed:
            torch.testing.assert_close(leaf.grad, right)


def test_strided_operands(layout):
    """A transposed input, a weight with a step, an expanded bias."""
    hidden = torch.randn(H, N, dtype=torch.float64).t().requires_grad_()
    linear_weight = torch.randn(C, 2 * H, dtype=torch.float64)[:, ::2].requires_grad_()
    bias = torch.randn(1, dtype=torch.float64).expand(C).requires_grad_()
    layer, target = [hidden, linear_weight, bias], make_target()[:1].expand(N)
    expected = gradients_of(unfused(F.cross_entropy, layer, target), layer)
    torch.testing.assert_close(gradients_of(fused(layer, target), layer), expected)


def test_infinities_and_nan(layout):
    layer, target = make_layer(), make_target()
    with torch.no_grad():
        layer[2][3] = -torch.inf
        layer[0][4, 0] = torch.nan
    for reduction in ("mean", "none"):
        results = [
            (loss, *gradients_of(loss.sum(), layer))
            for loss in (
                fused(layer, target, reduction=reduction),
                unfused(fused_xent.cross_entropy, layer, target, reduction=reduction),
            )
        ]
        torch.testing.assert_close(*results, equal_nan=True)


def test_dropped_row_is_not_in_the_mean(layout):
    """Even if its class has an infinite weight."""
    layer, target = make_layer(), torch.arange(N)
    weight, tokens = torch.ones(C), torch.ones(N)
    weight[3], tokens[3] = torch.inf, 0
    options = {"weight": weight, "token_weight": tokens}
    kept = torch.arange(N) != 3
    loss = fused(layer, target, **options)
    expected = F.cross_entropy(F.linear(*layer)[kept], target[kept])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(gradients_of(x, layer) for x in (loss, expected)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored(reduction, layout):
    layer, target = make_layer(), torch.full((N,), -100)
    losses = [
        f(layer)
        for f in (
            lambda x: fused(x, target, reduction=reduction),
            lambda x: unfused(F.cross_entropy, x, target, reduction=reduction),
        )
    ]
    torch.testing.assert_close(*losses, equal_nan=True)
    torch.testing.assert_close(*(gradients_of(x.sum(), layer) for x in losses), equal_nan=True)


def test_results_are_deterministic(layout, threads):
    layer, target = make_layer(rows=(64,)), make_target(n_rows=64)
    results = []
    for n in (1, 1, 2):
        threads(n)
        loss = fused(layer, target)
        results.append((loss, *gradients_of(loss, layer)))
    assert all(map(torch.equal, results[0], results[1]))
    torch.testing.assert_close(results[0], results[2])


# ---- chunks and memory -------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch):
    """Records each logits tensor passed to a kernel: its memory address and element count."""
    found = []

    def noting(operator):
        def run(problem, *arguments, **inplace):
            memory = problem.logits.untyped_storage()
            found.append((memory.data_ptr(), memory.nbytes() // problem.logits.element_size()))
            return operator(problem, *arguments, **inplace)

        return run

    for name in ("forward", "backward", "backward_", "forward_backward_"):
        monkeypatch.setattr(_ops, name, noting(getattr(_ops, name)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_all_logits_never_exist_at_once(reduction, dtype, seen, monkeypatch):
    in_chunks(monkeypatch)
    n_rows, n_classes = 200, 300
    layer = make_layer(dtype, rows=(n_rows,), classes=(n_classes,))
    target = make_target(n_rows=n_rows, n_classes=n_classes)
    fused(layer, target, reduction=reduction).sum().backward()
    passes = 1 if reduction == "mean" and dtype == torch.float32 else 3
    assert [numel for _, numel in seen] == [4 * n_classes] * (n_rows // 4 * passes)


HAS_OPTIONS = hasattr(torch.nn, "LinearCrossEntropyOptions")
CHUNKS = {  # the arguments, and the expected chunk sizes of 20 rows
    "chunk_rows": ({"chunk_rows": 8}, [7, 7, 6]),
    "chunk_rows above the number of rows": ({"chunk_rows": 99}, [20]),
    "chunk_rows above the limits": ({"chunk_rows": 20}, [20]),
    "chunk_rows 1": ({"chunk_rows": 1}, [1] * 20),
    "torch's option": ({"options": 5}, [5] * 4),
    "torch's option, without a size": ({"options": None}, [4] * 5),
    "chunk_rows overrides torch's option": ({"options": 5, "chunk_rows": 10}, [10, 10]),
    "none": ({}, [4] * 5),
}


@pytest.mark.parametrize("few_bytes", [0, 1 << 30], ids=["few rows", ""])
@pytest.mark.parametrize("name", CHUNKS)
def test_rows_of_a_chunk(name, few_bytes, monkeypatch, device):
    """Chunks follow chunk_rows or the limits of the device: 6 rows, and the bytes of 4 rows."""
    options, expected = CHUNKS[name]
    if "options" in options:
        if not HAS_OPTIONS:
            pytest.skip("torch has LinearCrossEntropyOptions from 2.13 on")
        size = options["options"]
        torchs = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=size)
        options = options | {"options": torchs}
    here, elsewhere = ("CPU", "GPU") if device == "cpu" else ("GPU", "CPU")
    for limit, value in (("ROWS", 6), ("BYTES", 4 * C * 4 + 1)):
        monkeypatch.setattr(_linear, f"{here}_{limit}", value)
        monkeypatch.setattr(_linear, f"{elsewhere}_{limit}", 1)
    monkeypatch.setattr(_linear, "FEW_BYTES", few_bytes)
    rows, run = [], _ops.forward_backward_
    monkeypatch.setattr(
        _ops, "forward_backward_", lambda problem: rows.append(len(problem.logits)) or run(problem)
    )
    layer, target = make_layer(rows=(20,), n_features=8), make_target(n_rows=20)
    loss = fused(layer, target, **options)
    assert rows == expected
    exact = unfused(F.cross_entropy, layer, target)
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(*(gradients_of(x, layer) for x in (loss, exact)))


@pytest.mark.parametrize("n_rows", [9, 10, 11])
@pytest.mark.parametrize("chunk_rows", [None, 200])
@pytest.mark.parametrize("options", [{}, {"weight": torch.ones(10)}], ids=["plain", "weighted"])
def test_few_logits_are_computed_at_once(options, chunk_rows, n_rows, monkeypatch):
    """If chunk_rows is None."""
    assert linear.FEW_LOGITS == 0  # set by the fixture for this file
    monkeypatch.setattr("fused_xent.linear.FEW_LOGITS", 100)
    made, forward = [], _linear.forward
    monkeypatch.setattr(
        _linear, "forward", lambda *x, **options: made.append(1) or forward(*x, **options)
    )
    layer, target = make_layer(rows=(n_rows,), classes=(10,)), torch.zeros(n_rows).long()
    fused(layer, target, chunk_rows=chunk_rows, **options).backward()
    assert bool(made) == (n_rows > 10 or chunk_rows is not None)


@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("classes", [(C,), (5, 2)], ids=str)
@pytest.mark.parametrize("rows", [(N,), (2, 4), (2, 2, 3), (2, C)], ids=str)
def test_few_logits_are_right(rows, classes, shift, ignore_index, monkeypatch):
    monkeypatch.setattr("fused_xent.linear.FEW_LOGITS", 1 << 20)
    layer = make_layer(torch.float64, rows, classes)
    target = torch.randint(classes[0], (*rows, *classes[1:]))
    target[..., :1] = ignore_index
    options = {"ignore_index": ignore_index, "label_smoothing": 0.1, "reduction": "sum"}
    loss = fused(layer, target, shift=shift, **options)
    hidden, linear_weight, bias = layer
    logits = F.linear(hidden, linear_weight.flatten(0, -2), bias.flatten())
    logits = logits.narrow(len(rows) - 1, 0, rows[-1] - shift)
    labels = target.narrow(len(rows) - 1, shift, rows[-1] - shift)
    exact = F.cross_entropy(
        logits.reshape(-1, *classes), labels.reshape(-1, *classes[1:]), **options
    )
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(*(gradients_of(x, layer) for x in (loss, exact)))


@pytest.mark.parametrize(
    ("rows", "classes", "n_features"), [((0,), (C,), H), ((N,), (C, 0), H), ((N,), (C,), 0)]
)
def test_empty_layers(rows, classes, n_features):
    layer = [
        torch.randn(*rows, n_features),
        torch.randn(*classes, n_features),
        torch.randn(classes),
    ]
    layer = [x.double().requires_grad_() for x in layer]
    target = torch.zeros(*rows, *classes[1:], dtype=torch.int64)
    losses = fused(layer, target, reduction="sum", chunk_rows=3)
    exact = unfused(F.cross_entropy, layer, target, reduction="sum")
    torch.testing.assert_close(losses, exact)
    torch.testing.assert_close(*(gradients_of(x, layer) for x in (losses, exact)))


def test_slabs_fill_their_byte_limit():
    mebibyte = 1 << 20
    for is_cuda, limit in ((False, 8 * mebibyte), (True, 256 * mebibyte)):
        sizes = [x.stop - x.start for x in _products.slabs(10, limit // 3, is_cuda)]
        assert sizes == [3, 3, 3, 1]
        assert len(list(_products.slabs(10, 2 * limit, is_cuda))) == 10


def test_one_chunk_needs_no_float32_gradient_sums(monkeypatch):
    """With one chunk, products go into the gradients; several chunks are summed in float32."""
    dtypes, product = [], _linear.product

    def noting(one, other, out, *bias, **beta):
        dtypes.append(out.dtype)
        return product(one, other, out, *bias, **beta)

    monkeypatch.setattr(_linear, "product", noting)
    half = torch.bfloat16
    layer = make_layer(half, (8,), bias=False)
    for chunk_rows, expected in ((8, [half] * 3), (4, [half, half, torch.float32] * 2)):
        fused(layer, torch.arange(8), chunk_rows=chunk_rows)
        assert dtypes == expected
        dtypes.clear()


def test_documented_limits():
    limits = (_linear.CPU_ROWS, _linear.CPU_BYTES, _linear.GPU_ROWS, _linear.GPU_BYTES)
    assert limits == (512, 128 * 2**20, 4096, 2**30)
    text = " ".join(linear_cross_entropy.__doc__.split())
    assert "at most 512 rows and 128 MiB on a CPU, or 4096 rows and 1 GiB on a GPU" in text


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("supported", ["bf16", "fp16", "none", "both"])
def test_detection_of_slow_products(supported, device, monkeypatch):
    """16-bit matrices are slow on a CPU without instructions for their dtype."""
    for name in ("bf16", "fp16"):
        answer = supported in (name, "both")
        monkeypatch.setattr(
            torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda a=answer: a, raising=False
        )
    slow = {
        dtype
        for dtype in DTYPES
        if _products._is_slow(torch.empty(1, 1, dtype=dtype, device=device))
    }
    of_cpu = {
        torch.bfloat16: supported in ("fp16", "none"),
        torch.float16: supported in ("bf16", "none"),
    }
    assert slow == {dtype for dtype, is_slow in of_cpu.items() if is_slow and device == "cpu"}


@pytest.mark.cpu("only the CPU stores logits class by class")
@pytest.mark.parametrize("other", ["chunk_rows", "positions", "no gradient of the weight", "none"])
def test_when_logits_are_not_stored_class_by_class(other, seen, monkeypatch):
    monkeypatch.setattr(_linear, "FEW_BYTES", 0)
    classes = (1500, 2) if other == "positions" else (3000,)
    layer = make_layer(rows=(20,), classes=classes, n_features=20, bias=False)
    target = torch.randint(classes[0], (20, *classes[1:]))
    if other == "no gradient of the weight":
        layer[1].requires_grad_(False)
    fused(layer, target, chunk_rows=20 if other == "chunk_rows" else None).backward()
    memory = None if layer[1].grad is None else layer[1].grad.untyped_storage().data_ptr()
    assert (seen[0][0] == memory) == (other == "none")


@pytest.mark.cpu("only the CPU stores logits class by class")
@pytest.mark.parametrize(
    ("dtype", "n_features", "beside"),
    [(torch.float32, 20, 0), (torch.bfloat16, 20, 0), (torch.bfloat16, 8, 12)],
    ids=["float32", "bfloat16", "bfloat16, more rows than features"],
)
def test_logits_of_few_rows_use_the_gradients_memory(dtype, n_features, beside, seen, monkeypatch):
    monkeypatch.setattr(_linear, "FEW_BYTES", 0)
    layer = make_layer(dtype, (20,), (3000,), n_features, bias=False)
    fused(layer, make_target(n_rows=20, n_classes=3000)).backward()
    memory = layer[1].grad.untyped_storage()
    assert seen[0] == (memory.data_ptr(), layer[1].numel())
    assert [numel for _, numel in seen[1:]] == ([beside * 3000] if beside else [])
    for leaf in layer:
        assert leaf.grad.untyped_storage().nbytes() == leaf.nbytes


@pytest.mark.cpu("only the CPU stores logits class by class")
def test_float32_with_more_rows_than_features_uses_chunks(seen, monkeypatch):
    """Chunks take less memory than a block beside the gradient."""
    monkeypatch.setattr(_linear, "FEW_BYTES", 0)
    in_chunks(monkeypatch)
    fused(make_layer(rows=(20,), n_features=8), make_target(n_rows=20)).backward()
    assert [numel for _, numel in seen] == [4 * C] * 5


# ---- shift and drop_ignored --------------------------------------------------------------------


@pytest.mark.parametrize("drop", [False, True], ids=["all rows", "drop_ignored"])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shift", [0, 1, 3, 4])
def test_shift_and_drop_ignored(shift, reduction, soft, drop, layout):
    rows = (3, 5)
    layer = make_layer(torch.float64, rows)
    tokens = torch.rand(rows, dtype=torch.float64).masked_fill(torch.rand(rows) < 0.3, 0)
    target = torch.randn(*rows, C, dtype=torch.float64).softmax(-1)
    if not soft:
        target = torch.randint(C, rows)
        target[1, 2:] = -100
    loss = fused(
        layer, target, token_weight=tokens, shift=shift, drop_ignored=drop, reduction=reduction
    )
    logits = F.linear(*layer)[:, : 5 - shift]
    labels, tokens = target[:, shift:], tokens[:, shift:]
    expected = reference.cross_entropy(
        logits, labels, token_weight=tokens, dim=-1, reduction=reduction
    )
    torch.testing.assert_close(loss, expected, equal_nan=True)
    results = [torch.autograd.grad(x.sum() * 3, layer, allow_unused=True) for x in (loss, expected)]
    torch.testing.assert_close(*results)


def test_next_tokens_without_weights():
    layer, target = make_layer(torch.float64, (2, 6)), torch.randint(C, (2, 6))
    expected = F.cross_entropy(F.linear(*layer)[:, :-1].flatten(0, 1), target[:, 1:].flatten())
    for shift in (1, True):
        loss = fused(layer, target, shift=shift)
        torch.testing.assert_close(loss, expected)


def test_dropped_rows_are_not_multiplied(monkeypatch):
    shapes = []
    product = _linear.product
    monkeypatch.setattr(
        _linear,
        "product",
        lambda one, *others, **beta: shapes.append(one.shape[0]) or product(one, *others, **beta),
    )
    layer, target = make_layer(rows=(50,), bias=False), torch.full((50,), -100)
    target[7:10] = 1
    fused(layer, target, drop_ignored=True).backward()
    assert shapes == [3, 3, C]  # logits, grad_hidden, grad_weight
    assert layer[0].grad[:7].abs().max() == 0 < layer[0].grad[7:10].abs().max()


# ---- statistics --------------------------------------------------------------------------------


@pytest.mark.parametrize("drop", [False, True], ids=["all rows", "drop_ignored"])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("shift", [0, 2])
def test_statistics(shift, soft, drop, layout):
    rows = (3, 5)
    layer = make_layer(torch.float64, rows)
    target = torch.randn(*rows, C, dtype=torch.float64).softmax(-1)
    if not soft:
        target = torch.randint(C, rows)
        target[1, 1:4] = -100
    options = {"lse_square_scale": 0.1, "softcap": 4.0}
    hidden, linear_weight, bias = layer
    results = fused_xent.linear_cross_entropy_with_statistics(
        hidden, linear_weight, target, linear_bias=bias, shift=shift, drop_ignored=drop, **options
    )
    logits = F.linear(*layer)[:, : 5 - shift]
    expected = reference.cross_entropy_with_statistics(logits, target[:, shift:], dim=-1, **options)
    torch.testing.assert_close(results, expected)

    def total(r):
        return r.loss + (r.lse * r.entropy).sum() + r.z_loss.sum()

    torch.testing.assert_close(*(gradients_of(total(r), layer) for r in (results, expected)))


def test_gradient_of_the_loss_beside_statistics(layout):
    """It is the gradient computed in forward."""
    layer, target = make_layer(torch.float64), make_target()
    results = fused_xent.linear_cross_entropy_with_statistics(*layer[:2], target)
    expected = unfused(F.cross_entropy, layer[:2], target)
    torch.testing.assert_close(*(gradients_of(x, layer[:2]) for x in (results.loss, expected)))


@pytest.mark.parametrize("statistics", [False, True], ids=["", "statistics"])
def test_logits_are_computed_once(statistics, seen):
    layer, target = make_layer(bias=False), make_target()
    function = fused_xent.linear_cross_entropy_with_statistics
    if not statistics:
        function = linear_cross_entropy
    results = function(*layer, target)
    (results.loss if statistics else results).backward()
    assert len(seen) == 1
