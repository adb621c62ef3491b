"""The benchmark of sparse labels and selected classes: its command, checks, figures and peers."""

import pytest
import torch
import torch.nn.functional as F
from test_bench_adapters import module

from bench import __main__ as bench
from bench import linear, sparse
from bench.cases import SparseCase, bytes_moved, dense_labels, operations
from bench.check import Check, WrongResult
from bench.providers import Request, Unsupported, gather
from bench.results import Run
from bench.timing import Workload

pytestmark = pytest.mark.cpu("runs the benchmark, which has an option for the device")
SHAPES = {"labels": (24, 50), "selected": (24, 50), "hidden": (24, 16, 50)}
KINDS = {
    "labels": SparseCase("labels", (24, 50), n_labels=6),
    "selected": SparseCase("selected", (24, 50), n_labels=6, selected=True),
}


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sparse.CASES, "cpu", SHAPES)
    path = tmp_path / "sparse.json"
    options = ["--device", "cpu", "--rounds", "2", "--k", "6", "--json", str(path)]
    names = ["torch eager", "fused_xent", "trl"]
    providers = [word for name in names for word in ("--provider", name)]
    assert bench.main(["sparse", *options, *providers]) == 0
    printed = capsys.readouterr().out
    labels, selected, hidden = results = Run.read_json(path).results
    assert [result.title for result in results] == [
        "labels  24x50  bfloat16  sparse labels  k 6",
        "selected  24x50  bfloat16  selected classes  k 6",
        "hidden  24x16x50  bfloat16  selected classes  k 6",
    ]
    assert all(result.title in printed for result in results)
    ours = {"fused_xent", "fused_xent inplace"}
    assert set(labels.errors) == {"torch eager", *ours, "fused_xent fused"}
    assert set(selected.errors) == {"torch eager", *ours}
    assert set(hidden.errors) == {"torch eager", "fused_xent"}
    assert [result.absent["trl"] for result in results] == [
        "has no loss of sparse labels",
        "not installed: no module trl",
        "takes logits only",
    ]
    n, k = 24 * 50 * 2, 24 * 6 * 8  # bytes of logits, and of classes
    assert labels.find("both", "fused_xent").bytes == 3 * n + 2 * k
    assert labels.find("both", "fused_xent fused").bytes == 2 * n + k
    assert selected.find("forward", "fused_xent").bytes == n + k
    assert {timing.operations for timing in hidden.timings} == {4 * 2 * 24 * 16 * 50}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "1025", "none"], "--k must be at most 1024, got 1025"),
        (["--k", "0"], "must be an integer of at least 1, got '0'"),
        (["loss"], "case must be one of labels, selected, hidden, got 'loss'"),
    ],
)
def test_errors(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["sparse", "--device", "cpu", *arguments])
    assert message in capsys.readouterr().err


def test_quick_cases_are_small(monkeypatch):
    jobs = []
    monkeypatch.setattr(
        sparse, "measure_all", lambda command, options, found: (jobs.extend(found), 0)
    )
    assert sparse.main(["--device", "cpu", "--quick", "hidden", "labels"]) == 0
    assert [job.result.shape for job in jobs] == [(256, 256, 32000), (64, 32000)]
    assert sparse.main(["--device", "cpu"]) == 0
    assert [job.result.shape for job in jobs[2:]] == list(sparse.CASES["cpu"].values())
    assert {job.result.dtype for job in jobs} == {"bfloat16"}
    # Logits, their original, the gradient, dense labels, a temporary of both types, float64.
    n = 256 * 151936
    assert jobs[2].bytes_needed == n * (5 * 2 + 2 * 4) + (1 << 25) * 64


def test_dense_labels_add_up():
    logits, classes = torch.randn(2, 5), torch.tensor([[1, 1, 4, 0], [2, 2, 2, 2]])
    expected = torch.tensor([[0.25, 0.5, 0, 0, 0.25], [0, 0, 1, 0, 0]])
    assert torch.equal(dense_labels(logits, classes), expected)


def test_figures_of_several_classes():
    logits, classes = KINDS["labels"].tensors(torch.float32, "cpu")
    assert classes.shape == (24, 6)
    assert bytes_moved(logits, classes, "backward") == 2 * 4 * 24 * 50 + 8 * 24 * 6
    assert operations(logits, classes, "both") == 7 * 24 * 50


def workload_of(kind):
    return Workload(*KINDS[kind].tensors(torch.float32, "cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_right_results_pass(kind, monkeypatch):
    """Those of torch and of this package, also in chunks."""
    workload = workload_of(kind)
    losses = [
        provider.loss
        for adapter in (sparse.torch_eager, sparse.ours)
        for provider in adapter(Request(KINDS[kind], "float32", "cpu"))
    ]
    whole = Check(workload, KINDS[kind].options)
    monkeypatch.setattr("bench.check.CHUNK", 350)
    chunked = Check(workload, KINDS[kind].options)
    assert len(chunked.chunks) == 4
    for loss in losses:
        assert max(chunked(loss).values()) < 1e-5
        assert chunked(loss) == pytest.approx(whole(loss), rel=1e-6)
    logits, classes = workload.original, workload.original_target
    mean = -logits.double().log_softmax(1).gather(1, classes).mean()
    assert whole.loss == pytest.approx(mean.item(), rel=1e-12)


FAULTY = {
    "the first class alone": lambda logits, classes: F.cross_entropy(logits, classes[:, 0]),
    "repeated classes count once": lambda logits, classes: F.cross_entropy(
        logits, torch.zeros_like(logits).scatter(1, classes, 1 / classes.size(1))
    ),
    "rows add up": lambda logits, classes: 24 * sparse.torch_selected(logits, classes),
    "other classes have no gradient": lambda logits, classes: (
        sparse.torch_selected(logits.detach(), classes)
        - (logits - logits.detach()).gather(1, classes).mean()
    ),
    "targets are rounded": lambda logits, classes: sparse.torch_selected(
        logits.bfloat16(), classes
    ).float(),
}


@pytest.mark.parametrize("name", FAULTY)
def test_wrong_results_do_not_pass(name):
    check = Check(workload_of("selected"), KINDS["selected"].options)
    with pytest.raises(WrongResult):
        check(FAULTY[name])


@pytest.mark.parametrize("kind", KINDS)
def test_providers_of_16_bit_logits(kind):
    """The fused mode is of losses, and not of float16."""
    names = {
        dtype: [one.name for one in sparse.ours(Request(KINDS[kind], dtype, "cpu"))]
        for dtype in ("bfloat16", "float16")
    }
    common, fused = ["fused_xent", "fused_xent inplace"], ["fused_xent fused"]
    assert names["bfloat16"] == common + (fused if kind == "labels" else [])
    assert names["float16"] == common


def test_trl(monkeypatch):
    def selective_log_softmax(logits, index):
        return logits.log_softmax(-1).gather(-1, index)

    module(monkeypatch, "trl.trainer.utils", selective_log_softmax=selective_log_softmax)
    (provider,) = sparse.trl(Request(KINDS["selected"], "float32", "cpu"))
    Check(workload_of("selected"), KINDS["selected"].options)(provider.loss)
    with pytest.raises(Unsupported, match="no loss of sparse labels"):
        sparse.trl(Request(KINDS["labels"], "float32", "cpu"))


def test_torch_compile_compiles_for_each_case(monkeypatch):
    done = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: done.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda loss, **options: done.append(options) or loss)
    (found,) = sparse.torch_compile(Request(KINDS["selected"], "float32", "cpu"))
    ((_, of_hidden),) = sparse.linear_compile("cuda")
    assert done == ["reset", {"dynamic": False}] * 2
    assert (found.loss, of_hidden) == (sparse.torch_selected, sparse.unfused)
    _, absent = gather(sparse.LINEAR_ADAPTERS, "cpu", ["torch.compile"])
    assert absent == {"torch.compile": "needs a GPU"}


def test_a_linear_layer_is_checked_and_its_logits_are_computed_twice(monkeypatch):
    workload = linear.Workload((24, 16, 50), torch.float32, "cpu", 6)
    for loss in (sparse.unfused, sparse.our_linear):
        assert max(workload.check(loss).values()) < 1e-4
    with pytest.raises(WrongResult):
        workload.check(lambda *layer: 1.001 * sparse.unfused(*layer))
    runs = []
    monkeypatch.setattr(workload, "seconds", lambda run: runs.append(run()) or 1.0)
    assert workload.bare_seconds() == len(runs) == 4
    assert [x if x is None else x.shape for x in runs] == [None, None, (24, 16), (50, 16)]
    assert workload.operations == 4 * 2 * 24 * 16 * 50
