"""Checks of the providers, and the arguments that each one passes on."""

import gc
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import fused_xent
from bench import __main__ as bench
from bench import linear, loss, providers
from bench.cases import DTYPES, Case, Options
from bench.check import Check, WrongResult, relative, torch_loss, worst
from bench.device import HostClock
from bench.providers import ADAPTERS, Provider, Request, Unsupported, gather
from bench.timing import Workload

pytestmark = pytest.mark.cpu("runs the benchmark, which has an option for the device")
FEW = ["--device", "cpu", "--rounds", "2"]
TWO = ["--provider", "torch eager", "--provider", "fused_xent"]
SMALL = [*FEW, *TWO, "--rows", "24", "--vocab", "50"]
SMALL_LINEAR = [*FEW, "--rows", "24", "--features", "16", "--vocab", "50"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Most of a run's time goes to cold caches and to garbage, on which nothing here depends."""
    monkeypatch.setattr(HostClock, "start", HostClock.mark)
    monkeypatch.setattr(gc, "collect", lambda: 0)


def with_gradient(change, factor=1.0):
    """The right loss times `factor`; its right gradient is changed by `change`."""

    class Liar(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits, target):
            leaf = logits.detach().float().requires_grad_()  # small gradients stay what they are
            with torch.enable_grad():
                value = F.cross_entropy(leaf, target)
                (gradient,) = torch.autograd.grad(value, leaf)
            ctx.gradient, ctx.dtype = change(gradient, target), logits.dtype
            return (value.detach() * factor).to(logits.dtype)

        @staticmethod
        def backward(ctx, upstream):
            return (ctx.gradient * upstream).to(ctx.dtype), None

    return Liar.apply


def times_where(factor, *index, at_targets=True):
    """Multiplies a part of the gradient, the targets' entries in it or not."""

    def change(gradient, target):
        targets = target.clamp(min=0).unsqueeze(1)
        right = gradient.gather(1, targets)
        gradient[index] *= factor
        return gradient if at_targets else gradient.scatter(1, targets, right)

    return with_gradient(change)


def with_loss(factor):
    """A wrong loss with the right gradient."""
    return with_gradient(lambda gradient, target: gradient, factor)


def times_at_target_of(row, factor):
    def change(gradient, target):
        gradient[row, target[row]] *= factor
        return gradient

    return with_gradient(change)


def garbage_in_ignored_rows(*index):
    """At some classes of the rows that are ignored."""

    def change(gradient, target):
        row = torch.zeros_like(gradient[0])
        row[index] = 1e-7
        gradient[target == -100] = row
        return gradient

    return with_gradient(change)


def alternately(factor):
    """One entry too large, the next too small: as many of each, so their scale is right."""

    def change(gradient, target):
        signs = torch.ones(gradient.numel()).view_as(gradient)
        signs.view(-1)[::2] = -1
        return gradient * (1 + factor * signs)

    return with_gradient(change)


def wrong_without_gradient(logits, target):
    value = F.cross_entropy(logits, target)
    return value if torch.is_grad_enabled() else 1.1 * value


def wrong_with_gradient(logits, target):
    return with_loss(1.1 if torch.is_grad_enabled() else 1.0)(logits, target)


LIARS = {
    "loss": lambda *arguments: 1.1 * F.cross_entropy(*arguments),
    "loss without a gradient": wrong_without_gradient,
    "loss with a gradient": wrong_with_gradient,
    "too small a loss": with_loss(0.9),
    "a loss that is not a number": with_loss(float("nan")),
    "an infinite loss": with_loss(float("inf")),
    "not a number": lambda *arguments: F.cross_entropy(*arguments) * float("nan"),
    "shape": lambda *arguments: F.cross_entropy(*arguments).view(1, 1),
    "rows that are ignored": lambda x, target: F.cross_entropy(x, target.clamp(min=0)),
    "gradient": times_where(1.1),
    "no gradient": times_where(0.0),
    "a class": times_where(0.0, slice(None), 3, at_targets=False),
    "the last class": times_where(2.0, slice(None), -1),
    "a row": times_where(0.0, 0, at_targets=False),
    "a class in the first rows": times_where(0.0, slice(300), 3, at_targets=False),
    "the last row": times_where(-1.0, -1),
    "a row that is not a number": times_where(float("nan"), 0, at_targets=False),
    "one entry that is not a number": times_where(float("nan"), 0, 3),
    "the target of the first row": times_at_target_of(0, 0.0),
    "the target of the last row": times_at_target_of(-1, 0.0),
    "ignored rows' gradient": garbage_in_ignored_rows(slice(None)),
    "ignored rows' first class": garbage_in_ignored_rows(0),
    "ignored rows' last class": garbage_in_ignored_rows(-1),
}


@pytest.mark.parametrize("liar", LIARS)
@pytest.mark.parametrize(
    ("dtype", "chunk"),
    [(torch.float32, 70_000), (torch.bfloat16, 1 << 25), (torch.float16, 250_000)],
)
def test_check_catches_liars(liar, dtype, chunk, monkeypatch):
    monkeypatch.setattr("bench.check.CHUNK", chunk)
    case = Case("own", (600, 1000), options=Options(ignored=0.2))
    logits, target = case.tensors(dtype, "cpu")
    logits *= 0.1  # no class outweighs the others: a row or a class is a small part of all
    target[0], target[-1] = 7, 8  # those are counted
    compare_with_float64 = Check(Workload(logits, target), case.options)
    compare_with_float64(F.cross_entropy)
    with pytest.raises(WrongResult, match=r"off float64's|has the shape"):
        compare_with_float64(LIARS[liar])


# How far off a provider may be that is found nevertheless: a little more than is tolerated.
LOSS_LIMIT = {torch.float32: 1.5e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}
NORM_LIMIT = {torch.float32: 1.5e-4, torch.bfloat16: 7.5e-2, torch.float16: 1.5e-2}
PART_LIMIT = {torch.float32: 1.5e-2, torch.bfloat16: 3e-1, torch.float16: 1.5e-1}
SCALE_LIMIT = {torch.float32: 1.5e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SLIGHT_LIARS = {  # of how far off it is; the shape, such that nothing else is off too far
    "too large a loss": (lambda limit: with_loss(1 + limit), LOSS_LIMIT, (600, 1000)),
    "too small a loss": (lambda limit: with_loss(1 - limit), LOSS_LIMIT, (600, 1000)),
    "each entry": (alternately, NORM_LIMIT, (600, 1000)),
    "a row": (lambda x: times_where(1 + x, 5, at_targets=False), PART_LIMIT, (30_000, 10)),
    "a class": (
        lambda x: times_where(1 + x, slice(None), 5, at_targets=False),
        *(PART_LIMIT, (10, 30_000)),
    ),
    "a class in the first rows": (
        lambda x: times_where(1 + 2 * x, slice(3), 5, at_targets=False),
        *(PART_LIMIT, (10, 30_000)),
    ),
    "the target of a row": (lambda x: times_at_target_of(5, 1 + x), PART_LIMIT, (30_000, 10)),
    "large scale": (lambda x: times_where(1 + x, at_targets=False), SCALE_LIMIT, (600, 1000)),
    "small scale": (lambda x: times_where(1 - x, at_targets=False), SCALE_LIMIT, (600, 1000)),
    "large scale at targets": (
        lambda x: with_gradient(
            lambda gradient, _: gradient.where(gradient > 0, gradient * (1 + x))
        ),
        *(SCALE_LIMIT, (600, 1000)),
    ),
}


@pytest.mark.parametrize("liar", SLIGHT_LIARS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_check_catches_who_is_a_little_off(liar, dtype, monkeypatch):
    """In one chunk of several too."""
    monkeypatch.setattr("bench.check.CHUNK", 100_000)
    lie, limits, shape = SLIGHT_LIARS[liar]
    logits, target = Case("own", shape).tensors(dtype, "cpu")
    compare_with_float64 = Check(Workload(logits * 0.1, target), Options())
    compare_with_float64(lie(0.0))
    with pytest.raises(WrongResult, match="off float64's"):
        compare_with_float64(lie(limits[dtype]))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(70_000, 3), (2000, 2000)], ids=str)
def test_check_of_many_rows_believes_who_is_right(shape, dtype):
    """Neither does a gradient that is scaled up overflow, nor one that is small vanish."""
    check = Check(Workload(*Case("own", shape).tensors(dtype, "cpu")), Options())
    check(fused_xent.cross_entropy)


PENALTY = Options(lse_square_scale=0.1, softcap=2.0)


@pytest.mark.parametrize(
    "case",
    [
        Case("rows", (24, 50), options=Options(ignored=0.3, label_smoothing=0.1)),
        Case("penalty", (24, 50), options=replace(PENALTY, ignored=0.3)),
        Case("strided", (24, 50, 3), options=replace(PENALTY, ignored=0.3)),
        Case("soft", (24, 50), soft=True, options=replace(PENALTY, label_smoothing=0.1)),
        Case("soft and strided", (24, 50, 3), soft=True, options=PENALTY),
    ],
    ids=lambda case: case.name,
)
def test_check_by_chunks_is_the_same(case, monkeypatch):
    """And what it holds for right is what this package computes."""
    workload = Workload(*case.tensors(torch.float32, "cpu"))
    whole = Check(workload, case.options)
    monkeypatch.setattr("bench.check.CHUNK", 350 * workload.logits[0, 0].numel())
    chunked = Check(workload, case.options)
    assert len(chunked.chunks) == 4
    assert chunked.loss == pytest.approx(whole.loss, rel=1e-14)
    one = torch_eager_of(case)
    assert chunked(one) == pytest.approx(whole(one), rel=1e-6)
    ours = providers.ours(Request(case, "float32", "cpu"))[0].loss
    assert chunked(ours) == pytest.approx(whole(ours), rel=1e-6)


def test_a_row_longer_than_a_chunk_is_a_chunk(monkeypatch):
    workload = Workload(*Case("own", (3, 50)).tensors(torch.float32, "cpu"))
    monkeypatch.setattr("bench.check.CHUNK", 49)
    assert len(Check(workload, Options()).chunks) == 3


def test_of_nothing_nothing_may_be_wrong():
    nan, inf = float("nan"), float("inf")
    assert [relative(*pair) for pair in ((0, 0), (1, 0), (1, 4))] == [0, inf, 0.25]
    for errors, squares, expected in (
        ([0, 0], [0, 4], 0),
        ([1, 0], [0, 4], inf),
        ([nan, 0], [4, 4], inf),
        ([nan, 0], [0, 4], inf),
        ([1, 0], [4, 4], 0.5),
    ):
        assert worst(torch.tensor(errors), torch.tensor(squares)) == expected


def torch_eager_of(case):
    return providers.torch_eager(Request(case, "float32", "cpu"))[0].loss


class LinearLiar(torch.autograd.Function):
    """Of right results, each times a factor: of the loss, grad_hidden and grad_weight."""

    @staticmethod
    def forward(ctx, hidden, linear_weight, target, factors):
        leaves = [x.detach().float().requires_grad_() for x in (hidden, linear_weight)]
        with torch.enable_grad():
            value = F.cross_entropy(F.linear(*leaves), target)
            gradients = torch.autograd.grad(value, leaves)
        ctx.gradients = [
            (gradient * factor).to(hidden.dtype)
            for gradient, factor in zip(gradients, factors[1:], strict=True)
        ]
        return (value.detach() * factors[0]).to(hidden.dtype)

    @staticmethod
    def backward(ctx, upstream):
        return *ctx.gradients, None, None


def linear_liar(*factors):
    return lambda *inputs: LinearLiar.apply(*inputs, factors)


NAN = float("nan")
LINEAR_LIMIT = {torch.float32: 1.5e-4, torch.bfloat16: 4.5e-2, torch.float16: 1.5e-2}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("chunk", [1 << 25, 300], ids=["whole", "chunks"])
def test_check_of_a_linear_layer(dtype, chunk, monkeypatch):
    """A right provider passes; one that is slightly off in loss or gradient fails."""
    monkeypatch.setattr(linear, "CHUNK", chunk)
    workload = linear.Workload((24, 16, 50), dtype, "cpu")
    errors = workload.check(linear_liar(1, 1, 1))
    assert set(errors) == {"grad_hidden", "grad_weight"}
    assert all(0 < error < 1e-2 for error in errors.values())
    limit = LINEAR_LIMIT[dtype]
    for i, name in enumerate(("loss", "grad_hidden", "grad_weight")):
        for factor in (1 + limit, 1 - limit, NAN):
            factors = [1.0, 1.0, 1.0]
            factors[i] = factor
            with pytest.raises(WrongResult, match=f"{name} is"):
                workload.check(linear_liar(*factors))
    workload.negate()
    workload.check(linear_liar(1, 1, 1))


def remembering_linear():
    """A loss of a linear layer that is computed once; its gradients each time."""
    known = []

    def loss(*inputs):
        value = fused_xent.linear_cross_entropy(*inputs)
        known.append(value.detach())
        return value - value.detach() + known[0]

    return loss


def empties_linear_target(hidden, linear_weight, target):
    value = fused_xent.linear_cross_entropy(hidden, linear_weight, target)
    target.zero_()
    return value


def at_calls(calls, change):
    """A loss of a linear layer that is wrong when it is called for the n-th time, n of `calls`."""
    n_calls = 0

    def loss(*inputs):
        nonlocal n_calls
        n_calls += 1
        return (change if n_calls in calls else linear.unfused)(*inputs)

    return loss


def assert_only_its_reason_is_said(name, reason, printed):
    """A provider that is left out has no figures, though some of it was timed."""
    lines = [line for line in printed.splitlines() if name in line]
    assert [reason in line for line in lines if f"- {name}: " in line] == [True]
    assert not [line for line in lines if line.split()[:1] == [name] and line.split()[1] != "-"]


@pytest.mark.parametrize(
    ("liar", "status", "reason"),
    [
        (remembering_linear(), 1, "off float64's"),
        (empties_linear_target, 1, "target has been written to"),
        (at_calls([5], linear_liar(1.1, 1, 1)), 1, "loss is"),
        (at_calls([4], lambda *_: breaks()), 0, "no such kernel"),
        (at_calls([5], lambda *_: breaks()), 0, "no such kernel"),
    ],
    ids=["remembers", "writes to its target", "wrong later", "breaks once", "breaks later"],
)
def test_linear_provider_that_is_found_out_later_is_left_out(
    liar, status, reason, monkeypatch, capsys
):
    """And does no harm to those who come after it."""
    adapters = {"liar": lambda device: [("liar", liar)], "fused_xent": linear.ours}
    monkeypatch.setattr(linear, "ADAPTERS", adapters)
    assert bench.main(["linear", *SMALL_LINEAR, "--dtype", "float32"]) == status
    printed = capsys.readouterr()
    assert_only_its_reason_is_said("liar", reason, printed.out)
    assert ("FAILED" in printed.err) == (status == 1)
    (line,) = [line for line in printed.out.splitlines() if line.startswith("  fused_xent ")]
    assert "e-0" in line  # its error: it was measured


def wrong_linear_loss(hidden, linear_weight, target):
    return fused_xent.linear_cross_entropy(hidden, linear_weight, target) * 1.1


def wrong_linear_gradient(hidden, linear_weight, target):
    half = fused_xent.linear_cross_entropy(hidden, linear_weight.detach(), target)
    value = fused_xent.linear_cross_entropy(hidden, linear_weight, target)
    return value + 0.1 * (half - half.detach())


def wrong_linear_weight(hidden, linear_weight, target):
    half = fused_xent.linear_cross_entropy(hidden.detach(), linear_weight, target)
    value = fused_xent.linear_cross_entropy(hidden, linear_weight, target)
    return value + 0.1 * (half - half.detach())


def breaks(*arguments):
    raise RuntimeError("no such kernel\nand more")


def has_no_memory(*arguments):
    raise torch.OutOfMemoryError("of 3 GiB")


@pytest.mark.parametrize(
    ("liar", "status"),
    [
        (wrong_linear_loss, 1),
        (wrong_linear_gradient, 1),
        (wrong_linear_weight, 1),
        (breaks, 0),
        (has_no_memory, 0),
    ],
)
def test_linear_providers_that_are_wrong_are_not_timed(liar, status, monkeypatch, capsys):
    monkeypatch.setitem(linear.ADAPTERS, "liar", lambda device: [("liar", liar)])
    assert bench.main(["linear", *SMALL_LINEAR, "--dtype", "float32"]) == status
    check_what_is_said_of(liar, status, capsys.readouterr())


@pytest.mark.parametrize(
    ("liar", "status"), [(LIARS["loss"], 1), (breaks, 0), (has_no_memory, 0)], ids=str
)
def test_providers_that_are_wrong_are_not_timed(liar, status, monkeypatch, capsys):
    monkeypatch.setitem(ADAPTERS, "liar", lambda request: [Provider("liar", liar)])
    own = [*FEW, "--provider", "liar", "--provider", "fused_xent", "--rows", "24", "--vocab", "50"]
    assert bench.main([*own, "--dtype", "float32"]) == status
    check_what_is_said_of(liar, status, capsys.readouterr())


def check_what_is_said_of(liar, status, printed):
    assert ("FAILED" in printed.err) == (status == 1)
    lines = [line for line in printed.out.splitlines() if "liar" in line]
    reasons = {breaks: "RuntimeError: no such kernel", has_no_memory: "out of memory"}
    assert any(reasons.get(liar, "off float64's") in line for line in lines)
    assert not any(character.isdigit() for line in lines[:-1] for character in line)
    assert "fused_xent" in printed.out


def later(change, calls):
    """A loss that is right until it has been called so often."""
    n_calls = 0

    def loss(logits, target):
        nonlocal n_calls
        n_calls += 1
        if n_calls > calls:
            return change(logits, target)
        return F.cross_entropy(logits, target)

    return loss


def breaks_once(call):
    """A loss that raises at its n-th call alone."""
    n_calls = 0

    def loss(logits, target):
        nonlocal n_calls
        n_calls += 1
        return breaks() if n_calls == call else F.cross_entropy(logits, target)

    return loss


def remembering():
    """A loss that is computed once; its gradient each time."""
    known = {}

    def loss(logits, target):
        value = F.cross_entropy(logits, target)
        return value - value.detach() + known.setdefault(logits.requires_grad, value.detach())

    return loss


def empties_target(logits, target):
    value = with_gradient(lambda gradient, target: gradient)(logits, target)
    target.zero_()
    return value


def empties_target_and_breaks(logits, target):
    target.zero_()
    raise RuntimeError("no such kernel")


def has_no_memory_now(logits, target):
    raise torch.OutOfMemoryError("of 3 GiB")


@pytest.mark.parametrize(
    ("liar", "status", "reason"),
    [
        (later(LIARS["loss"], 6), 1, "loss without grad is"),
        (remembering(), 1, "off float64's"),
        (empties_target, 1, "target has been written to"),
        (later(empties_target_and_breaks, 4), 0, "no such kernel"),
        (later(has_no_memory_now, 5), 0, "out of memory"),
        (later(breaks, 5), 0, "no such kernel"),
        (breaks_once(6), 0, "no such kernel"),
    ],
    ids=[
        "wrong later",
        "remembers",
        "writes to its target",
        "and breaks",
        "no memory later",
        "breaks later",
        "breaks once",
    ],
)
def test_who_is_found_out_later_is_left_out(liar, status, reason, monkeypatch, capsys):
    """And does no harm to those who come after it."""
    own = {"liar": lambda request: [Provider("liar", liar)], "fused_xent": providers.ours}
    monkeypatch.setattr(loss, "ADAPTERS", own)
    cases = [*FEW, "--rows", "24", "--vocab", "50", "--dtype", "float32"]
    assert bench.main([*cases]) == status
    printed = capsys.readouterr()
    assert_only_its_reason_is_said("liar", reason, printed.out)
    assert "fused_xent fused" in printed.out
    assert ("FAILED" in printed.err) == (status == 1)


@pytest.mark.parametrize("wrong", ["float32", "bfloat16"])
def test_one_failure_of_several_cases_decides_the_status(wrong, monkeypatch, capsys):
    def only_in(logits, target):
        factor = 1.1 if str(logits.dtype) == f"torch.{wrong}" else 1.0
        return factor * F.cross_entropy(logits, target)

    monkeypatch.setitem(ADAPTERS, "liar", lambda request: [Provider("liar", only_in)])
    own = [*FEW, "--provider", "liar", "--rows", "24", "--vocab", "50"]
    assert bench.main([*own, "--dtype", "float32", "--dtype", "bfloat16"]) == 1
    assert capsys.readouterr().err.count("FAILED") == 1


def test_what_is_in_brackets_is_printed(monkeypatch, capsys):
    def breaks_in_brackets(*arguments):
        raise RuntimeError("kernel [invalid argument] at x[i] [/red]")

    monkeypatch.setitem(ADAPTERS, "[/x]", lambda request: [Provider("[/x]", breaks_in_brackets)])
    own = [*FEW, "--provider", "[/x]", "--rows", "24", "--vocab", "50"]
    assert bench.main([*own, "--dtype", "float32"]) == 0
    assert "[/x]: RuntimeError: kernel [invalid argument] at x[i] [/red]" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["fused_xent", "fused_xent inplace", "fused_xent fused"])
def test_what_this_package_raises_is_a_failure(name, monkeypatch, capsys):
    monkeypatch.setitem(ADAPTERS, "fused_xent", lambda request: [Provider(name, breaks)])
    assert bench.main([*SMALL, "--dtype", "float32"]) == 1
    assert "FAILED" in capsys.readouterr().err


def module(monkeypatch, name, **contents):
    """Puts a module there for this test."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(parts[i - 1]))
    for key, value in contents.items():
        setattr(sys.modules[name], key, value)


class FlashAttentionLoss:
    """The signature of flash-attention's module."""

    def __init__(
        self, ignore_index=-100, label_smoothing=0.0, lse_square_scale=0.0, inplace_backward=False
    ):
        self.options = Options(label_smoothing, 0.0, lse_square_scale)

    def __call__(self, input, target):
        return torch_loss(input, target, self.options)


class ApexLoss:
    """The signature of apex's function."""

    @staticmethod
    def apply(logits, labels, smoothing, padding_idx, half_to_float):
        assert padding_idx == -100
        return F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")


def liger_cross_entropy(input, target, label_smoothing=0.0, lse_square_scale=0.0, softcap=None):
    return torch_loss(input, target, Options(label_smoothing, 0.0, lse_square_scale, softcap or 0))


def quack_cross_entropy(x, target, ignore_index=-100, reduction="mean", inplace_backward=False):
    return F.cross_entropy(x, target, ignore_index=ignore_index, reduction=reduction)


def parallel_cross_entropy(inp, target, label_smoothing=0.0, reduce_loss=False):
    assert inp.ndim == 3
    assert reduce_loss
    return F.cross_entropy(inp[0], target[0], label_smoothing=label_smoothing)


PEERS = {  # the name, a module as the adapter wants it, and what the peer can do
    "liger-kernel": (
        "liger_kernel.transformers.functional",
        {"liger_cross_entropy": liger_cross_entropy},
        {"ignored", "label_smoothing", "lse_square_scale", "softcap"},
    ),
    "quack-kernels": (
        "quack.cross_entropy",
        {"cross_entropy": quack_cross_entropy},
        {"ignored"},
    ),
    "flash-attn": (
        "flash_attn.losses.cross_entropy",
        {"CrossEntropyLoss": FlashAttentionLoss},
        {"ignored", "label_smoothing", "lse_square_scale"},
    ),
    "apex": (
        "apex.contrib.xentropy",
        {"SoftmaxCrossEntropyLoss": ApexLoss},
        {"label_smoothing"},
    ),
    "transformer-engine": (
        "transformer_engine.pytorch.cross_entropy",
        {"parallel_cross_entropy": parallel_cross_entropy},
        {"ignored", "label_smoothing"},
    ),
}


@pytest.mark.parametrize("peer", PEERS)
def test_adapters_of_peers(peer, monkeypatch):
    """Each asks its peer for what the case wants, of stand-ins that have the peers' signatures."""
    name, contents, known = PEERS[peer]
    values = {"ignored": 0.4, "label_smoothing": 0.1, "lse_square_scale": 0.1, "softcap": 2.0}
    plain = Case("own", (24, 50))
    with pytest.raises(ModuleNotFoundError):
        ADAPTERS[peer](Request(plain, "float32", "cuda"))
    module(monkeypatch, name, **contents)
    for option, value in values.items():
        case = Case("own", (24, 50), options=Options(**{option: value}))
        request = Request(case, "float32", "cuda")
        if option not in known:
            with pytest.raises(Unsupported, match=f"has no {option}"):
                ADAPTERS[peer](request)
            continue
        check = Check(Workload(*case.tensors(torch.float32, "cpu")), case.options)
        for provider in ADAPTERS[peer](request):
            check(provider.loss)
    for case, reason in (
        (Case("own", (24, 50), soft=True), "takes no soft labels"),
        (Case("own", (2, 24, 5, 5)), "takes logits"),
    ):
        with pytest.raises(Unsupported, match=reason):
            ADAPTERS[peer](Request(case, "float32", "cuda"))


def test_who_is_not_there_is_said_and_why(monkeypatch):
    module(monkeypatch, "liger_kernel.transformers.functional")  # of a version without it
    request = Request(Case("own", (24, 50)), "float32", "cuda")
    found, absent = gather(ADAPTERS, request, ["fused_xent", "liger-kernel", "apex"])
    assert next(one.name for one in found) == "fused_xent"
    assert absent["apex"] == "not installed: no module apex"
    assert absent["liger-kernel"].startswith("does not load: ImportError: cannot import name")
    _, absent = gather(ADAPTERS, Request(Case("own", (24, 50)), "float32", "cpu"), ["apex"])
    assert absent == {"apex": "needs a GPU"}


def recorded(calls, function=F.cross_entropy):
    """A stand-in for a loss that keeps the options of its calls."""

    def loss(*inputs, **options):
        calls.append(options)
        return function(*inputs[:2])

    return loss


WANTED = Options(label_smoothing=0.1, ignored=0.4, lse_square_scale=0.2, softcap=3.0)


def test_what_is_asked_of_this_package(monkeypatch):
    """The options of the case, and of each form that is measured the one that makes it so."""
    calls = []
    monkeypatch.setattr(fused_xent, "cross_entropy", recorded(calls))
    found = providers.ours(Request(Case("own", (24, 50), options=WANTED), "float32", "cpu"))
    for provider in found:
        provider.loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    common = {"label_smoothing": 0.1, "lse_square_scale": 0.2, "softcap": 3.0}
    forms = {"": {}, " inplace": {"inplace_backward": True}, " fused": {"grad_in_forward": True}}
    assert [provider.name for provider in found] == [f"fused_xent{form}" for form in forms]
    assert calls == [common | form for form in forms.values()]
    assert [one.fused for one in found] == [False, False, True]
    assert [one.modes for one in found] == [
        ("forward", "backward", "both"),
        ("backward", "both"),
        ("both",),
    ]


def test_torch_compile_compiles_for_each_case(monkeypatch):
    """What it has for the case before is forgotten, and no size is left open."""
    done = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: done.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda loss, **options: done.append(options) or loss)
    case = Case("own", (24, 50), options=WANTED)
    (found,) = providers.torch_compile(Request(case, "float32", "cpu"))
    assert done == ["reset", {"dynamic": False}]
    Check(Workload(*case.tensors(torch.float32, "cpu")), WANTED)(found.loss)
    done.clear()
    ((_, loss),) = linear.torch_compile("cuda")
    assert done == ["reset", {"dynamic": False}]
    assert loss is linear.unfused


@pytest.mark.parametrize("peer", ["quack-kernels", "flash-attn"])
def test_peers_are_measured_in_place_too(peer, monkeypatch):
    name, contents, _ = PEERS[peer]
    calls = []
    ((known, _),) = contents.items()

    def loss_of(**options):  # flash-attention's is a module
        calls.append(options)
        return F.cross_entropy

    module(monkeypatch, name, **{known: loss_of if peer == "flash-attn" else recorded(calls)})
    found = ADAPTERS[peer](Request(Case("own", (24, 50)), "float32", "cuda"))
    for provider in found:
        provider.loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    assert sorted(calls, key=len) == [{}, {"inplace_backward": True}]
    assert [one.name for one in found] == [peer, f"{peer} inplace"]
    assert found[1].modes == ("backward", "both")


def test_transformer_engine_has_no_float16():
    with pytest.raises(Unsupported, match="takes no float16"):
        ADAPTERS["transformer-engine"](Request(Case("own", (24, 50)), "float16", "cuda"))


LINEAR_PEERS = {  # the name, a module as the adapter wants it, its function, the options of calls
    "liger-kernel": (
        "liger_kernel.transformers.functional",
        "liger_fused_linear_cross_entropy",
        {"liger-kernel": {}},
    ),
    "quack-kernels": (
        "quack.linear_cross_entropy",
        "chunked_linear_cross_entropy",
        {"quack-kernels": {}},
    ),
    "cut-cross-entropy": (
        "cut_cross_entropy",
        "linear_cross_entropy",
        {"cut-cross-entropy": {}, "cut-cross-entropy, exact": {"filter_eps": None}},
    ),
}


@pytest.mark.parametrize("peer", LINEAR_PEERS)
def test_adapters_of_linear_peers(peer, monkeypatch):
    name, function, expected = LINEAR_PEERS[peer]
    with pytest.raises(Unsupported, match="needs a GPU"):
        linear.ADAPTERS[peer]("cpu")
    calls = []
    module(monkeypatch, name, **{function: recorded(calls, lambda hidden, weight: weight.sum())})
    found = dict(linear.ADAPTERS[peer]("cuda"))
    for loss_function in found.values():
        loss_function(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2))
    assert dict(zip(found, calls, strict=True)) == expected


def test_linear_providers_of_torch(monkeypatch):
    """Its own chunks are there from 2.13 on."""
    with pytest.raises(Unsupported, match="is eager on a CPU"):
        linear.torch_compile("cpu")
    monkeypatch.setattr(torch.nn, "LinearCrossEntropyOptions", lambda: "chunks", raising=False)
    calls = []
    stand_in = recorded(calls, lambda hidden, weight: weight.sum())
    monkeypatch.setattr(F, "linear_cross_entropy", stand_in, raising=False)
    ((name, loss_function),) = linear.torch_chunked("cpu")
    loss_function(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2))
    assert (name, calls) == ("torch chunked", [{"options": "chunks"}])
    monkeypatch.delattr(F, "linear_cross_entropy")
    with pytest.raises(Unsupported, match=r"needs torch 2\.13"):
        linear.torch_chunked("cpu")


def test_names_choose_among_providers():
    adapters = {"a": lambda _: ["1", "2"], "b": lambda _: ["3"], "c": lambda _: breaks()}
    assert gather(adapters, None, None) == (
        ["1", "2", "3"],
        {"c": "does not load: RuntimeError: no such kernel\nand more"},
    )
    assert gather(adapters, None, ["b", "a"]) == (["1", "2", "3"], {})
    assert gather(adapters, None, ["b"]) == (["3"], {})


def test_float16_has_no_fused_mode():
    found = providers.ours(Request(Case("own", (24, 50)), "float16", "cpu"))
    assert not any(provider.fused for provider in found)
