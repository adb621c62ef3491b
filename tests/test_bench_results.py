"""The benchmark's byte and operation counts, its cases, measurements, files and comparisons."""

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
from bench import compare, linear, loss, plots, readme, roofline, tables
from bench.cases import DTYPES, SUITES, Case, Options, bytes_moved, operations, sweep
from bench.device import HostClock, PeakMemory, is_out_of_memory, limited_memory
from bench.providers import Provider
from bench.results import Result, Run, Timing, environment
from bench.timing import Workload, interleave

pytestmark = pytest.mark.cpu("runs the benchmark, which has an option for the device")


def test_bytes_and_operations():
    logits, target = Case("own", (10, 100)).tensors(torch.bfloat16, "cpu")
    n, t = 10 * 100 * 2, 10 * 8
    assert bytes_moved(logits, target, "read") == n
    assert bytes_moved(logits, target, "copy") == 2 * n
    assert bytes_moved(logits, target, "forward") == n + t
    assert bytes_moved(logits, target, "backward") == 2 * n + t
    assert bytes_moved(logits, target, "both") == 3 * n + 2 * t
    assert bytes_moved(logits, target, "both", fused=True) == 2 * n + t
    soft = torch.rand(10, 100, dtype=torch.bfloat16)
    assert bytes_moved(logits, soft, "both", fused=True) == 3 * n
    for mode, of_indices, of_soft in (
        ("copy", 0, 0),
        ("read", 0, 0),
        ("forward", 4, 6),
        ("backward", 3, 5),
        ("both", 7, 11),
    ):
        assert operations(logits, target, mode) == of_indices * 1000
        assert operations(logits, soft, mode) == of_soft * 1000
    strided, target = Case("own", (2, 10, 4, 4)).tensors(torch.float32, "cpu")
    assert bytes_moved(strided, target, "forward") == 4 * 320 + 8 * 32
    assert operations(strided, target, "forward") == 4 * 320


def test_ignored_rows_are_not_read_and_their_gradient_is_written():
    logits, target = Case("own", (10, 100)).tensors(torch.bfloat16, "cpu")
    target[:4] = -100
    n, t = 10 * 100 * 2, 10 * 8
    assert bytes_moved(logits, target, "forward") == 0.6 * n + t
    assert bytes_moved(logits, target, "backward") == 1.6 * n + t
    assert operations(logits, target, "forward") == 4 * 600


def test_figures_of_a_timing():
    timing = Timing("both", "x", bytes=3_000, operations=600, seconds=[2.0, 1.0, 4.0, 3.0, 15.0])
    assert timing.median == 3
    assert timing.quartiles == (2, 4)
    assert timing.noise == pytest.approx(2 / 3)
    assert timing.bandwidth == 1000
    assert timing.rate == 200
    assert timing.intensity == 0.2
    assert Timing("both", "x", 1, 1, seconds=[1.0, 2.0, 6.0]).quartiles == (1, 6)
    copy = Timing("copy", "torch", bytes=2_000, operations=0, seconds=[1.0])
    eager = Timing("both", "torch eager", bytes=3_000, operations=600, seconds=[12.0])
    result = Result("loss", "x", (10, 100), "float32", timings=[copy, eager, timing])
    assert result.share(timing, "copy") == 0.5
    assert result.ratio(timing, "torch eager") == 4
    assert result.ratio(timing, "torch.compile") is None
    assert result.share(timing, "read") is None
    assert result.share(Timing("step", "x", 0, 600, seconds=[1.0]), "copy") is None
    assert result.n_classes == 100
    assert Result("linear", "x", (10, 20, 30), "float32").n_classes == 30
    assert tables.loss_cells(result, timing)[:6] == ("3000.00", "33%", "0.0", "0.0", "50%", "4.0x")


def test_cases_of_a_sweep_have_equally_many_logits():
    options = Options(softcap=2.0)
    cases = sweep([1000, 50257], "cpu", True, options)
    sizes = [case.shape[0] * case.shape[1] for case in cases]
    assert max(sizes) / min(sizes) < 1.01
    assert [case.name for case in cases] == ["V=1000", "V=50257"]
    assert all(case.soft and case.options == options for case in cases)
    assert {case.dtypes for case in cases} == {("float32",)}
    cases = sweep([1000, 50257], "cuda", False, Options())
    assert {case.shape[0] for case in cases} == {8192}
    assert {case.dtypes for case in cases} == {("bfloat16",)}
    assert not any(case.soft for case in cases)
    assert sweep([1 << 26], "cpu", False, Options())[0].shape[0] == 1


CLASSES = {
    "imagenet": 1000,
    "codec": 4096,
    "llama2": 32000,
    "gpt2": 50257,
    "llama3": 128256,
    "qwen": 151936,
    "gpt-oss": 201088,
    "gemma": 262144,
    "cifar": 10,
    "segmentation": 21,
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_have_the_classes_of_their_model_or_dataset(device):
    suite = SUITES[device]
    for name, case in suite.cases.items():
        model = name.removesuffix("-soft").removesuffix("-few")
        assert (case.name, case.shape[1]) == (name, CLASSES[model])
        assert case.soft == name.endswith("-soft")
        assert len(case.shape) == (4 if model == "segmentation" else 2)
    assert len(set(suite.default)) == len(suite.default)
    assert {*suite.default, *suite.quick} <= set(suite.cases)
    assert {"llama3", "gpt2", "imagenet", "segmentation", "llama3-soft"} <= set(suite.default)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_inputs_of_a_case_are_the_same_in_every_run(dtype):
    case = Case("own", (2000, 5), options=Options(ignored=0.2))
    (logits, target), again = (case.tensors(dtype, "cpu") for _ in range(2))
    assert logits.dtype == dtype
    assert torch.equal(logits, again[0])
    assert torch.equal(target, again[1])
    assert set(target.tolist()) == {-100, 0, 1, 2, 3, 4}
    assert 0.9 < logits.float().std() < 1.1
    ignored = target == -100
    assert 0 < ignored[:1000].sum() < 300  # spread over the rows
    soft = Case("own", (20, 5, 3), soft=True).tensors(dtype, "cpu")[1]
    assert soft.dtype == dtype
    torch.testing.assert_close(soft.float().sum(1), torch.ones(20, 3), atol=1e-2, rtol=0)


def test_inputs_of_a_linear_layer_are_the_same_in_every_run():
    """The logits have standard deviation 1, as in a loss, for any number of features."""
    one, again = (linear.Workload((400, 300, 200), torch.bfloat16, "cpu") for _ in range(2))
    for name in ("hidden", "weight", "target"):
        assert torch.equal(getattr(one, name), getattr(again, name))
    assert one.hidden.dtype == one.weight.dtype == torch.bfloat16
    assert 0.9 < (one.hidden @ one.weight.t()).float().std() < 1.1
    assert 0 <= one.target.min() < 10
    assert 190 <= one.target.max() < 200


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


def test_inputs_are_restored_before_each_run():
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


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured only on Linux")
def test_memory_of_a_step_is_more_than_of_its_forward():
    workload = Workload(*Case("own", (4096, 4000)).tensors(torch.float32, "cpu"))
    peaks = workload.peak_bytes(fused_xent.cross_entropy)
    assert peaks["forward"] < 0.1 * workload.logits.nbytes
    assert 0.9 * workload.logits.nbytes < peaks["both"] < 1.2 * workload.logits.nbytes
    assert peaks["backward"] == peaks["both"]


def test_memory_of_a_linear_layer_excludes_its_outputs(monkeypatch):
    class Known(PeakMemory):
        def __exit__(self, *_):
            self.bytes = 1_000_000

    monkeypatch.setattr(linear, "PeakMemory", Known)
    workload = linear.Workload((24, 16, 50), torch.float32, "cpu")
    outputs = 4 + 4 * 16 * (24 + 50)
    assert workload.peak_bytes(fused_xent.linear_cross_entropy) == 1_000_000 - outputs


def test_memory_estimate_of_a_case():
    """Logits, original, gradient and eager's float32 copy; in float64 only a chunk."""
    options = types.SimpleNamespace()
    n_logits = 1024 * 32000
    assert loss.job(Case("own", (1024, 32000)), "float32", options).bytes_needed > 44 * n_logits
    assert loss.job(Case("own", (8192, 262144)), "float32", options).bytes_needed < 5e10


def test_peak_memory_of_a_process():
    """In a new process: this one may reuse heap memory that it freed before."""
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
    margin = 8 << 20  # the system counts pages in batches
    if printed.stdout != "None\n":  # measured only on Linux
        assert (64 << 20) - margin <= int(printed.stdout) < (64 << 20) + margin


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="free memory is known only on Linux")
def test_memory_is_limited_only_inside():
    huge = 1 << 40
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    there = int(lines["MemTotal"].split()[0]) * 1024
    with limited_memory(), pytest.raises(RuntimeError) as error:
        torch.ones(there, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("of another kind"))
    torch.empty(huge >> 6, dtype=torch.uint8)  # 16 GiB, never touched


def run_of(*samples, provider="fused_xent", case="x", copy=(1.0, 1.0, 1.0, 1.0)):
    """Return a run of one case: samples of a copy of 200 bytes, and of mode `both` of 300 bytes."""
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
        (QUIET, 1.021, "slower"),
        (QUIET, 1.03, "slower"),
        (QUIET, 0.981, ""),  # 1 / 0.981 < 1.02 < 1 / 0.9802: ratios count symmetrically
        (QUIET, 0.9802, "faster"),
        (QUIET, 0.97, "faster"),
        (NOISY, 1.15, ""),
        (NOISY, 1.19, ""),
        (NOISY, 1.21, "slower"),
        (NOISY, 0.87, ""),
        (NOISY, 0.84, ""),
        (NOISY, 0.825, "faster"),
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


def test_table_of_a_comparison(tmp_path, capsys, monkeypatch):
    """Milliseconds before and after, the change, the noise, and the verdict."""
    monkeypatch.setenv("COLUMNS", "100")
    names = [str(tmp_path / name) for name in ("a.json", "b.json")]
    run_of(0.010, 0.010, 0.010, 0.010).write_json(Path(names[0]))
    run_of(0.018, 0.020, 0.020, 0.022).write_json(Path(names[1]))
    assert compare.main(names) == 1
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "forward + backward" in line]
    assert line.split()[-5:] == ["10.00", "20.00", "+100%", "5%", "slower"]
    assert "x  1x10  float32" in printed
    assert "1 compared: 1 slower, 0 faster, 0 within noise" in printed
    assert compare.main(names[::-1]) == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "forward + backward" in line]
    assert line.split()[-5:] == ["20.00", "10.00", "-50%", "5%", "faster"]


MACHINE = ("cpu", "cores", "threads", "gpu", "driver", "torch instruction set", "torch")


@pytest.mark.parametrize("name", MACHINE)
def test_compare_reports_each_difference_of_the_machines(name, tmp_path, capsys):
    before, after = run_of(*QUIET), run_of(*QUIET)
    gpu = {"gpu": "H", "driver": "1", "cuda": "13", "copy bytes a second": 1e12}
    for run in (before, after):
        run.environment |= gpu
    after.environment[name] = "other"
    before.write_json(tmp_path / "a.json")
    after.write_json(tmp_path / "b.json")
    assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    printed = capsys.readouterr().out
    assert f"{name} differs: {before.environment[name]}, other" in printed
    assert printed.count(" differs: ") == 1


def test_change_of_the_machines_copy_is_the_median(tmp_path, capsys):
    runs = [Run(environment("cpu")), Run(environment("cpu"))]
    for case, seconds in {"x": 1.0, "y": 1.1, "z": 7.0}.items():
        runs[0].results += run_of(*QUIET, case=case).results
        runs[1].results += run_of(*QUIET, case=case, copy=[seconds] * 4).results
    assert compare.baselines(*runs) == pytest.approx(0.1)
    assert compare.baselines(runs[0], run_of(*QUIET, case="other")) is None


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


def test_key_has_shape_dtype_labels_and_options():
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
    "a GPU without its other fields": lambda run: run["environment"].update(gpu="x"),
    "no seconds": lambda run: timing_of(run).update(seconds=[]),
    "NaN seconds": lambda run: timing_of(run).update(seconds=[float("nan"), 1, 1]),
    "infinite seconds": lambda run: timing_of(run).update(seconds=[float("inf")]),
    "negative seconds": lambda run: timing_of(run).update(seconds=[-1, 2, 2, 2]),
    "subnormal seconds": lambda run: timing_of(run).update(seconds=[1e-320]),
    "text for seconds": lambda run: timing_of(run).update(seconds="soon"),
    "an unknown mode": lambda run: timing_of(run).update(mode="sideways"),
    "no provider": lambda run: timing_of(run).update(provider=None),
    "a surrogate": lambda run: timing_of(run).update(provider="\ud800"),
    "text for bytes": lambda run: timing_of(run).update(bytes="many"),
    "text for a peak": lambda run: timing_of(run).update(peak_bytes="much"),
    "another field": lambda run: timing_of(run).update(colour="red"),
    "a dtype with a slash": lambda run: run["results"][0].update(dtype="../x"),
    "text for an option": lambda run: run["results"][0].update(options={"softcap": "x"}),
    "no options": lambda run: run["results"][0].update(options=None),
    "a shape of one number": lambda run: run["results"][0].update(shape=[10]),
    "text for a shape": lambda run: run["results"][0].update(shape=["a", "b"]),
    "a linear layer of two sizes": lambda run: run["results"][0].update(benchmark="linear"),
    "an unknown benchmark": lambda run: run["results"][0].update(benchmark="lose"),
    "unknown labels": lambda run: run["results"][0].update(labels="hard"),
    "an unknown dtype": lambda run: run["results"][0].update(dtype="int8"),
    "text for errors": lambda run: run["results"][0].update(errors={"x": "large"}),
    "a number for a failure": lambda run: run["results"][0].update(failures={"x": 1}),
    "absent without a reason": lambda run: run["results"][0].update(absent={"x": None}),
    "a case without a name": lambda run: run["results"][0].update(case=None),
    "negative bytes": lambda run: timing_of(run).update(bytes=-1),
    "negative operations": lambda run: timing_of(run).update(operations=-1),
    "a bool for seconds": lambda run: timing_of(run).update(seconds=[True, 1.0]),
    "too many seconds": lambda run: timing_of(run).update(seconds=[1e13]),
    "a list for a version": lambda run: run["environment"].update(torch=[2, 13]),
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
    assert "is not from python -m bench --json" in capsys.readouterr().err


def test_compare_reports_other_machines_and_missing_timings(tmp_path, capsys):
    before, after = run_of(*QUIET), run_of(*QUIET, copy=[2.0] * 4)
    after.environment["cpu"] = "that"
    after.results += run_of(*QUIET, case="y").results
    before.results += run_of(*QUIET, case="z", provider="other").results
    before.write_json(tmp_path / "a.json")
    after.write_json(tmp_path / "b.json")
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert bench.main(["compare", *files]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "cpu differs: this, that" in printed
    assert "time of a copy of the logits: +100%" in printed
    assert f"fused_xent: 1 timings are missing in {files[0]}" in printed
    assert f"other: 1 timings are missing in {files[1]}" in printed
    assert printed.count("missing") == 2
    assert bench.main(["compare", *files, "--provider", "fused_xent"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "fused_xent: 1 timings are missing" in printed
    assert "other: 1 timings" not in printed


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
    run = run_of(*QUIET)  # 70 operations per second; the roof is 200 * 70 / 300
    products = Timing("step", linear.BARE, 100, 1000, seconds=[0.5])
    run.results.append(Result("linear", "x", (1, 2, 3), "float32", timings=[products]))
    roofline.show(run)
    assert "150%" in capsys.readouterr().out


def test_values_in_the_plots_of_a_sweep():
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


def test_tables_of_pages_match_their_files():
    pages = {page: page.read_text() for page in readme.pages()}
    for page, text in pages.items():
        assert len(readme.TABLE.findall(text)) == text.count("<!-- end -->"), page
        assert readme.with_tables(text) == text, page
    text = next(text for text in pages.values() if "| llama3 " in text)
    row = next(line for line in text.splitlines() if line.startswith("| llama3 "))
    assert readme.with_tables(text.replace(row, "| llama3 | by hand |")) == text
