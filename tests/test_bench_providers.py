"""The check detects providers with wrong results, and they are not timed."""

import gc
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import fused_xent
from bench import __main__ as bench
from bench import linear, loss, providers
from bench.cases import DTYPES, Case, Options
from bench.check import Check, WrongResult, relative, worst
from bench.device import HostClock
from bench.providers import ADAPTERS, Provider, Request
from bench.timing import Workload

pytestmark = pytest.mark.cpu("runs the benchmark, which has an option for the device")
FEW = ["--device", "cpu", "--rounds", "2"]
TWO = ["--provider", "torch eager", "--provider", "fused_xent"]
SMALL = [*FEW, *TWO, "--rows", "24", "--vocab", "50"]
SMALL_LINEAR = [*FEW, "--rows", "24", "--features", "16", "--vocab", "50"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Skip cache flushes and garbage collection, which take most of the time of a run."""
    monkeypatch.setattr(HostClock, "start", HostClock.mark)
    monkeypatch.setattr(gc, "collect", lambda: 0)


def with_gradient(change, factor=1.0):
    """Return a loss that is right times `factor`, and applies `change` to its gradient."""

    class Faulty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits, target):
            leaf = logits.detach().float().requires_grad_()  # small gradients do not underflow
            with torch.enable_grad():
                value = F.cross_entropy(leaf, target)
                (gradient,) = torch.autograd.grad(value, leaf)
            ctx.gradient, ctx.dtype = change(gradient, target), logits.dtype
            return (value.detach() * factor).to(logits.dtype)

        @staticmethod
        def backward(ctx, upstream):
            return (ctx.gradient * upstream).to(ctx.dtype), None

    return Faulty.apply


def times_where(factor, *index, at_targets=True):
    """Return a loss with gradient[index] multiplied by factor, the target entries too or not."""

    def change(gradient, target):
        targets = target.clamp(min=0).unsqueeze(1)
        right = gradient.gather(1, targets)
        gradient[index] *= factor
        return gradient if at_targets else gradient.scatter(1, targets, right)

    return with_gradient(change)


def with_loss(factor):
    """Return a loss that is multiplied by factor, with the right gradient."""
    return with_gradient(lambda gradient, target: gradient, factor)


def times_at_target_of(row, factor):
    def change(gradient, target):
        gradient[row, target[row]] *= factor
        return gradient

    return with_gradient(change)


def garbage_in_ignored_rows(*index):
    """Return a loss whose gradient is not 0 at these classes of ignored rows."""

    def change(gradient, target):
        row = torch.zeros_like(gradient[0])
        row[index] = 1e-7
        gradient[target == -100] = row
        return gradient

    return with_gradient(change)


def alternately(factor):
    """Return a loss with gradient entries too large and too small in turn; their scale is right."""

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


FAULTY_LOSSES = {
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


@pytest.mark.parametrize("faulty", FAULTY_LOSSES)
@pytest.mark.parametrize(
    ("dtype", "chunk"),
    [(torch.float32, 70_000), (torch.bfloat16, 1 << 25), (torch.float16, 250_000)],
)
def test_check_finds_faulty_losses(faulty, dtype, chunk, monkeypatch):
    monkeypatch.setattr("bench.check.CHUNK", chunk)
    case = Case("own", (600, 1000), options=Options(ignored=0.2))
    logits, target = case.tensors(dtype, "cpu")
    logits *= 0.1  # flat: each row and each class is a small part of the gradient
    target[0], target[-1] = 7, 8  # not ignored
    compare_with_float64 = Check(Workload(logits, target), case.options)
    compare_with_float64(F.cross_entropy)
    with pytest.raises(WrongResult, match=r"off float64's|has the shape"):
        compare_with_float64(FAULTY_LOSSES[faulty])


# Errors slightly above the tolerances of the check, which it must find.
LOSS_LIMIT = {torch.float32: 1.5e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}
NORM_LIMIT = {torch.float32: 1.5e-4, torch.bfloat16: 7.5e-2, torch.float16: 1.5e-2}
PART_LIMIT = {torch.float32: 1.5e-2, torch.bfloat16: 3e-1, torch.float16: 1.5e-1}
SCALE_LIMIT = {torch.float32: 1.5e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SLIGHTLY_FAULTY_LOSSES = {  # the loss, its error, a shape for which it exceeds no other tolerance
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


@pytest.mark.parametrize("faulty", SLIGHTLY_FAULTY_LOSSES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_check_finds_small_errors(faulty, dtype, monkeypatch):
    """The check runs in several chunks, only some of which may have the error."""
    monkeypatch.setattr("bench.check.CHUNK", 100_000)
    make_loss, limits, shape = SLIGHTLY_FAULTY_LOSSES[faulty]
    logits, target = Case("own", shape).tensors(dtype, "cpu")
    compare_with_float64 = Check(Workload(logits * 0.1, target), Options())
    compare_with_float64(make_loss(0.0))
    with pytest.raises(WrongResult, match="off float64's"):
        compare_with_float64(make_loss(limits[dtype]))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(70_000, 3), (2000, 2000)], ids=str)
def test_check_accepts_right_results_of_many_rows(shape, dtype):
    """The check scales gradients so that they neither overflow nor underflow."""
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
def test_check_in_chunks_gives_the_same_errors(case, monkeypatch):
    """This package passes with the same errors, too."""
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


def test_relative_errors_of_zero():
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


class FaultyLinear(torch.autograd.Function):
    """Multiplies the right loss, grad_hidden and grad_weight by one factor each."""

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


def faulty_linear(*factors):
    return lambda *inputs: FaultyLinear.apply(*inputs, factors)


NAN = float("nan")
LINEAR_LIMIT = {torch.float32: 1.5e-4, torch.bfloat16: 4.5e-2, torch.float16: 1.5e-2}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("chunk", [1 << 25, 300], ids=["whole", "chunks"])
def test_check_of_a_linear_layer(dtype, chunk, monkeypatch):
    """A right provider passes; one that is slightly off in loss or gradient fails."""
    monkeypatch.setattr(linear, "CHUNK", chunk)
    workload = linear.Workload((24, 16, 50), dtype, "cpu")
    errors = workload.check(faulty_linear(1, 1, 1))
    assert set(errors) == {"grad_hidden", "grad_weight"}
    assert all(0 < error < 1e-2 for error in errors.values())
    limit = LINEAR_LIMIT[dtype]
    for i, name in enumerate(("loss", "grad_hidden", "grad_weight")):
        for factor in (1 + limit, 1 - limit, NAN):
            factors = [1.0, 1.0, 1.0]
            factors[i] = factor
            with pytest.raises(WrongResult, match=f"{name} is"):
                workload.check(faulty_linear(*factors))
    workload.negate()
    workload.check(faulty_linear(1, 1, 1))


def stale_linear():
    """Return a loss that repeats its first value; its gradients are computed in each call."""
    known = []

    def loss(*inputs):
        value = fused_xent.linear_cross_entropy(*inputs)
        known.append(value.detach())
        return value - value.detach() + known[0]

    return loss


def empties_linear_target(hidden, linear_weight, target):
    # In chunks: for few logits at once, autograd raises an error, since its saved target changed.
    value = fused_xent.linear_cross_entropy(hidden, linear_weight, target, chunk_rows=8)
    target.zero_()
    return value


def at_calls(calls, change):
    """Return a loss that is replaced by `change` in the calls with these numbers."""
    n_calls = 0

    def loss(*inputs):
        nonlocal n_calls
        n_calls += 1
        return (change if n_calls in calls else linear.unfused)(*inputs)

    return loss


def assert_reported_without_figures(name, reason, printed):
    """Check that the provider is listed with the reason, and without figures of earlier rounds."""
    lines = [line for line in printed.splitlines() if name in line]
    assert [reason in line for line in lines if f"- {name}: " in line] == [True]
    assert not [line for line in lines if line.split()[:1] == [name] and line.split()[1] != "-"]


@pytest.mark.parametrize(
    ("faulty", "status", "reason"),
    [
        (stale_linear(), 1, "off float64's"),
        (empties_linear_target, 1, "target has been written to"),
        (at_calls([5], faulty_linear(1.1, 1, 1)), 1, "loss is"),
        (at_calls([4], lambda *_: breaks()), 0, "no such kernel"),
        (at_calls([5], lambda *_: breaks()), 0, "no such kernel"),
    ],
    ids=[
        "keeps its first value",
        "writes to its target",
        "wrong later",
        "breaks once",
        "breaks later",
    ],
)
def test_linear_provider_that_fails_later_is_left_out(faulty, status, reason, monkeypatch, capsys):
    """The providers after it are still measured."""
    adapters = {"faulty": lambda device: [("faulty", faulty)], "fused_xent": linear.ours}
    monkeypatch.setattr(linear, "ADAPTERS", adapters)
    assert bench.main(["linear", *SMALL_LINEAR, "--dtype", "float32"]) == status
    printed = capsys.readouterr()
    assert_reported_without_figures("faulty", reason, printed.out)
    assert ("FAILED" in printed.err) == (status == 1)
    (line,) = [line for line in printed.out.splitlines() if line.startswith("  fused_xent ")]
    assert "e-0" in line  # the column of its error


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
    ("faulty", "status"),
    [
        (wrong_linear_loss, 1),
        (wrong_linear_gradient, 1),
        (wrong_linear_weight, 1),
        (breaks, 0),
        (has_no_memory, 0),
    ],
)
def test_wrong_linear_providers_are_not_timed(faulty, status, monkeypatch, capsys):
    monkeypatch.setitem(linear.ADAPTERS, "faulty", lambda device: [("faulty", faulty)])
    assert bench.main(["linear", *SMALL_LINEAR, "--dtype", "float32"]) == status
    check_report_of(faulty, status, capsys.readouterr())


@pytest.mark.parametrize(
    ("faulty", "status"),
    [(FAULTY_LOSSES["loss"], 1), (breaks, 0), (has_no_memory, 0)],
    ids=["wrong", "breaks", "out of memory"],
)
def test_wrong_providers_are_not_timed(faulty, status, monkeypatch, capsys):
    monkeypatch.setitem(ADAPTERS, "faulty", lambda request: [Provider("faulty", faulty)])
    own = [
        *FEW,
        "--provider",
        "faulty",
        "--provider",
        "fused_xent",
        "--rows",
        "24",
        "--vocab",
        "50",
    ]
    assert bench.main([*own, "--dtype", "float32"]) == status
    check_report_of(faulty, status, capsys.readouterr())


def check_report_of(faulty, status, printed):
    assert ("FAILED" in printed.err) == (status == 1)
    lines = [line for line in printed.out.splitlines() if "faulty" in line]
    reasons = {breaks: "RuntimeError: no such kernel", has_no_memory: "out of memory"}
    assert any(reasons.get(faulty, "off float64's") in line for line in lines)
    assert not any(character.isdigit() for line in lines[:-1] for character in line)
    assert "fused_xent" in printed.out


def later(change, calls):
    """Return a loss that is replaced by `change` after this many calls."""
    n_calls = 0

    def loss(logits, target):
        nonlocal n_calls
        n_calls += 1
        if n_calls > calls:
            return change(logits, target)
        return F.cross_entropy(logits, target)

    return loss


def breaks_once(call):
    """Return a loss that raises only in this call."""
    n_calls = 0

    def loss(logits, target):
        nonlocal n_calls
        n_calls += 1
        return breaks() if n_calls == call else F.cross_entropy(logits, target)

    return loss


def stale():
    """Return a loss that repeats its first value; its gradient is computed in each call."""
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
    ("faulty", "status", "reason"),
    [
        (later(FAULTY_LOSSES["loss"], 6), 1, "loss without grad is"),
        (stale(), 1, "off float64's"),
        (empties_target, 1, "target has been written to"),
        (later(empties_target_and_breaks, 4), 0, "no such kernel"),
        (later(has_no_memory_now, 5), 0, "out of memory"),
        (later(breaks, 5), 0, "no such kernel"),
        (breaks_once(6), 0, "no such kernel"),
    ],
    ids=[
        "wrong later",
        "keeps its first value",
        "writes to its target",
        "and breaks",
        "no memory later",
        "breaks later",
        "breaks once",
    ],
)
def test_provider_that_fails_later_is_left_out(faulty, status, reason, monkeypatch, capsys):
    """The providers after it are still measured."""
    own = {"faulty": lambda request: [Provider("faulty", faulty)], "fused_xent": providers.ours}
    monkeypatch.setattr(loss, "ADAPTERS", own)
    cases = [*FEW, "--rows", "24", "--vocab", "50", "--dtype", "float32"]
    assert bench.main([*cases]) == status
    printed = capsys.readouterr()
    assert_reported_without_figures("faulty", reason, printed.out)
    assert "fused_xent fused" in printed.out
    assert ("FAILED" in printed.err) == (status == 1)


@pytest.mark.parametrize("wrong", ["float32", "bfloat16"])
def test_one_failure_of_several_cases_decides_the_status(wrong, monkeypatch, capsys):
    def only_in(logits, target):
        factor = 1.1 if str(logits.dtype) == f"torch.{wrong}" else 1.0
        return factor * F.cross_entropy(logits, target)

    monkeypatch.setitem(ADAPTERS, "faulty", lambda request: [Provider("faulty", only_in)])
    own = [*FEW, "--provider", "faulty", "--rows", "24", "--vocab", "50"]
    assert bench.main([*own, "--dtype", "float32", "--dtype", "bfloat16"]) == 1
    assert capsys.readouterr().err.count("FAILED") == 1


def test_text_in_brackets_is_printed(monkeypatch, capsys):
    def breaks_in_brackets(*arguments):
        raise RuntimeError("kernel [invalid argument] at x[i] [/red]")

    monkeypatch.setitem(ADAPTERS, "[/x]", lambda request: [Provider("[/x]", breaks_in_brackets)])
    own = [*FEW, "--provider", "[/x]", "--rows", "24", "--vocab", "50"]
    assert bench.main([*own, "--dtype", "float32"]) == 0
    assert "[/x]: RuntimeError: kernel [invalid argument] at x[i] [/red]" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["fused_xent", "fused_xent inplace", "fused_xent fused"])
def test_errors_of_this_package_are_failures(name, monkeypatch, capsys):
    monkeypatch.setitem(ADAPTERS, "fused_xent", lambda request: [Provider(name, breaks)])
    assert bench.main([*SMALL, "--dtype", "float32"]) == 1
    assert "FAILED" in capsys.readouterr().err
