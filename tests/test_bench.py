"""The benchmark's commands from end to end: printed output, written files, errors."""

import csv
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench
from bench import linear, loss
from bench.cases import SUITES, Case
from bench.results import Run
from bench.timing import Workload

pytestmark = pytest.mark.cpu("runs the benchmark, which has an option for the device")
FEW = ["--device", "cpu", "--rounds", "2"]
TWO = ["--provider", "torch eager", "--provider", "fused_xent"]
SMALL = [*FEW, *TWO, "--rows", "24", "--vocab", "50"]
SMALL_LINEAR = [*FEW, "--rows", "24", "--features", "16", "--vocab", "50"]


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
    """The measured losses and the float64 check use each option."""
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


def test_sweep_roofline_and_their_plots(tmp_path, monkeypatch, capsys):
    """With small cases; the default cases are tested in test_bench_command.py."""
    monkeypatch.setitem(SUITES["cpu"].cases, "llama2", Case("llama2", (24, 3200)))
    monkeypatch.setitem(linear.QUICK["cpu"], "small", (24, 16, 320))
    monkeypatch.setattr("bench.cases.SWEPT_LOGITS", 1 << 14)
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
        (["--json", "/tmp/a", "--csv", "/tmp/../tmp/a"], "--json and --csv must be two files"),
        (["--rows", "100000000", "--vocab", "1000000"], "must fit memory: it needs "),
        (["linear", "gpt9"], "case must be one of llama2, llama3, got 'gpt9'"),
        (["linear", "--rows", "3"], "--rows, --features and --vocab must be given together"),
        (["sweep", "--vocab", "1"], "must be an integer of at least 2, got '1'"),
        (["compare", "/nowhere.json", "/nowhere.json"], "/nowhere.json is not a file"),
        (["compare", __file__, __file__], "is not from python -m bench --json"),
        (["plot", __file__], "is not from python -m bench --json"),
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
    monkeypatch.delitem(sys.modules, "bench.plots", raising=False)
    monkeypatch.delattr("bench.plots", raising=False)
    assert bench.main(["plot", "x.json"]) == 2
    assert "needs matplotlib: pip install '.[bench]'" in capsys.readouterr().err


def test_help_names_every_command(capsys):
    assert bench.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in bench.COMMANDS)


def test_interrupt_prints_partial_results(tmp_path, monkeypatch, capsys):
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
