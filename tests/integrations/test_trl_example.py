"""examples/sft_trl.py logs the same with and without fused_xent, and learns."""

import pytest
from test_examples import load

pytestmark = [
    pytest.mark.cpu("trains on the CPU"),
    pytest.mark.filterwarnings("ignore"),  # of the frameworks
]


def test_sums_are_learned(capsys):
    logs = load("sft_trl").main()
    assert "fused: trainer.model" in capsys.readouterr().out
    assert logs[-1]["loss"] < logs[0]["loss"] / 3
    assert logs[-1]["mean_token_accuracy"] > 0.8


def test_curves_are_equal():
    example = load("sft_trl")
    curves = [example.main(uses_fused_xent, steps=10) for uses_fused_xent in (False, True)]
    for one, other in zip(*curves, strict=True):
        for name in ("loss", "entropy", "mean_token_accuracy", "grad_norm"):
            assert abs(one[name] - other[name]) < 1e-3 * (1 + abs(one[name])), name
