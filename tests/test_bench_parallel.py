"""The benchmark of a vocabulary that is split over processes."""

import json

import pytest
import torch

from bench import parallel
from bench.results import Run

pytestmark = pytest.mark.cpu("uses gloo between processes")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(parallel, "CASES", {"tiny": (5, 64), "linear": (6, 8, 64)})


def test_measures_every_provider_in_turn(tiny, tmp_path):
    file = tmp_path / "results.json"
    options = ["--dtype", "float32", "--dtype", "bfloat16", "--rounds", "2", "--json", str(file)]
    assert parallel.main(["tiny", *options]) == 0
    run = Run.read_json(file)
    assert [result.dtype for result in run.results] == ["float32", "bfloat16"]
    for result in run.results:
        assert result.options == {"processes": 2}
        assert not result.failures
        assert [timing.provider for timing in result.timings] == list(parallel.PROVIDERS)
        assert all(len(timing.seconds) == 2 for timing in result.timings)
        size = 4 if result.dtype == "float32" else 2
        assert {timing.bytes for timing in result.timings} == {3 * 5 * 32 * size}


def test_measures_a_linear_layer(tiny, tmp_path):
    file = tmp_path / "results.json"
    options = ["--dtype", "float32", "--rounds", "2", "--json", str(file)]
    assert parallel.main(["linear", *options]) == 0
    (result,) = Run.read_json(file).results
    assert result.benchmark == "linear"
    assert not result.failures
    assert [timing.provider for timing in result.timings] == list(parallel.LINEAR_PROVIDERS)
    # Three products of 6 rows, 8 features and half of the classes.
    assert {timing.operations for timing in result.timings} == {3 * 2 * 6 * 8 * 32}


WRONG = """
import json, os, sys, argparse
from bench import parallel
import torch
right = parallel.PROVIDERS["fused_xent"]
parallel.PROVIDERS["fused_xent"] = lambda logits, target: right(logits, target.flip(0))
parallel.work(argparse.Namespace(**json.loads(sys.argv[1])))
os._exit(0)  # as bench/parallel.py does
"""


def test_a_wrong_provider_is_not_timed(tmp_path, monkeypatch, run_python):
    out, wrong = tmp_path / "out", ["fused_xent", "three all-reduces"]
    given = {"store": str(tmp_path / "store"), "out": str(out), "shape": [5, 8], "rounds": 1}
    given |= {"dtype": "float32", "n": 1, "rank": 0, "providers": wrong}
    result = run_python("-W", "ignore", "-c", WRONG, json.dumps(given))
    assert result.returncode == 0, result.stderr
    found = json.loads(out.read_text())
    assert list(found["samples"]) == ["three all-reduces"]
    assert "WrongResult: loss differs by" in found["failures"]["fused_xent"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["32k"], "case must be one of 128k, 8k, linear, got '32k'"),
        (["--processes", "1"], "must be an integer of at least 2, got '1'"),
        (["--device", "cuda"], "--device must be cpu"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parallel.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_bound_with_communication_gathers_12_bytes_a_row(monkeypatch):
    sent = []
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        parallel.dist,
        "all_gather_into_tensor",
        lambda all_ranks, own: sent.append((all_ranks.shape, own.nbytes)),
    )
    logits, target = torch.randn(5, 7), torch.tensor([0, 6, 7, 13, 2])
    loss = parallel.local_part_and_gather(logits, target)
    assert sent == [((10, 3), 5 * 12)]
    assert torch.equal(loss, parallel.local_part(logits, target))
