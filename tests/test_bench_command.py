"""The benchmark's commands with stand-ins for measurements: cases, files, exit status."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_xent
from bench import __main__ as bench
from bench import command, linear, loss, roofline
from bench.cases import SUITES, Case, Options
from bench.command import Job, Parser, at_least, between, measure_all
from bench.device import HostClock
from bench.results import Result, Run, Timing
from bench.timing import Workload

pytestmark = pytest.mark.cpu("runs the benchmark, which has an option for the device")
ROOT = Path(bench.__file__).parents[1]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Skip cache flushes and garbage collection, which take most of the time of a run."""
    monkeypatch.setattr(HostClock, "start", HostClock.mark)
    monkeypatch.setattr(gc, "collect", lambda: 0)


def fine(result, show):
    """Measure a copy and a loss, with samples of 0.1 and 0.2 seconds each."""
    show("timing")
    result.timings.append(Timing("copy", "torch", 200, 0, seconds=[0.1, 0.2]))
    result.timings.append(Timing("both", "fused_xent", 300, 70, seconds=[0.1, 0.2]))


def wrong(result, show):
    fine(result, show)
    result.failures["faulty"] = "loss is 1.0e-01 off float64's"


def no_memory(result, show):
    raise torch.OutOfMemoryError("of 3 GiB")


def interrupted(result, show):
    raise KeyboardInterrupt


def interrupted_halfway(result, show):
    fine(result, show)
    raise KeyboardInterrupt


def named(value):
    """Return the test id of a list of measurements."""
    return (
        "-".join(getattr(one, "__name__", str(one)) for one in value or [])
        if isinstance(value, list)
        else None
    )


def measured(tmp_path, *measures, bytes_needed=0, arguments=()):
    """Run these measurements; return the exit status and the names of the cases in the file."""
    parser = Parser(prog="bench")
    parser.add_common(["fused_xent"])
    path = tmp_path / "run.json"
    options = parser.parse_args(["--device", "cpu", "--json", str(path), *arguments])
    jobs = [
        Job(Result("loss", f"case{i}", (10, 100), "float32"), bytes_needed, measure)
        for i, measure in enumerate(measures)
    ]
    run, status = measure_all(parser, options, jobs)
    cases = [one.case for one in Run.read_json(path).results] if path.exists() else None
    assert cases is None or cases == [one.case for one in run.results]
    return status, cases


@pytest.mark.parametrize(
    ("measures", "status", "cases"),
    [
        ([fine, fine], 0, [0, 1]),
        ([wrong, fine], 1, [0, 1]),
        ([fine, wrong], 1, [0, 1]),
        ([no_memory, fine], 2, [1]),
        ([fine, no_memory], 2, [0]),
        ([no_memory, wrong], 2, [1]),
        ([fine, interrupted, fine], 130, [0]),
        ([fine, interrupted_halfway, fine], 130, [0, 1]),
        ([wrong, interrupted, fine], 130, [0]),
        ([interrupted], 130, None),
        ([no_memory], 2, None),
    ],
    ids=named,
)
def test_exit_status_and_written_cases(measures, status, cases, tmp_path, capsys):
    expected = None if cases is None else [f"case{i}" for i in cases]
    assert measured(tmp_path, *measures) == (status, expected)
    printed = capsys.readouterr()
    assert ("interrupted: these results are partial" in printed.err) == (status == 130)
    assert printed.err.count("must fit memory") == measures.count(no_memory)
    assert printed.err.count("FAILED case") == measures.count(wrong)
    for name in expected or []:
        assert f"{name}  10x100  float32" in printed.out
    assert ("Times are medians." in printed.out) == bool(cases)


def test_files_are_written_after_each_case(tmp_path):
    """A run that is killed loses only the case in progress."""

    def reads_the_file(result, show):
        assert [one.case for one in Run.read_json(tmp_path / "run.json").results] == ["case0"]
        fine(result, show)

    assert measured(tmp_path, fine, reads_the_file) == (0, ["case0", "case1"])


def test_errors_of_the_benchmark_itself_are_raised(tmp_path):
    def breaks(result, show):
        raise RuntimeError("of another kind")

    with pytest.raises(RuntimeError, match="of another kind"):
        measured(tmp_path, breaks, fine)


def test_memory_is_limited_during_measurements(tmp_path, monkeypatch):
    inside = []

    class Limited:
        def __enter__(self):
            inside.append(self)

        def __exit__(self, *_):
            inside.pop()

    def checks_the_limit(result, show):
        assert len(inside) == 1
        fine(result, show)

    monkeypatch.setattr(command, "limited_memory", Limited)
    assert measured(tmp_path, checks_the_limit) == (0, ["case0"])
    assert inside == []


@pytest.mark.parametrize(("free", "fits"), [(4000, True), (3999, False), (None, True)])
def test_cases_too_large_for_memory_are_not_started(free, fits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "free_bytes", lambda device: free)
    if fits:
        assert measured(tmp_path, fine, bytes_needed=4000) == (0, ["case0"])
        return
    with pytest.raises(SystemExit) as error:
        measured(tmp_path, fine, bytes_needed=4000)
    assert error.value.code == 2
    assert not (tmp_path / "run.json").exists()


def test_memory_is_reported_in_gigabytes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "free_bytes", lambda device: 2_500_000_000)
    with pytest.raises(SystemExit):
        measured(tmp_path, fine, bytes_needed=4_000_000_000)
    assert "it needs 4.0 GB, 2.5 GB are free" in capsys.readouterr().err


def test_existing_files_are_kept_until_there_are_results(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    path.write_text("of an earlier run")
    monkeypatch.setattr(command, "free_bytes", lambda device: 1)
    with pytest.raises(SystemExit):
        measured(tmp_path, fine, bytes_needed=2)
    assert path.read_text() == "of an earlier run"


def test_file_that_becomes_unwritable(tmp_path, capsys):
    def replaces_it_by_a_folder(result, show):
        fine(result, show)
        (tmp_path / "run.csv").mkdir()

    with pytest.raises(SystemExit) as error:
        measured(tmp_path, replaces_it_by_a_folder, arguments=["--csv", str(tmp_path / "run.csv")])
    assert error.value.code == 2
    assert "run.csv" in capsys.readouterr().err


def test_markdown_names_the_machine_and_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "loss", "two words"])
    measured(tmp_path, fine, arguments=["--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| forward + backward | one copy |")
    assert f"fused_xent {fused_xent.__version__}" in lines[-1]
    assert lines[-1].endswith("`python -m bench loss 'two words'`")


@pytest.mark.parametrize(
    ("convert", "text", "expected"),
    [
        (at_least(2), "2", 2),
        (at_least(2), "1", None),
        (at_least(2), "2.5", None),
        (at_least(0), "-1", None),
        (between(0, 0.5), "0", 0.0),
        (between(0, 0.5), "0.5", 0.5),
        (between(0, 0.5), "0.51", None),
        (between(0, 0.5), "-0.01", None),
        (between(0, 0.5), "nan", None),
        (between(0, 0.5), "half", None),
    ],
)
def test_limits_of_numeric_options(convert, text, expected):
    if expected is not None:
        assert convert(text) == expected
        return
    with pytest.raises(command.argparse.ArgumentTypeError, match="must be"):
        convert(text)


def jobs_of(module, main, arguments, monkeypatch):
    """Run a command without measuring; return its options and its jobs."""
    seen = {}

    def stand_in(parser, options, jobs):
        parser.check_common(options)
        seen.update(options=options, jobs=jobs)
        return Run({}, []), 7

    monkeypatch.setattr(module, "measure_all", stand_in)
    monkeypatch.setattr(roofline, "show", lambda run: None)
    assert main(["--device", "cpu", *arguments]) == 7
    return seen["options"], seen["jobs"]


def names_of(jobs):
    return [(job.result.benchmark, job.result.case, job.result.dtype) for job in jobs]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--quick"],
            ["llama3 float32", "llama3 bfloat16", "imagenet float32", "imagenet bfloat16"],
        ),
        (["gpt2", "cifar", "gpt2", "--dtype", "float16"], ["gpt2 float16", "cifar float16"]),
        (["--rows", "3", "--vocab", "5", "--dtype", "float32"], ["custom float32"]),
        (
            ["qwen", "--rows", "3", "--vocab", "5", "--dtype", "float32", "--dtype", "float32"],
            ["qwen float32", "custom float32"],
        ),
    ],
)
def test_cases_of_the_loss(arguments, expected, monkeypatch):
    _, jobs = jobs_of(loss, loss.main, arguments, monkeypatch)
    assert [f"{job.result.case} {job.result.dtype}" for job in jobs] == expected
    for job in jobs:
        case = job.measure.args[0]
        shape = (3, 5) if case.name == "custom" else SUITES["cpu"].cases[case.name].shape
        assert case.shape == job.result.shape == shape


def test_default_cases_of_the_loss(monkeypatch):
    default = SUITES["cpu"].default
    _, jobs = jobs_of(loss, loss.main, ["--dtype", "float32"], monkeypatch)
    assert [job.result.case for job in jobs] == list(default)
    assert [job.result.labels for job in jobs] == ["indices"] * 6 + ["soft"]
    _, jobs = jobs_of(loss, loss.main, ["--dtype", "float32", "--ignored", "0.5"], monkeypatch)
    assert [job.result.case for job in jobs] == list(default[:-1])  # soft labels are not ignored


LOSS_OPTIONS = {
    "--label-smoothing": "label_smoothing",
    "--ignored": "ignored",
    "--lse-square-scale": "lse_square_scale",
    "--softcap": "softcap",
}


@pytest.mark.parametrize("option", LOSS_OPTIONS)
@pytest.mark.parametrize("name", ["loss", "sweep"])
def test_options_reach_the_measured_cases(name, option, monkeypatch):
    main = {"loss": loss.main, "sweep": loss.sweep_main}[name]
    value = 1.0 if option == "--softcap" else 0.5
    case = ["imagenet"] if name == "loss" else ["--vocab", "50"]
    _, jobs = jobs_of(loss, main, [*case, option, str(value)], monkeypatch)
    for job in jobs:
        assert job.result.options == {LOSS_OPTIONS[option]: value}
        assert job.measure.args[0].options == Options(**job.result.options)
        assert job.result.labels == "indices"


@pytest.mark.parametrize("name", ["loss", "sweep"])
def test_soft_labels_reach_the_measured_cases(name, monkeypatch):
    main = {"loss": loss.main, "sweep": loss.sweep_main}[name]
    case = ["imagenet"] if name == "loss" else ["--vocab", "50"]
    _, jobs = jobs_of(loss, main, [*case, "--soft"], monkeypatch)
    assert all(job.result.labels == "soft" and job.measure.args[0].soft for job in jobs)


def test_cases_of_a_sweep(monkeypatch):
    options, jobs = jobs_of(loss, loss.sweep_main, [], monkeypatch)
    assert options.mode == ["forward", "both"]
    swept = [1000, 2048, 4096, 8192, 16384, 32000, 50257, 65536, 128256, 151936, 201088, 262144]
    assert names_of(jobs) == [("loss", f"V={vocab}", "float32") for vocab in swept]
    _, jobs = jobs_of(loss, loss.sweep_main, ["--quick"], monkeypatch)
    assert [job.result.n_classes for job in jobs] == [1000, 32000, 128256]
    chosen = ["--vocab", "50", "70", "50", "--dtype", "float16", "--dtype", "bfloat16"]
    options, jobs = jobs_of(loss, loss.sweep_main, [*chosen, "--mode", "backward"], monkeypatch)
    assert options.mode == ["backward"]
    assert names_of(jobs) == [
        ("loss", f"V={vocab}", dtype) for dtype in ("float16", "bfloat16") for vocab in (50, 70)
    ]


@pytest.mark.parametrize(
    ("arguments", "shapes", "dtypes"),
    [
        ([], [(1024, 512, 32000), (512, 512, 128256)], ["float32", "bfloat16"]),
        (["--quick"], [(256, 256, 32000)], ["float32", "bfloat16"]),
        (["llama3", "--dtype", "float16"], [(512, 512, 128256)], ["float16"]),
        (
            ["--rows", "3", "--features", "4", "--vocab", "5", "--dtype", "float32"],
            *([(3, 4, 5)], ["float32"]),
        ),
    ],
)
def test_cases_of_a_linear_layer(arguments, shapes, dtypes, monkeypatch):
    _, jobs = jobs_of(linear, linear.main, arguments, monkeypatch)
    found = [(job.result.shape, job.result.dtype) for job in jobs]
    assert found == [(shape, dtype) for shape in shapes for dtype in dtypes]
    assert {job.result.benchmark for job in jobs} == {"linear"}


@pytest.mark.parametrize(
    ("arguments", "linear_case", "dtypes"),
    [
        ([], ("llama2", (1024, 512, 32000)), ["float32", "bfloat16"]),
        (["--quick"], ("small", (256, 256, 32000)), ["float32", "bfloat16"]),
        (["--dtype", "float16"], ("llama2", (1024, 512, 32000)), ["float16"]),
    ],
)
def test_cases_of_a_roofline(arguments, linear_case, dtypes, monkeypatch):
    options, jobs = jobs_of(roofline, roofline.main, arguments, monkeypatch)
    assert options.mode == ["forward", "backward", "both"]
    found = [(job.result.case, job.result.shape) for job in jobs]
    assert found == [("llama2", (1024, 32000)), linear_case] * len(dtypes)
    assert [job.result.dtype for job in jobs] == [dtype for dtype in dtypes for _ in range(2)]


@pytest.mark.parametrize(("arguments", "is_shown"), [([], True), (["--markdown"], False)])
def test_markdown_has_no_roofline_table(arguments, is_shown, monkeypatch):
    run, shown = Run({}, []), []
    monkeypatch.setattr(roofline, "measure_all", lambda *_: (run, 1))
    monkeypatch.setattr(roofline, "show", shown.append)
    assert roofline.main(["--device", "cpu", *arguments]) == 1
    assert shown == [run] * is_shown


@pytest.mark.parametrize(
    ("arguments", "limits"),
    [([], (10, 3.0)), (["--quick"], (5, 1.0)), (["--rounds", "3"], (3, 0.0))],
)
def test_rounds_of_the_loss(arguments, limits, monkeypatch):
    seen = []

    def stand_in(timers, min_rounds, min_seconds, on_round, samples):
        seen.append((min_rounds, min_seconds))
        return {}

    monkeypatch.setattr(loss, "interleave", stand_in)
    small = ["--rows", "4", "--vocab", "5", "--dtype", "float32", "--provider", "fused_xent"]
    assert bench.main(["loss", "--device", "cpu", *small, *arguments]) == 0
    assert seen == [limits]


@pytest.mark.parametrize(
    ("arguments", "n_rounds"), [([], 5), (["--quick"], 2), (["--rounds", "3"], 3)]
)
def test_rounds_of_a_linear_layer(arguments, n_rounds, tmp_path):
    path = tmp_path / "x.json"
    small = ["--rows", "4", "--features", "3", "--vocab", "5", "--dtype", "float32"]
    common = ["--device", "cpu", "--provider", "fused_xent", "--json", str(path)]
    assert bench.main(["linear", *small, *common, *arguments]) == 0
    (result,) = Run.read_json(path).results
    assert [timing.provider for timing in result.timings] == [linear.BARE, "fused_xent"]
    assert all(len(timing.seconds) == n_rounds for timing in result.timings)


def test_memory_work_and_modes_of_each_timing(tmp_path, monkeypatch):
    """Each mode has its own peak memory; a provider is timed only in the modes it has."""
    peaks = {"forward": 1, "backward": 2, "both": 3}
    monkeypatch.setattr(Workload, "peak_bytes", lambda workload, loss: peaks)
    path = tmp_path / "x.json"
    small = ["--rows", "4", "--vocab", "5", "--dtype", "float32", "--provider", "fused_xent"]
    common = ["--device", "cpu", "--rounds", "1", "--json", str(path)]
    modes = ["--mode", "forward", "--mode", "backward", "--mode", "forward"]  # timed once
    assert bench.main([*common, *small, *modes]) == 0
    (result,) = Run.read_json(path).results
    found = [(one.mode, one.provider, one.peak_bytes, one.operations) for one in result.timings]
    assert found == [
        ("copy", "torch", None, 0),
        ("read", "torch", None, 0),
        ("forward", "fused_xent", 1, 4 * 20),
        ("backward", "fused_xent", 2, 3 * 20),
        ("backward", "fused_xent inplace", 2, 3 * 20),
    ]
    assert set(result.errors) == {"fused_xent", "fused_xent inplace"}


def test_timed_and_absent_providers_of_a_case(tmp_path):
    """Providers get the case's dtype and device: float16 has no fused form, a CPU no apex."""
    path = tmp_path / "x.json"
    common = ["--device", "cpu", "--rounds", "1", "--json", str(path), "--provider", "fused_xent"]
    small = ["--rows", "4", "--vocab", "5", "--dtype", "float16", "--provider", "apex"]
    assert bench.main([*common, *small, "--mode", "both"]) == 0
    (result,) = Run.read_json(path).results
    found = [one.provider for one in result.timings if one.mode == "both"]
    assert found == ["fused_xent", "fused_xent inplace"]
    assert result.absent == {"apex": "needs a GPU"}


def test_memory_of_each_linear_layer(tmp_path, monkeypatch):
    """The memory of the bare products is not measured."""
    monkeypatch.setattr(linear.Workload, "peak_bytes", lambda workload, loss: 77)
    path = tmp_path / "x.json"
    common = ["--device", "cpu", "--rounds", "1", "--json", str(path), "--provider", "fused_xent"]
    small = ["--rows", "4", "--features", "3", "--vocab", "5", "--dtype", "bfloat16"]
    assert bench.main(["linear", *common, *small, "--provider", "liger-kernel"]) == 0
    (result,) = Run.read_json(path).results
    assert [(one.provider, one.peak_bytes) for one in result.timings] == [
        (linear.BARE, None),
        ("fused_xent", 77),
    ]
    assert {one.bytes for one in result.timings} == {2 * 2 * 3 * (4 + 5) + 4 * 8}
    assert result.absent == {"liger-kernel": "needs a GPU"}
    assert result.errors["fused_xent"]["grad_weight"] > 1e-5  # bfloat16 was used


@pytest.mark.parametrize("quick", [[], ["--quick"]], ids=["", "quick"])
def test_missing_device_is_refused(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "why_not", lambda device: f"no {device} here")
    with pytest.raises(SystemExit) as error:
        measured(tmp_path, fine, arguments=quick)
    assert error.value.code == 2
    message = "--device cpu has nothing to measure: no cpu here"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "soft", "expected"),
    [  # bytes per logit: logits, original, gradient, and a float32 copy in eager
        ("float32", False, 4 * 4),
        ("bfloat16", False, 3 * 2 + 4),
        ("float32", True, 7 * 4),  # also target, original and float32 copy
        ("bfloat16", True, 5 * 2 + 8),
    ],
)
def test_memory_estimate_of_a_loss(dtype, soft, expected):
    """With few logits the float64 check needs the most: 7 tensors and intermediate results."""
    few, many = (
        loss.job(Case("own", (n_rows, 1 << 18), soft=soft), dtype, None).bytes_needed
        for n_rows in (8, 1 << 14)
    )
    assert 7 * 8 < few / (1 << 21) - expected < 10 * 8
    assert expected < many / (1 << 32) < expected + 1


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_memory_estimate_of_a_linear_layer(dtype, size):
    """Inputs and two gradients of each, the same in float64, and a chunk of logits in float64."""
    inputs = (1000 + 30_000) * 2000
    needed = linear.job("own", (1000, 2000, 30_000), dtype, None).bytes_needed
    assert needed == inputs * (3 * size + 3 * 8) + 4 * 8 * 1000 * 30_000
    many = linear.job("own", (1 << 20, 1, 1 << 18), dtype, None).bytes_needed
    assert many < 2e9  # far less than all logits


def program(main):
    """Run `python -m bench` in a subprocess, with this source of `main`."""
    script = f"import os, sys\nimport bench.__main__ as b\n{main}\nb.main = main\nsys.exit(b.run())"
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ("return 0", 0, ""),
        ("return 1", 1, ""),
        ("raise KeyboardInterrupt", 130, ""),
        ("raise BrokenPipeError", 141, ""),
        ("raise OSError(28, 'no space')", 2, "python -m bench: error: [Errno 28] no space\n"),
    ],
)
def test_exit_status_of_the_program(body, status, error):
    ended = program(f"def main():\n    print('what there is \\ud800')\n    {body}")
    assert (ended.returncode, ended.stderr) == (status, error)


def test_the_default_command_is_loss(monkeypatch):
    seen = []
    for name, module in {"main": loss, "sweep_main": loss}.items():
        monkeypatch.setattr(
            module, name, lambda arguments, name=name: seen.append((name, arguments)) or 3
        )
    monkeypatch.setattr(sys, "argv", ["bench", "gpt2"])
    assert bench.main() == 3
    assert bench.main([]) == 3
    assert bench.main(["loss", "--quick"]) == 3
    assert bench.main(["sweep", "sweep"]) == 3
    expected = [("main", ["gpt2"]), ("main", []), ("main", ["--quick"]), ("sweep_main", ["sweep"])]
    assert seen == expected
    monkeypatch.setitem(sys.modules, "torch_of_another_kind", None)
    monkeypatch.setitem(bench.COMMANDS, "loss", ("nowhere:main", ""))
    with pytest.raises(ModuleNotFoundError, match="nowhere"):  # not reported as a missing package
        bench.main([])
