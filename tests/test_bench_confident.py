"""`python -m bench confident`: the exact loss, and the files that it writes."""

import json
import math

import pytest
import torch

from bench import confident
from bench.__main__ import main

pytestmark = pytest.mark.cpu("a benchmark")


def test_exact_loss_has_all_digits_of_certain_rows():
    logits = torch.zeros(1, 5)
    logits[0, 2] = 60.0
    expected = 4 * math.exp(-60)
    assert confident.exact_loss(logits, torch.tensor([2])) == pytest.approx(
        expected, rel=1e-12, abs=0
    )


def test_both_losses_train_alike_while_rows_are_uncertain(tmp_path, capsys):
    assert main(["confident", "--steps", "60", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "confident.json").read_text())
    ours, torchs = (content["exact_loss"][name] for name in ("fused_xent", "torch eager"))
    assert len(ours) == content["steps"] == 60
    assert ours[-1] < 0.1 * ours[0]
    assert ours == pytest.approx(torchs, rel=1e-3)
    assert (tmp_path / "confident.png").stat().st_size > 1000
    assert "confident.json" in capsys.readouterr().out


def test_folder_must_exist(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["confident", "--steps", "1", "--out", str(tmp_path / "none")])
    assert "--out must be an existing folder, got" in capsys.readouterr().err
