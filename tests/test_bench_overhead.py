"""`python -m bench overhead`: cases, calls, kernel counts and output."""

import types

import pytest
import torch

from bench import __main__ as bench
from bench import overhead, tables
from bench.compare import milliseconds
from bench.device import HostClock
from bench.overhead import CASES, Call
from bench.providers import Provider, Request
from bench.results import Result, Run, Timing

pytestmark = pytest.mark.cpu("runs the benchmark, which has an option for the device")
EAGER_AND_OURS = ["--provider", "torch eager", "--provider", "fused_xent"]
RUN = ["overhead", "--device", "cpu", "--rounds", "2"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Skip cache flushes, and make only two calls per sample."""
    monkeypatch.setattr(HostClock, "start", HostClock.mark)
    monkeypatch.setattr(overhead, "CALLS", 2)


def measured(tmp_path, *arguments):
    """Return the exit status, and the run from the written file."""
    path = tmp_path / "x.json"
    status = bench.main([*RUN, "--json", str(path), *arguments])
    return status, Run.read_json(path)


def test_every_case_in_both_modes(tmp_path, threads, capsys):
    threads(2)
    status, run = measured(tmp_path, *EAGER_AND_OURS)
    assert status == 0
    assert run.environment["threads"] == 1
    assert torch.get_num_threads() == 2
    assert [(one.case, one.shape) for one in run.results] == [
        ("tiny", (4, 9)),
        ("module", (4, 9)),
        ("small", (8, 10)),
        ("cifar", (128, 10)),
        ("imagenet", (128, 1000)),
        ("linear", (4, 8, 9)),
    ]
    printed = capsys.readouterr().out
    for result in run.results:
        assert result.title in printed
        assert [(one.mode, one.provider) for one in result.timings] == [
            (mode, name) for mode in ("forward", "both") for name in ("torch eager", "fused_xent")
        ]
        assert all(len(timing.seconds) == 2 for timing in result.timings)
        assert all(timing.kernels is None for timing in result.timings)
        assert set(result.errors) == {"torch eager", "fused_xent"}


@pytest.mark.parametrize(
    ("arguments", "cases", "n_rounds"),
    [
        ([], list(CASES), 300),
        (["--quick"], ["tiny", "linear"], 60),
        (["--rounds", "3", "small", "tiny", "small"], ["small", "tiny"], 3),
    ],
)
def test_cases_and_rounds(arguments, cases, n_rounds, monkeypatch, tmp_path):
    seen, path = [], tmp_path / "x.json"

    def stand_in(timers, min_rounds, min_seconds, on_round, samples):
        seen.append((min_rounds, min_seconds))
        return {}

    monkeypatch.setattr(overhead, "interleave", stand_in)
    options = ["--device", "cpu", "--provider", "torch eager", "--json", str(path), *arguments]
    assert bench.main(["overhead", *options]) == 0
    assert [result.case for result in Run.read_json(path).results] == cases
    assert seen == [(1, 0.0), (n_rounds, 0.0)] * len(cases)  # first a warm-up


def test_unknown_case(capsys):
    with pytest.raises(SystemExit) as error:
        bench.main([*RUN, "huge"])
    assert error.value.code == 2
    assert "case must be one of tiny, module," in capsys.readouterr().err


def test_the_case_module_calls_modules(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module, **_: compiled.append(module) or module)
    request = Request(overhead.Case("module", (4, 9)), "float32", "cpu")
    for name, adapter in overhead.MODULES.items():
        (provider,) = adapter(request)
        assert provider.name == name
        assert isinstance(provider.loss, torch.nn.CrossEntropyLoss)
        assert ("fused_xent" in type(provider.loss).__module__) == (name == "fused_xent")
        assert (provider.loss in compiled) == (name == "torch.compile")


def with_providers(monkeypatch, *losses):
    """Replace the providers of the case `tiny` by these losses."""
    found = {name: lambda _, pair=(name, loss): [Provider(*pair)] for name, loss in losses}
    monkeypatch.setitem(CASES, "tiny", ((4, 9), overhead.partial(overhead.of_logits, found)))


def test_wrong_providers_are_not_timed(tmp_path, monkeypatch):
    def faulty(logits, target):
        return torch.nn.functional.cross_entropy(logits, target) * 1.1

    with_providers(monkeypatch, ("right", torch.nn.CrossEntropyLoss()), ("faulty", faulty))
    status, run = measured(tmp_path, "tiny")
    assert status == 1
    assert set(run.results[0].failures) == {"faulty"}
    assert {timing.provider for timing in run.results[0].timings} == {"right"}


def test_provider_that_raises_while_timed_is_left_out(tmp_path, monkeypatch):
    steps = []

    def raises_later(logits, target):
        if logits.is_leaf and torch.is_grad_enabled():  # when timed, not in the check
            steps.append(logits)
            if len(steps) > 4:  # two to warm up, two in the first sample
                raise ValueError("too many steps")
        return torch.nn.functional.cross_entropy(logits, target)

    with_providers(monkeypatch, ("fused_xent", raises_later))
    status, run = measured(tmp_path, "tiny")
    assert status == 1
    assert run.results[0].failures == {"fused_xent": "ValueError: too many steps"}
    assert run.results[0].timings == []


def test_forward_has_no_graph_and_both_has_fresh_gradients():
    logits, target, losses, gradients = torch.randn(4, 9), torch.arange(4), [], []

    def loss(logits, target):
        losses.append(torch.nn.functional.cross_entropy(logits, target))
        if logits.requires_grad and losses[-1].requires_grad:
            gradients.append(logits.grad)
        return losses[-1]

    call = Call(loss, [logits, target])
    call.run("forward", 2)
    assert [one.requires_grad for one in losses] == [False, False]
    call.run("both", 3)
    assert [one.requires_grad for one in losses[2:]] == [True] * 3
    assert gradients == [None] * 3
    assert call.inputs[0].grad is None


def test_providers_do_not_share_inputs():
    logits = torch.ones(4, 9)

    def overwrites(logits, target):
        return logits.detach().zero_().sum()

    call = Call(overwrites, [logits, torch.arange(4)])
    call.run("forward", 1)
    assert call.inputs[0].eq(0).all()
    assert logits.eq(1).all()
    assert not logits.requires_grad


class OnGpu(Call):
    """A call whose inputs claim to be on a GPU."""

    def __init__(self):
        self.inputs = [types.SimpleNamespace(is_cuda=True)]
        self.calls = []

    def forward(self):
        self.calls.append("forward")

    def both(self):
        self.calls.append("both")


def test_samples_of_a_gpu_have_host_time(monkeypatch):
    times = iter([10.0, 12.0, 16.0])
    waits = []
    monkeypatch.setattr(overhead, "perf_counter", lambda: next(times))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(len(call.calls)))
    call = OnGpu()
    samples = call.sample("both", "ours")
    assert samples == {("both", "ours"): 3.0, ("host both", "ours"): 1.0}  # per call, of two
    assert waits == [2]  # once, after both calls


def test_samples_of_a_cpu(monkeypatch):
    times = iter([10.0, 12.0])
    monkeypatch.setattr(overhead, "perf_counter", lambda: next(times))
    call = Call(lambda logits: logits.sum(), [torch.ones(3)])
    assert call.sample("forward", "ours") == {("forward", "ours"): 1.0}
    assert call.n_kernels("forward") is None


def test_kernel_count_is_that_of_one_call(monkeypatch):
    names = ["aten::sum", "cudaLaunchKernel", "cuLaunchKernelEx", "cudaMemsetAsync", "sum_kernel"]

    class Recorded:
        def __init__(self, activities):
            pass

        __enter__ = __exit__ = lambda self, *_: self

        def events(self):
            return [types.SimpleNamespace(name=name) for name in names]

    monkeypatch.setattr(overhead, "profile", Recorded)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    call = OnGpu()
    assert call.n_kernels("both") == 2
    assert call.calls == ["both"]


def result_of_a_gpu():
    timings = [
        Timing("both", "torch eager", 0, 0, None, [40e-6, 42e-6, 44e-6], 7),
        Timing("both", "fused_xent", 0, 0, None, [21e-6], 3),
        Timing("host both", "fused_xent", 0, 0, None, [12.34e-6]),
    ]
    return Result("overhead", "tiny", (4, 9), "float32", timings=timings)


def test_table(capsys):
    tables.show(result_of_a_gpu(), tables.Output())
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[2] == "us ± x eager kernels"
    assert lines[4:] == [
        "forward + backward",
        "torch eager 42.0 5% 1.00 7",
        "fused_xent 21.0 0% 0.50 3",
        "forward + backward, host time",
        "fused_xent 12.3 0% - -",
    ]


def test_markdown():
    assert list(tables.markdown([result_of_a_gpu()])) == [
        "| microseconds per call (x eager) | torch eager | fused_xent |",
        "|---|---:|---:|",
        "| tiny 4x9 float32, forward + backward | 42.0 | 21.0 (0.50) |",
        "| tiny 4x9 float32, forward + backward, host time | - | 12.3 |",
    ]
    assert len(list(tables.markdown([result_of_a_gpu()], "both"))) == 3


def test_csv_has_the_kernel_count(tmp_path):
    run = Run({}, [result_of_a_gpu()])
    rows = list(run.csv_rows())
    assert [row[-1] for row in rows] == ["kernels", 7, 3, None]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(4.7e-6, "0.0047"), (8.2e-4, "0.8200"), (0.0123, "12.30")]
)
def test_compared_short_times_keep_their_digits(seconds, shown):
    assert milliseconds(seconds) == shown
