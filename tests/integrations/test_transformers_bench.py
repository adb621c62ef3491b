"""The benchmark of training steps."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from bench import transformers as command
from bench.results import Run

pytestmark = pytest.mark.cpu("measures the CPU")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(command, "CASES", {"tiny": (2, 8, 300)})


def test_measures_every_provider(tiny, tmp_path):
    file = tmp_path / "results.json"
    options = ["--dtype", "float32", "--rounds", "1", "--json", str(file)]
    assert command.main(["tiny", *options]) == 0
    (result,) = Run.read_json(file).results
    assert not result.failures
    assert [timing.provider for timing in result.timings] == list(command.PROVIDERS)
    assert all(len(timing.seconds) == command.STEPS - 1 for timing in result.timings)


def test_every_provider_does_what_its_name_says(monkeypatch):
    applied = []
    import fused_xent.integrations.transformers as integration

    apply = integration.apply

    def spy(model, **options):
        applied.append(options)
        return apply(model, **options)

    monkeypatch.setattr(integration, "apply", spy)
    names = [name for name in command.PROVIDERS if name != command.BARE]
    losses = [command.work(name, [2, 8, 300], "float32", 0.25)["losses"] for name in names]
    assert applied == [{}, {"fuse_head": True}, {"fuse_head": True, "drop_ignored": True}]
    for found in losses[1:]:
        assert found == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_bare_products_are_three():
    with FlopCounterMode(display=False) as counter:
        command.work(command.BARE, [2, 8, 300], "float32", 0.25)
    one = 2 * 16 * command.WIDTH * 300
    assert counter.get_total_flops() == command.STEPS * 3 * one


def test_wrong_losses_are_told():
    assert command.why_wrong([2.0, 1.5], [2.0, 1.5], "float32") == ""
    reason = command.why_wrong([2.0, 1.501], [2.0, 1.5], "float32")
    assert reason == "WrongResult: the loss of step 1 is 1.501, expected 1.5"
    assert command.why_wrong([2.0, float("nan")], [2.0, 1.5], "bfloat16")
