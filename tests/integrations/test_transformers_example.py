"""The example of transformers learns, and its losses are those without a fused head."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.cpu("trains a model on the CPU"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
FILE = Path(__file__).parents[2] / "examples" / "train_transformers.py"


def test_example():
    spec = importlib.util.spec_from_file_location("train_transformers", FILE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    losses = example.main()
    assert losses[0] > 9
    assert losses[-1] < 3
    assert len(FILE.read_text().splitlines()) < 100
    of_heads = [torch.tensor(example.main(fuse_head, max_steps=3)) for fuse_head in (True, False)]
    torch.testing.assert_close(*of_heads, rtol=1e-3, atol=0)
