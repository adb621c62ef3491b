"""The benchmark of a linear layer's loss: what it measures is checked, what it is told as well."""

import json

import pytest
import torch

import fused_xent
from bench import linear
from bench.device import PeakMemory

SMALL = ["--rows", "24", "--features", "16", "--vocab", "50", "--rounds", "2"]
pytestmark = pytest.mark.cpu("runs the benchmark, which has an option for the device")


def test_table_and_samples(tmp_path, capsys):
    path = tmp_path / "linear.json"
    options = ["--dtype", "float32", "--dtype", "bfloat16", "--json", str(path)]
    assert linear.main([*SMALL, "--device", "cpu", *options]) == 0
    table = capsys.readouterr().out
    results = json.loads(path.read_text())["results"]
    assert [result["dtype"] for result in results] == ["float32", "bfloat16"]
    for result in results:
        names = [measured["provider"] for measured in result["measurements"]]
        assert names[0] == linear.BARE
        assert names[-1] == "fused_xent"
        assert all(name in table for name in names)
        assert all(len(measured["seconds"]) == 2 for measured in result["measurements"])
        for measured in result["measurements"][1:]:
            assert all(0 < error < 1e-2 for error in measured["errors"].values())


def wrong_loss(hidden, linear_weight, target):
    return fused_xent.linear_cross_entropy(hidden, linear_weight, target) * 1.1


def wrong_gradient(hidden, linear_weight, target):
    half = fused_xent.linear_cross_entropy(hidden, linear_weight.detach(), target)
    loss = fused_xent.linear_cross_entropy(hidden, linear_weight, target)
    return loss + 0.1 * (half - half.detach())


def breaks(hidden, linear_weight, target):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("liar", [wrong_loss, wrong_gradient, breaks])
def test_providers_that_are_wrong_are_not_timed(liar, monkeypatch, capsys):
    known = linear.providers

    def with_liar(device):
        found, missing = known(device)
        return {"liar": liar} | found, missing

    monkeypatch.setattr(linear, "providers", with_liar)
    assert linear.main([*SMALL, "--device", "cpu", "--dtype", "float32"]) == 1
    output = capsys.readouterr()
    assert "FAILED" in output.err
    assert "liar" in output.err
    assert "liar" not in output.out
    assert "fused_xent" in output.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt9"], "case must be one of llama2, llama3, got 'gpt9'"),
        (["--rows", "3"], "--rows, --features and --vocab must be given together"),
        (["--rounds", "0"], "must be an integer of at least 1, got '0'"),
        (["--json", "/nowhere/x.json"], "--json must be in an existing folder"),
    ],
)
def test_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        linear.main(["--device", "cpu", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="of this process, not of a GPU")
def test_peak_of_this_processs_memory():
    size = 64 << 20
    with PeakMemory("cpu") as memory:
        torch.ones(size, dtype=torch.uint8)  # freed at once
        kept = torch.ones(size // 2, dtype=torch.uint8)
    margin = size // 8  # the system counts pages by the dozen
    assert memory.bytes is None or size - margin <= memory.bytes < size + margin
    assert kept.numel() == size // 2
