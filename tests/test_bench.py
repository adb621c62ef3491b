"""The benchmark: what it measures is checked, what it counts is right, what it is told as well."""

import csv
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fused_xent
from bench import __main__ as bench
from bench import compare, linear, loss, plots, providers, readme, roofline, tables
from bench.cases import Case, Options, bytes_moved, operations, sweep
from bench.check import Check, WrongResult, torch_loss
from bench.device import HostClock, PeakMemory, is_out_of_memory, limited_memory
from bench.providers import ADAPTERS, Provider, Request, Unsupported, gather
from bench.results import Result, Run, Timing, environment
from bench.timing import Workload, interleave

pytestmark = pytest.mark.cpu("runs the benchmark, which has an option for the device")
FEW = ["--device", "cpu", "--rounds", "2"]
TWO = ["--provider", "torch eager", "--provider", "fused_xent"]
SMALL = [*FEW, *TWO, "--rows", "24", "--vocab", "50"]
SMALL_LINEAR = [*FEW, "--rows", "24", "--features", "16", "--vocab", "50"]


# ---- commands -------------------------------------------------------------------------------


def test_loss(tmp_path, capsys):
    files = [tmp_path / "loss.json", tmp_path / "loss.csv"]
    outputs = ["--json", str(files[0]), "--csv", str(files[1])]
    dtypes = ["--dtype", "float32", "--dtype", "bfloat16"]
    assert bench.main(["loss", *SMALL, *dtypes, *outputs]) == 0
    printed = capsys.readouterr().out
    run = Run.read_json(files[0])
    assert [result.dtype for result in run.results] == ["float32", "bfloat16"]
    for result in run.results:
        assert result.title in printed
        found = {(timing.mode, timing.provider): timing for timing in result.timings}
        ours = ["fused_xent", "fused_xent inplace", "fused_xent fused"]
        assert {name for mode, name in found if mode == "both"} == {"torch eager", *ours}
        assert all(len(timing.seconds) == 2 for timing in found.values())
        assert set(result.errors) == {"torch eager", *ours}
        size = 4 if result.dtype == "float32" else 2
        assert found["both", "fused_xent"].bytes == 3 * 24 * 50 * size + 2 * 24 * 8
        assert found["both", "fused_xent fused"].bytes == 2 * 24 * 50 * size + 24 * 8
        assert found["backward", "fused_xent"].bytes == found["copy", "torch"].bytes + 24 * 8
    rows = list(csv.DictReader(files[1].read_text().splitlines()))
    assert len(rows) == sum(len(result.timings) for result in run.results)
    first = run.results[0].timings[0]
    assert float(rows[0]["bytes_per_s"]) == pytest.approx(first.bytes / first.median)
    ours = next(row for row in rows if (row["mode"], row["provider"]) == ("both", "fused_xent"))
    copy, eager, timing = (
        run.results[0].find(*key)
        for key in (("copy", "torch"), ("both", "torch eager"), ("both", "fused_xent"))
    )
    assert float(ours["share_of_copy"]) == pytest.approx(timing.bandwidth / copy.bandwidth)
    assert float(ours["times_faster_than_eager"]) == pytest.approx(eager.median / timing.median)
    assert json.loads(files[0].read_text())["environment"]["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    "options",
    [
        ["--soft"],
        ["--ignored", "0.5", "--label-smoothing", "0.1"],
        ["--softcap", "5", "--lse-square-scale", "0.01"],
    ],
)
def test_options_of_the_loss(options, capsys):
    """Each is in what is measured, and in float64's."""
    assert bench.main([*SMALL, *options, "--mode", "both", "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    assert options[0][2:].split("-")[0] in printed
    assert "fused_xent fused" in printed


def test_linear(tmp_path, capsys):
    path = tmp_path / "linear.json"
    dtypes = ["--dtype", "float32", "--dtype", "bfloat16"]
    assert bench.main(["linear", *SMALL_LINEAR, *dtypes, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    for result in Run.read_json(path).results:
        names = [timing.provider for timing in result.timings]
        assert names[0] == linear.BARE
        assert names[-1] == "fused_xent"
        assert all(name in printed for name in names)
        assert all(timing.operations == 6 * 24 * 16 * 50 for timing in result.timings)
        size = 4 if result.dtype == "float32" else 2
        traffic = 2 * size * 16 * (24 + 50) + 24 * 8
        assert all(timing.bytes == traffic for timing in result.timings)
        for errors in result.errors.values():
            assert all(0 < error < 1e-2 for error in errors.values())
        assert result.absent["liger-kernel"] == "needs a GPU"


def test_sweep_roofline_and_their_plots(tmp_path, capsys):
    swept, roof = tmp_path / "swept.json", tmp_path / "roof.json"
    quick = [*FEW, *TWO, "--dtype", "float32", "--quick"]
    assert bench.main(["sweep", *quick, "--vocab", "100", "300", "--json", str(swept)]) == 0
    assert bench.main(["roofline", *quick, "--json", str(roof)]) == 0
    assert "of roof" in capsys.readouterr().out
    assert bench.main(["plot", str(swept), str(roof)]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    names = {path.name for path in written}
    for kind in ("throughput-float32", "memory-float32", "roofline-float32"):
        assert {f"swept-{kind}.png", f"swept-{kind}.svg"} <= names
    for path in written:
        begin = path.read_bytes()[:100]
        assert begin.startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
    svg = (tmp_path / "swept-throughput-float32.svg").read_text()
    assert all(f"<!-- {name} -->" in svg for name in ("one copy", "fused_xent", "torch eager"))


def test_quick_run_has_few_cases():
    options = types.SimpleNamespace(case=[], rows=None, vocab=None, quick=True, device="cpu")
    options.soft, options.ignored, options.label_smoothing = False, 0.0, 0.0
    options.lse_square_scale = options.softcap = 0.0
    assert [case.name for case in loss.chosen_cases(None, options)] == ["llama3", "imagenet"]


def test_markdown(capsys):
    assert bench.main([*SMALL, "--markdown", "--mode", "both", "--dtype", "float32"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("| forward + backward | one copy | torch eager | fused_xent |")
    assert {line.count("|") for line in table if line.startswith("|")} == {table[0].count("|")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["loss", "gpt9"], "case must be one of gpt2, llama2"),
        (["gpt9"], "got 'gpt9'"),
        (["--rows", "3"], "--rows and --vocab must be given together"),
        (["--rounds", "0"], "must be an integer of at least 1, got '0'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--provider", "nobody"], "invalid choice: 'nobody'"),
        (["--ignored", "2"], "must be a number from 0 to 0.999, got '2'"),
        (["--softcap", "nan"], "got 'nan'"),
        (["--soft", "--ignored", "0.5", "gpt2"], "--ignored must come with class indices"),
        (["--json", "/nowhere/x.json"], "--json must be a file that can be written"),
        (["--csv", "/"], "--csv must be a file that can be written"),
        (["--json", "x" * 300], "--json must be a file that can be written"),
        (["--json", "/tmp/a", "--csv", "/tmp/a"], "--json and --csv must be two files"),
        (["--rows", "100000000", "--vocab", "1000000"], "must fit memory: it needs "),
        (["linear", "gpt9"], "case must be one of llama2, llama3, got 'gpt9'"),
        (["linear", "--rows", "3"], "--rows, --features and --vocab must be given together"),
        (["sweep", "--vocab", "1"], "must be an integer of at least 2, got '1'"),
        (["compare", "/nowhere.json", "/nowhere.json"], "/nowhere.json is no file"),
        (["compare", __file__, __file__], "is no file of python -m bench --json"),
        (["plot", __file__], "is no file of python -m bench --json"),
    ],
)
def test_errors(arguments, message, capsys):
    if arguments[0] not in ("compare", "plot"):
        arguments = [*arguments, "--device", "cpu"]
    with pytest.raises(SystemExit) as error:
        bench.main(arguments)
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_missing_package(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "bench.plots")
    monkeypatch.delattr("bench.plots")
    assert bench.main(["plot", "x.json"]) == 2
    assert "needs matplotlib: pip install '.[bench]'" in capsys.readouterr().err


def test_help_names_every_command(capsys):
    assert bench.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in bench.COMMANDS)


def test_interrupt_prints_what_there_is(tmp_path, monkeypatch, capsys):
    path, rounds = tmp_path / "x.json", 0
    known = Workload.baselines

    def interrupted(workload):
        nonlocal rounds
        rounds += 1
        if rounds == 4:  # the second round of the second case
            raise KeyboardInterrupt
        return known(workload)

    monkeypatch.setattr(Workload, "baselines", interrupted)
    dtypes = ["--dtype", "float32", "--dtype", "bfloat16", "--dtype", "float16"]
    assert bench.main([*SMALL, *dtypes, "--json", str(path)]) == 130
    assert capsys.readouterr().out.count("24x50") == 2
    first, second = Run.read_json(path).results
    assert {len(timing.seconds) for timing in first.timings} == {2}
    assert {len(timing.seconds) for timing in second.timings} == {1}


# ---- whether providers tell the truth -------------------------------------------------------


def with_gradient(change):
    """The right loss, whose gradient `change` is given with the target."""

    class Liar(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits, target):
            leaf = logits.detach().clone().requires_grad_()
            with torch.enable_grad():
                value = F.cross_entropy(leaf, target)
                (gradient,) = torch.autograd.grad(value, leaf)
            ctx.gradient = change(gradient, target)
            return value.detach()

        @staticmethod
        def backward(ctx, upstream):
            return ctx.gradient * upstream, None

    return Liar.apply


def times_where(factor, *index, at_targets=True):
    """Multiplies a part of the gradient, the targets' entries in it or not."""

    def change(gradient, target):
        targets = target.clamp(min=0).unsqueeze(1)
        right = gradient.gather(1, targets)
        gradient[index] *= factor
        return gradient if at_targets else gradient.scatter(1, targets, right)

    return with_gradient(change)


def nothing_at_one_target(gradient, target):
    gradient[0, target[0]] = 0
    return gradient


def garbage_in_ignored_rows(gradient, target):
    gradient[target == -100] = 1e-7
    return gradient


def wrong_without_gradient(logits, target):
    value = F.cross_entropy(logits, target)
    return value if torch.is_grad_enabled() else 1.1 * value


LIARS = {
    "loss": lambda *arguments: 1.1 * F.cross_entropy(*arguments),
    "loss without a gradient": wrong_without_gradient,
    "not a number": lambda *arguments: F.cross_entropy(*arguments) * float("nan"),
    "shape": lambda *arguments: F.cross_entropy(*arguments).view(1, 1),
    "rows that are ignored": lambda x, target: F.cross_entropy(x, target.clamp(min=0)),
    "gradient": times_where(1.1),
    "no gradient": times_where(0.0),
    "a class": times_where(0.0, slice(None), 3, at_targets=False),
    "the last class": times_where(2.0, slice(None), -1),
    "a row": times_where(0.0, 0, at_targets=False),
    "the last row": times_where(-1.0, -1),
    "scale": times_where(1.04, at_targets=False),
    "the target of a row": with_gradient(nothing_at_one_target),
    "ignored rows' gradient": with_gradient(garbage_in_ignored_rows),
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


def test_check_by_chunks_is_the_same(monkeypatch):
    case = Case("own", (24, 50), options=Options(ignored=0.3, label_smoothing=0.1))
    workload = Workload(*case.tensors(torch.float32, "cpu"))
    whole = Check(workload, case.options)
    monkeypatch.setattr("bench.check.CHUNK", 350)
    chunked = Check(workload, case.options)
    assert len(chunked.chunks) == 4
    assert chunked.loss == pytest.approx(whole.loss, rel=1e-14)
    one = torch_eager_of(case)
    assert chunked(one) == pytest.approx(whole(one), rel=1e-6)


def torch_eager_of(case):
    return providers.torch_eager(Request(case, "float32", "cpu"))[0].loss


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


def remembering():
    """A loss that computes once."""
    known = {}

    def loss(logits, target):
        if logits.requires_grad not in known:
            known[logits.requires_grad] = F.cross_entropy(logits, target).detach()
        return F.cross_entropy(logits, target) * 0 + known[logits.requires_grad]

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
    ],
    ids=[
        "wrong later",
        "remembers",
        "writes to its target",
        "and breaks",
        "no memory later",
        "breaks later",
    ],
)
def test_who_is_found_out_later_is_left_out(liar, status, reason, monkeypatch, capsys):
    """And does no harm to those who come after it."""
    own = {"liar": lambda request: [Provider("liar", liar)], "fused_xent": providers.ours}
    monkeypatch.setattr(loss, "ADAPTERS", own)
    cases = [*FEW, "--rows", "24", "--vocab", "50", "--dtype", "float32"]
    assert bench.main([*cases]) == status
    printed = capsys.readouterr()
    (line,) = [line for line in printed.out.splitlines() if "- liar: " in line]
    assert reason in line
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


def test_what_this_package_raises_is_a_failure(monkeypatch, capsys):
    monkeypatch.setitem(ADAPTERS, "fused_xent", lambda request: [Provider("fused_xent", breaks)])
    assert bench.main([*SMALL, "--dtype", "float32"]) == 1
    assert "FAILED" in capsys.readouterr().err


# ---- adapters -------------------------------------------------------------------------------


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


def test_float16_has_no_fused_mode():
    found = providers.ours(Request(Case("own", (24, 50)), "float16", "cpu"))
    assert not any(provider.fused for provider in found)


# ---- arithmetic -----------------------------------------------------------------------------


def test_bytes_and_operations():
    logits, target = Case("own", (10, 100)).tensors(torch.bfloat16, "cpu")
    n, t = 10 * 100 * 2, 10 * 8
    assert bytes_moved(logits, target, "read") == n
    assert bytes_moved(logits, target, "copy") == 2 * n
    assert bytes_moved(logits, target, "forward") == n + t
    assert bytes_moved(logits, target, "backward") == 2 * n + t
    assert bytes_moved(logits, target, "both") == 3 * n + 2 * t
    assert bytes_moved(logits, target, "both", fused=True) == 2 * n + t
    assert operations(logits, target, "both") == 7 * 1000
    assert operations(logits, target, "copy") == 0
    soft = torch.rand(10, 100, dtype=torch.bfloat16)
    assert bytes_moved(logits, soft, "both", fused=True) == 3 * n
    assert operations(logits, soft, "forward") == 6 * 1000


def test_ignored_rows_are_not_read_and_their_gradient_is_written():
    logits, target = Case("own", (10, 100)).tensors(torch.bfloat16, "cpu")
    target[:4] = -100
    n, t = 10 * 100 * 2, 10 * 8
    assert bytes_moved(logits, target, "forward") == 0.6 * n + t
    assert bytes_moved(logits, target, "backward") == 1.6 * n + t
    assert operations(logits, target, "forward") == 4 * 600


def test_figures_of_a_timing():
    timing = Timing("both", "x", bytes=3_000, operations=600, seconds=[2.0, 1.0, 4.0, 3.0, 5.0])
    assert timing.median == 3
    assert timing.quartiles == (2, 4)
    assert timing.noise == pytest.approx(2 / 3)
    assert timing.bandwidth == 1000
    assert timing.rate == 200
    assert timing.intensity == 0.2
    copy = Timing("copy", "torch", bytes=2_000, operations=0, seconds=[1.0])
    eager = Timing("both", "torch eager", bytes=3_000, operations=600, seconds=[12.0])
    result = Result("loss", "x", (10, 100), "float32", timings=[copy, eager, timing])
    assert result.share(timing, "copy") == 0.5
    assert result.ratio(timing, "torch eager") == 4
    assert result.ratio(timing, "torch.compile") is None
    assert tables.loss_cells(result, timing)[:6] == ("3000.00", "33%", "0.0", "0.0", "50%", "4.0x")


def test_cases_of_a_sweep_have_as_many_logits():
    sizes = [
        case.shape[0] * case.shape[1] for case in sweep([1000, 50257], "cpu", False, Options())
    ]
    assert max(sizes) / min(sizes) < 1.01
    assert {case.shape[0] for case in sweep([1000, 50257], "cuda", False, Options())} == {8192}


def test_ignored_share():
    _, target = Case("own", (10_000, 3), options=Options(ignored=0.9)).tensors(torch.float32, "cpu")
    assert (target == -100).sum() == 9000
    _, target = Case("own", (1, 3), options=Options(ignored=0.999)).tensors(torch.float32, "cpu")
    assert target.item() >= 0


def test_interleaving():
    order = []
    timers = [
        (name, lambda name=name: order.append(name) or {("both", name): 1.0}) for name in "ab"
    ]
    samples = {}
    assert interleave(timers, 3, 0.0, lambda n: None, samples) == {}
    assert order == list("ababab")
    assert samples == {("both", "a"): [1.0] * 3, ("both", "b"): [1.0] * 3}


def test_a_step_is_forward_and_backward():
    workload = types.SimpleNamespace(
        forward=lambda loss: (None, 1.0),
        step=lambda loss: types.SimpleNamespace(forward=2.0, backward=4.0),
    )
    forward, step = Provider("x", None).timers(workload, ["forward", "backward", "both"])
    assert forward() == {("forward", "x"): 1.0}
    assert step() == {("backward", "x"): 4.0, ("both", "x"): 6.0}


def test_logits_are_written_anew_for_each_run():
    workload = Workload(*Case("own", (24, 50)).tensors(torch.float32, "cpu"))
    for run in (workload.step, workload.forward):
        workload.logits.zero_()
        workload.target.zero_()
        run(F.cross_entropy)
        assert torch.equal(workload.logits, workload.original)
        assert torch.equal(workload.target, workload.original_target)


def test_caches_are_emptied():
    timer = HostClock()
    timer._flushed.fill_(1)
    timer.start()
    assert not timer._flushed.any()


def test_bare_products_are_three(monkeypatch):
    workload = linear.Workload((24, 16, 50), torch.float32, "cpu")
    known, n_products = linear.Workload.seconds, 0

    def seconds(workload, run):
        nonlocal n_products
        n_products += 1
        return known(workload, run)

    monkeypatch.setattr(linear.Workload, "seconds", seconds)
    assert workload.bare_seconds() > 0
    assert n_products == 3


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured on Linux alone")
def test_memory_of_a_step_is_more_than_of_its_forward():
    workload = Workload(*Case("own", (4096, 4000)).tensors(torch.float32, "cpu"))
    peaks = workload.peak_bytes(fused_xent.cross_entropy)
    assert peaks["forward"] < 0.1 * workload.logits.nbytes
    assert 0.9 * workload.logits.nbytes < peaks["both"] < 1.2 * workload.logits.nbytes
    assert peaks["backward"] == peaks["both"]


def test_memory_of_a_linear_layer_is_beyond_its_outputs(monkeypatch):
    class Known(PeakMemory):
        def __exit__(self, *_):
            self.bytes = 1_000_000

    monkeypatch.setattr(linear, "PeakMemory", Known)
    workload = linear.Workload((24, 16, 50), torch.float32, "cpu")
    outputs = 4 + 4 * 16 * (24 + 50)
    assert workload.peak_bytes(fused_xent.linear_cross_entropy) == 1_000_000 - outputs


def test_memory_that_a_case_needs():
    """At least logits, original, gradient and eager's float32; and a chunk in float64."""
    options = types.SimpleNamespace()
    n_logits = 1024 * 32000
    assert loss.job(Case("own", (1024, 32000)), "float32", options).bytes_needed > 44 * n_logits
    assert loss.job(Case("own", (8192, 262144)), "float32", options).bytes_needed < 5e10


def test_peak_of_a_processs_memory():
    """Of a new one: what this one has freed before may lie in its heap, where it is used again."""
    script = """
import torch
from bench.device import PeakMemory

with PeakMemory("cpu") as memory:
    torch.ones(64 << 20, dtype=torch.uint8)  # freed at once
    kept = torch.ones(32 << 20, dtype=torch.uint8)
print(memory.bytes)
"""
    command = [sys.executable, "-c", script]
    printed = subprocess.run(command, cwd=readme.ROOT, capture_output=True, text=True, check=True)
    margin = 8 << 20  # the system counts pages by the dozen
    if printed.stdout != "None\n":  # Linux alone measures it
        assert (64 << 20) - margin <= int(printed.stdout) < (64 << 20) + margin


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux says what is free")
def test_memory_is_limited_only_inside():
    huge = 1 << 40
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    there = int(lines["MemTotal"].split()[0]) * 1024
    with limited_memory(), pytest.raises(RuntimeError) as error:
        torch.ones(there, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("of another kind"))
    torch.empty(huge >> 6, dtype=torch.uint8)  # 16 GiB that are never touched


# ---- compare, roofline, readme --------------------------------------------------------------


def run_of(*samples, provider="fused_xent", case="x", copy=(1.0, 1.0, 1.0, 1.0)):
    timings = [
        Timing("copy", "torch", 200, 0, seconds=list(copy)),
        Timing("both", provider, 300, 70, seconds=list(samples)),
    ]
    result = Result("loss", case, (1, 10), "float32", timings=timings)
    return Run(environment("cpu") | {"cpu": "this"}, [result])


QUIET, NOISY = (1.0, 1.001, 0.999, 1.0), (1.0, 0.8, 1.2, 1.0)


@pytest.mark.parametrize(
    ("before", "factor", "verdict"),
    [
        (QUIET, 1.0, ""),
        (QUIET, 1.019, ""),
        (QUIET, 1.03, "slower"),
        (QUIET, 0.97, "faster"),
        (NOISY, 1.15, ""),
        (NOISY, 0.87, ""),
        (NOISY, 1.3, "slower"),
        (NOISY, 0.7, "faster"),
    ],
)
def test_compare(before, factor, verdict, tmp_path, capsys):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    run_of(*before).write_json(files[0])
    run_of(*(factor * seconds for seconds in before)).write_json(files[1])
    assert bench.main(["compare", *map(str, files)]) == (verdict == "slower")
    printed = capsys.readouterr().out
    counts = {name: f"{int(verdict == name)} {name}" for name in ("slower", "faster")}
    assert all(count in printed for count in counts.values())
    assert f"{factor - 1:+.0%}" in printed


@pytest.mark.parametrize("noisy", [0, 1])
def test_noise_of_either_run_counts(noisy, tmp_path):
    runs = [run_of(*QUIET), run_of(*(1.1 * seconds for seconds in QUIET))]
    runs[noisy].results[0].timings[1].seconds = [(1, 1.1)[noisy] * one for one in NOISY]
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for run, file in zip(runs, files, strict=True):
        run.write_json(file)
    assert compare.main([*map(str, files)]) == 0


def test_compare_of_some_providers_and_of_large_differences(tmp_path, capsys):
    before, after = run_of(*QUIET), run_of(*(1.1 * seconds for seconds in QUIET))
    for run, factor in ((before, 1), (after, 1.5)):
        other = Timing("both", "other", 300, 70, seconds=[factor * one for one in QUIET])
        run.results[0].timings.append(other)
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    before.write_json(Path(files[0]))
    after.write_json(Path(files[1]))
    assert compare.main([*files, "--least", "0.2"]) == 1
    assert "2 compared: 1 slower" in capsys.readouterr().out
    assert compare.main([*files, "--least", "0.2", "--provider", "fused_xent"]) == 0
    assert "1 compared: 0 slower" in capsys.readouterr().out


def test_results_of_other_labels_and_options_are_others():
    results = [
        Result("loss", "x", (1, 10), "float32"),
        Result("loss", "x", (1, 10), "float32", labels="soft"),
        Result("loss", "x", (1, 10), "float32", options={"softcap": 2.0}),
        Result("loss", "x", (2, 10), "float32"),
        Result("loss", "x", (1, 10), "bfloat16"),
    ]
    assert len({result.key for result in results}) == len(results)


BROKEN = {
    "no results": lambda run: run.pop("results"),
    "no environment": lambda run: run.update(environment={}),
    "a list of environments": lambda run: run.update(environment=[]),
    "a GPU of which nothing else is known": lambda run: run["environment"].update(gpu="x"),
    "no seconds": lambda run: timing_of(run).update(seconds=[]),
    "seconds of no number": lambda run: timing_of(run).update(seconds=[float("nan"), 1, 1]),
    "infinite seconds": lambda run: timing_of(run).update(seconds=[float("inf")]),
    "negative seconds": lambda run: timing_of(run).update(seconds=[-1, 2, 2, 2]),
    "hardly any seconds": lambda run: timing_of(run).update(seconds=[1e-320]),
    "seconds in words": lambda run: timing_of(run).update(seconds="soon"),
    "an unknown mode": lambda run: timing_of(run).update(mode="sideways"),
    "no provider": lambda run: timing_of(run).update(provider=None),
    "a surrogate": lambda run: timing_of(run).update(provider="\ud800"),
    "bytes in words": lambda run: timing_of(run).update(bytes="many"),
    "peak in words": lambda run: timing_of(run).update(peak_bytes="much"),
    "another field": lambda run: timing_of(run).update(colour="red"),
    "a dtype with a slash": lambda run: run["results"][0].update(dtype="../x"),
    "options in words": lambda run: run["results"][0].update(options={"softcap": "x"}),
    "no options": lambda run: run["results"][0].update(options=None),
    "a shape of one number": lambda run: run["results"][0].update(shape=[10]),
    "a shape in words": lambda run: run["results"][0].update(shape=["a", "b"]),
}


def timing_of(run):
    return run["results"][0]["timings"][1]


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("command", ["compare", "plot"])
def test_broken_files(command, broken, tmp_path, capsys):
    path, good = tmp_path / "a.json", tmp_path / "b.json"
    run = run_of(*QUIET)
    run.environment = environment("cpu")
    run.write_json(good)
    content = json.loads(good.read_text())
    BROKEN[broken](content)
    path.write_text(json.dumps(content))
    files = [str(path), str(good)] if command == "compare" else [str(path)]
    with pytest.raises(SystemExit) as error:
        bench.main([command, *files])
    assert error.value.code == 2
    assert "is no file of python -m bench --json" in capsys.readouterr().err


def test_compare_tells_of_other_machines_and_cases(tmp_path, capsys):
    before, after = run_of(*QUIET), run_of(*QUIET, copy=[2.0] * 4)
    after.environment["cpu"] = "that"
    after.results += run_of(*QUIET, case="y").results
    before.write_json(tmp_path / "a.json")
    after.write_json(tmp_path / "b.json")
    assert bench.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    printed = capsys.readouterr().out
    assert "not the same cpu: this, that" in printed
    assert "the machine's own copy took +100%" in printed
    assert f"fused_xent: 1 timings are missing in {tmp_path / 'a.json'}" in " ".join(
        printed.split()
    )


def test_compare_of_nothing_in_common(tmp_path, capsys):
    run_of(*QUIET).write_json(tmp_path / "a.json")
    run_of(*QUIET, provider="other").write_json(tmp_path / "b.json")
    with pytest.raises(SystemExit) as error:
        compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert error.value.code == 2
    assert "in common" in capsys.readouterr().err


def test_roof():
    products = Timing("step", linear.BARE, 100, 1000, seconds=[0.5])
    run = run_of(*QUIET)
    run.results.append(Result("linear", "x", (1, 2, 3), "float32", timings=[products]))
    roof = roofline.roofs(run)["float32"]
    assert (roof.bandwidth, roof.rate) == (200, 2000)
    assert roof.at(0.1) == pytest.approx(20)
    assert roof.at(1e6) == 2000
    (point,) = roofline.points(run, "float32")
    assert point.label == "forward + backward, fused_xent"
    run.results[0].timings.append(Timing("read", "torch", 300, 0, seconds=[1.0]))
    assert roofline.roofs(run)["float32"].bandwidth == 300


def test_share_of_the_roof_is_printed(capsys):
    run = run_of(*QUIET)  # 70 operations a second, of 200 * 70 / 300
    products = Timing("step", linear.BARE, 100, 1000, seconds=[0.5])
    run.results.append(Result("linear", "x", (1, 2, 3), "float32", timings=[products]))
    roofline.show(run)
    assert "150%" in capsys.readouterr().out


def test_what_is_plotted():
    run = run_of(*QUIET, case="V=10")
    run.results += run_of(*QUIET, case="V=20").results
    run.results[1].shape = (1, 20)
    for result, peak in zip(run.results, (5_000_000, 7_000_000), strict=True):
        result.timings[1].peak_bytes = peak
    figures = dict(plots.against_classes(run))
    lines = {
        name: {line.get_label(): line for line in figure.axes[0].get_lines()}
        for name, figure in figures.items()
    }
    assert list(lines["memory-float32"]["fused_xent"].get_ydata()) == [5, 7]
    assert list(lines["memory-float32"]["the logits"].get_ydata()) == [1e-4, 1e-4]
    throughput = lines["throughput-float32"]
    assert list(throughput["fused_xent"].get_xdata()) == [10, 20]
    assert throughput["fused_xent"].get_ydata()[0] == pytest.approx(300e-9)
    assert throughput["one copy"].get_ydata()[0] == pytest.approx(200e-9)
    for figure in figures.values():
        plots.plt.close(figure)


def test_plots_need_something_to_plot(tmp_path, capsys):
    run_of(*QUIET).write_json(tmp_path / "a.json")
    with pytest.raises(SystemExit) as error:
        plots.main([str(tmp_path / "a.json")])
    assert error.value.code == 2
    assert "a sweep over two numbers of classes" in capsys.readouterr().err


def test_tables_of_the_readme_are_those_of_its_files():
    text = (readme.ROOT / "README.md").read_text()
    tables_found = readme.TABLE.findall(text)
    assert len(tables_found) == text.count("<!-- end -->") > 0
    assert readme.with_tables(text) == text
    row = next(line for line in text.splitlines() if line.startswith("| llama3 "))
    assert readme.with_tables(text.replace(row, "| llama3 | by hand |")) == text
