"""The demo: its text, the order of its runs, the comparison of losses, a training step."""

import sys
from array import array
from contextlib import suppress
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

import fused_xent
from bench import demo, demo_training

pytestmark = pytest.mark.cpu("runs the demo, which has an option for the device")


class StandIn:
    """A run with made-up steps and summary; the seconds differ between runs."""

    made: ClassVar[list] = []
    losses: ClassVar[dict] = {}  # (loss function, step): what is added to the loss

    def __init__(self, loss, tokens_file=None, n_tokens=0, device=()):
        self.loss, self.device, self.n_tokens = loss, list(device), n_tokens
        with open(tokens_file or "/dev/null", "rb") as file:
            self.tokens = array("i", file.read())
        self.steps, self.summary, self.process = [], None, self
        self.made.append(self)

    def step(self):
        i, k = len(self.steps), self.made.index(self) + 1
        loss = 5.0 - i + self.losses.get((self.loss, i), 0.0)
        seconds = (0.012 if i else 9.0) / k  # a slow first step changes the mean only
        self.steps.append({"loss": loss, "loss_seconds": seconds, "step_seconds": 2 * seconds})

    def finish(self):
        n_bytes = 300_000_000 * (self.made.index(self) + 1)
        self.summary = {"device": "cpu", "place": "2 threads", "peak_bytes": n_bytes}

    def kill(self):
        self.summary["killed"] = True

    def poll(self):
        return 0

    def wait(self):
        return 0

    column = demo.Run.column


@pytest.fixture
def stand_ins(monkeypatch):
    """Replaces the runs by stand-ins, on a text of three distinct tokens."""
    monkeypatch.setattr(StandIn, "made", [])
    monkeypatch.setattr(StandIn, "losses", {})
    monkeypatch.setattr(demo, "Run", StandIn)
    monkeypatch.setattr(demo, "library_sources", lambda: ["ab ab cd"])
    monkeypatch.setattr(demo, "MIN_VOCAB_SIZE", 3)
    monkeypatch.setattr(demo, "STEPS", 4)
    monkeypatch.setattr(sys, "argv", ["demo", "--device", "cpu"])
    return StandIn


def test_table_of_the_demo(stand_ins, capsys):
    """Medians, their ratios to torch, and the losses at the first, middle and last step."""
    stand_ins.losses["fused_xent", 2] = -2e-6
    assert demo.main() == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    text = "5 tokens of Python's standard library, 3 distinct; 4 of 4 float32 steps on 2 threads"
    assert lines[0] == f"{text}, medians"
    assert lines[2:] == [
        "torch fused_xent fused_xent fused",
        "loss at step 1 5.000000 5.000000 5.000000",
        "loss at step 3 3.000000 2.999998 3.000000",
        "loss at step 4 2.000000 2.000000 2.000000",
        "largest difference - 2.0e-06 0.0e+00",
        "time in the loss 12.0 ms (1.0x) 6.0 ms (2.0x) 4.0 ms (3.0x)",
        "time per step 24.0 ms (1.0x) 12.0 ms (2.0x) 8.0 ms (3.0x)",
        "peak memory 300 MB 600 MB 900 MB",
        *("", "The loss curves agree to 1e-05."),
    ]
    for run in stand_ins.made:
        assert run.device == ["--device", "cpu"]
        assert run.n_tokens == len(run.tokens) == 5


@pytest.mark.parametrize(
    ("step", "off", "status"),
    [(0, 2e-5, 1), (3, -2e-5, 1), (2, float("nan"), 1), (1, 5e-6, 0)],
)
@pytest.mark.parametrize("loss", ["fused_xent", "fused_xent fused"])
def test_curves_must_agree(loss, step, off, status, stand_ins, capsys):
    stand_ins.losses[loss, step] = off
    assert demo.main() == status
    assert ("DISAGREE" in capsys.readouterr().out) == bool(status)


def test_runs_take_turns(stand_ins, monkeypatch):
    order = []
    monkeypatch.setattr(StandIn, "step", lambda run: order.append(run.loss))
    runs = [StandIn("a"), StandIn("b")]
    assert list(demo.train(runs)) == [1, 2, 3, 4]
    assert order == ["a", "b"] * 4
    order.clear()
    now = iter([0.0, 50.0, 91.0])  # the second round ends past the time limit
    monkeypatch.setattr(demo, "perf_counter", lambda: next(now))
    assert list(demo.train(runs)) == [1, 2]
    assert order == ["a", "b"] * 2


def test_too_small_a_vocabulary_is_refused(stand_ins, monkeypatch):
    monkeypatch.setattr(demo, "MIN_VOCAB_SIZE", 4)
    with pytest.raises(SystemExit, match="only 3 distinct tokens"):
        demo.main()


def test_missing_device_is_refused(stand_ins, monkeypatch, capsys):
    monkeypatch.setattr(demo, "why_not", lambda device: f"no {device}")
    monkeypatch.setattr(sys, "argv", ["demo", "--device", "cuda"])
    with pytest.raises(SystemExit) as error:
        demo.main()
    assert error.value.code == 2
    assert "no cuda" in capsys.readouterr().err


def test_words_and_characters(monkeypatch):
    """The most frequent words are tokens; all others are spelled as characters."""
    sources = ["the cat the cat the", "hat+"]
    monkeypatch.setattr(demo, "VOCAB_SIZE", 9)  # " +aceht" and two words
    tokens, n_different = demo.encode(sources)
    vocabulary = [*" +aceht", "the", "cat"]
    assert [vocabulary[i] for i in tokens] == [
        *("the", " ", "cat", " ", "the", " ", "cat", " ", "the"),
        *"hat+",
    ]
    assert n_different == 7
    assert tokens.itemsize == 4
    monkeypatch.setattr(demo, "VOCAB_SIZE", 8)
    tokens, _ = demo.encode(sources)
    assert [vocabulary[i] for i in tokens][:5] == ["the", " ", *"cat"]


def test_text_excludes_tests_of_the_library(tmp_path, monkeypatch):
    for name in ("a.py", "x/b.py", "test/c.py", "x/tests/d.py", "site-packages/e.py", "f.txt"):
        path = tmp_path / "tests" / name  # a parent folder named tests is no reason to exclude
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() + b"\xff")
    paths = {"stdlib": str(tmp_path / "tests")}
    monkeypatch.setattr(demo.sysconfig, "get_paths", lambda: paths)
    assert demo.library_sources() == ["a.py\ufffd", "x/b.py\ufffd"]


class Ticks:
    """A clock whose marks are consecutive numbers."""

    def __init__(self):
        self.n = 0

    def mark(self):
        self.n += 1
        return self.n

    def seconds(self, first, last):
        return 10.0**last - 10.0**first


def trained(loss, n_steps=3):
    """Return a training on a few words, and the results of its first steps."""
    tokens = torch.arange(1000, dtype=torch.int32) % 37
    training = demo_training.Training(loss, tokens, 40, "cpu")
    return training, [training.step() for _ in range(n_steps)]


@pytest.fixture(scope="module")
def losses_of_torch():
    return [step["loss"] for step in trained("torch", 5)[1]]


@pytest.mark.parametrize("loss", demo_training.LOSSES)
def test_each_loss_gives_the_same_training(loss, losses_of_torch):
    """The loss also decreases."""
    _, steps = trained(loss, 5)
    losses = [step["loss"] for step in steps]
    assert losses == pytest.approx(losses_of_torch, abs=1e-5)
    assert losses[-1] < 0.9 * losses[0]
    assert 0.5 * losses[0] < torch.tensor(40.0).log() < 1.5 * losses[0]


def test_step_clears_gradients_and_updates_parameters():
    training, _ = trained("torch", 0)
    before = training.model.head.weight.detach().clone()
    training.step()
    assert all(parameter.grad is None for parameter in training.model.parameters())
    assert not torch.equal(before, training.model.head.weight)


def test_losses_of_the_demo(monkeypatch):
    assert tuple(demo_training.LOSSES) == demo.LOSSES
    assert demo_training.LOSSES["torch"] is F.cross_entropy
    assert demo_training.LOSSES["fused_xent"] is fused_xent.cross_entropy
    fused = demo_training.LOSSES["fused_xent fused"]
    assert (fused.func, fused.keywords) == (fused_xent.cross_entropy, {"grad_in_forward": True})


def test_targets_are_the_next_words():
    training, _ = trained("torch", 0)
    inputs, target = training.batch()
    assert inputs.shape == (8, 128)
    assert torch.equal((inputs.flatten() + 1) % 37, target % 37)
    assert torch.equal(inputs[:, 1:], target.view(8, 128)[:, :-1])


def test_model_is_causal():
    training, _ = trained("torch", 0)
    words = torch.randint(40, (1, 128))
    others = torch.cat([words[:, :60], torch.randint(40, (1, 68))], 1)
    with torch.no_grad():
        logits, other_logits = (training.model(one) for one in (words, others))
    assert logits.shape == (128, 40)
    torch.testing.assert_close(logits[:60], other_logits[:60], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits[60:], other_logits[60:], atol=1e-2)


@pytest.mark.parametrize("loss", demo_training.LOSSES)
def test_seconds_of_a_step(loss):
    """loss_seconds: forward of the loss, and backward up to the head; step_seconds: everything."""
    training, _ = trained(loss, 0)
    training.clock = Ticks()
    step = training.step()
    # Marks: start, before and after the loss, before backward, at the logits' gradient, end.
    assert step["loss_seconds"] == 10**3 - 10**2 + 10**5 - 10**4
    assert step["step_seconds"] == 10**6 - 10


def test_a_run_is_a_process(tmp_path, monkeypatch):
    """The process answers each request with a step, and ends with a summary."""
    (tmp_path / "tokens").write_bytes(array("i", [i % 37 for i in range(1000)]).tobytes())
    monkeypatch.setattr(demo, "VOCAB_SIZE", 40)
    monkeypatch.chdir(demo.Path(demo.__file__).parents[1])
    run = demo.Run("fused_xent", str(tmp_path / "tokens"), 1000, ["--device", "cpu"])
    try:
        run.step()
        run.step()
        run.finish()
    finally:
        run.process.kill()
        run.process.wait()
        run.process.stdout.close()
    assert run.process.returncode == 0
    _, expected = trained("fused_xent", 2)
    assert run.column("loss") == pytest.approx([one["loss"] for one in expected])
    assert run.summary["device"] == "cpu"
    assert run.summary["place"].endswith(" threads")
    assert 50e6 < run.summary["peak_bytes"] < 20e9


def test_a_run_that_fails_ends_the_demo(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    run = demo.Run("fused_xent", "nowhere", 1000, [])
    try:
        with pytest.raises(SystemExit, match="the run with fused_xent ended early"):
            run.step()
    finally:
        run.process.wait()
        run.process.stdout.close()
        with suppress(BrokenPipeError):
            run.process.stdin.close()
