"""The fallback without kernels: the loss by torch operations, and ``python -m fused_xent``."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from cases import DTYPES, LABELS, make_logits, make_options, make_target
from compare import accumulation_dtype, assert_gradient, assert_loss, truth
from modes import MODES, has_mode, loss_and_gradient

import fused_xent
from fused_xent import __main__, _ops

pytestmark = pytest.mark.cpu("tests of the CPU fallback and of the report")
PACKAGE = Path(fused_xent.__file__).parent
D = torch.float64


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(_ops, "has_kernels", lambda tensor: False)
    monkeypatch.delattr(_ops, "forward")  # any use raises AttributeError


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("mode", MODES)
def test_numbers(mode, labels, dtype):
    if not has_mode(mode, dtype):
        pytest.skip("float16 has no fused mode")
    for shape in ((6, 50), (2, 7, 3), (9,)):
        logits = make_logits(shape, dtype)
        target = make_target(logits, LABELS[labels])
        target = target.to(dtype) if target.is_floating_point() else target
        options = make_options(logits, LABELS[labels])
        exact = truth(logits, target, 1.5, **options)
        loss, gradient = loss_and_gradient(logits, target, 1.5, mode, **options)
        assert_loss(loss, exact, accumulation_dtype(dtype))
        assert_gradient(gradient, exact, dtype)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("bad", [9, -1])
def test_target_out_of_range(bad):
    target = torch.tensor([[0, 1], [bad, 2]])
    message = rf"target must be in \[0, 9\) .*got {bad} at position \(1, 0\)"
    with pytest.raises(IndexError, match=message):
        fused_xent.cross_entropy(torch.zeros(2, 9, 2), target)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("shape", [(9, 1), (3, 3), (1,), (8,)], ids=str)
def test_weights_of_wrong_shape_are_refused(shape):
    """Without kernels, Python must check the shapes."""
    logits, target = torch.zeros(9, 9), torch.arange(9)
    for name, rule in (("weight", "have shape"), ("token_weight", "have the unreduced loss's")):
        with pytest.raises(ValueError, match=f"{name} must {rule}"):
            fused_xent.cross_entropy(logits, target, **{name: torch.ones(shape)})


def test_cuda_needs_the_library_with_the_schemas(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_ops, "LOAD_ERROR", "it is not there")
    assert _ops._load_cuda() == "it is not there"


@pytest.mark.parametrize("problem", ["", "the kernels need a newer driver"])
def test_an_old_driver_is_reported_at_load(problem, monkeypatch):
    """Torch's operations run then: the kernels would fail at their first call."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_ops, "LOAD_ERROR", None)
    monkeypatch.setattr(_ops, "_load", lambda name, missing: None)
    problems = SimpleNamespace(cuda_driver_problem=lambda: problem)
    monkeypatch.setattr(torch, "ops", SimpleNamespace(fused_xent=problems))
    assert _ops._load_cuda() == (problem or None)


WITHOUT_LIBRARY = """
import torch, fused_xent
assert fused_xent.cpu_capability() is None
assert fused_xent.empty_cache() == 0
logits = torch.randn(4, 9, requires_grad=True)
loss = fused_xent.cross_entropy(logits, torch.arange(4), label_smoothing=0.1)
expected = torch.nn.functional.cross_entropy(logits, torch.arange(4), label_smoothing=0.1)
torch.testing.assert_close(loss, expected)
gradients = [torch.autograd.grad(value, logits) for value in (loss, expected)]
torch.testing.assert_close(*gradients)
"""


@pytest.mark.parametrize("library", ["missing", "broken"])
def test_package_without_a_working_library(library, tmp_path):
    """The loss works, and ``python -m fused_xent`` gives the reason for torch operations."""
    copy = shutil.copytree(PACKAGE, tmp_path / "fused_xent")
    for binary in copy.glob("_C*"):
        binary.unlink() if library == "missing" else binary.write_bytes(b"not a library")

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    used = run("-c", WITHOUT_LIBRARY)
    assert used.returncode == 0, used.stderr
    report = run("-m", "fused_xent")
    assert report.returncode == 0, report.stderr
    missing = f"no native library in {tmp_path / 'fused_xent'}"
    reason = missing if library == "missing" else "_C"
    assert reason in report.stdout
    assert "torch operations" in report.stdout


WITH_CUDA = """
import sys, torch
torch.version.cuda = sys.argv[1] or None
from fused_xent import __main__, _ops
print(_ops.CUDA_LOAD_ERROR)
with torch._subclasses.FakeTensorMode():  # pretends that there is a GPU
    tensors = [torch.empty(0, device=name) for name in ("cpu", "meta", "cuda")]
assert [x.device.type for x in tensors] == ["cpu", "meta", "cuda"]
print([_ops.has_kernels(tensor) for tensor in tensors])
"""


@pytest.mark.parametrize(
    ("library", "cuda", "reason"),
    [
        ("missing", "13.0", r"built without CUDA kernels \(no nvcc at build time\)"),
        ("broken", "13.0", r".*_C_cuda\.abi3\.so.*"),
        ("broken", "", rf"this torch \({re.escape(torch.__version__)}\) has no CUDA"),
    ],
    ids=["missing", "broken", "torch"],
)
def test_broken_cuda_library(library, cuda, reason, tmp_path):
    """The CPU kernels still work."""
    copy = shutil.copytree(PACKAGE, tmp_path / "fused_xent")
    (copy / "_C_cuda.abi3.so").unlink(missing_ok=True)
    if library == "broken":
        (copy / "_C_cuda.abi3.so").write_bytes(b"not a library")
    result = subprocess.run(
        [sys.executable, "-c", WITH_CUDA, cuda], cwd=tmp_path, capture_output=True, text=True
    )
    assert re.fullmatch(rf"{reason}\n\[True, True, False\]\n", result.stdout), result


def test_report(run_python):
    report = run_python("-m", "fused_xent")
    assert report.returncode == 0, report.stdout + report.stderr
    reason = _ops.CUDA_LOAD_ERROR
    state = f"torch operations, because {reason}" if reason else "native kernels"
    assert f"\nCUDA: {state}" in report.stdout
    assert report.stdout.endswith("\nall errors are within the limits\n")
    assert f"fused_xent {fused_xent.__version__}" in report.stdout
    assert f"instruction set {fused_xent.cpu_capability()}" in report.stdout
    assert "WRONG" not in report.stdout


PARTS = ("loss", "gradient", "lse", "entropy", "z_loss")


class Wrong(NamedTuple):
    """Simulates a faulty kernel: changes one part of the results, for the selected calls."""

    part: str
    change: Callable = lambda x: x * 1.001
    mode: str | None = None
    dtype: torch.dtype | None = None
    soft: bool | None = None
    all_options: bool | None = None

    def applies_to(self, input, target, options) -> bool:
        """Return True if the fault affects this call."""
        return (
            (self.mode is None or options.get(self.mode, False))
            and self.dtype in (None, input.dtype)
            and self.soft in (None, target.is_floating_point())
            and self.all_options in (None, "softcap" in options)
        )

    def loss(self, input, target, **options):
        loss = fused_xent.cross_entropy(input, target, **options)
        if not self.applies_to(input, target, options):
            return loss
        if self.part == "gradient":
            return self.change(loss) + (loss - self.change(loss)).detach()
        return self.change(loss) if self.part == "loss" else loss

    def statistics(self, input, target, **options):
        results = fused_xent.cross_entropy_with_statistics(input, target, **options)
        if self.part not in PARTS[2:] or not self.applies_to(input, target, options):
            return results
        return results._replace(**{self.part: self.change(getattr(results, self.part))})


def first_row_is_nan(x):
    return x.index_fill(0, torch.tensor(0), torch.nan)


WRONG = {  # the fault, and the least number of the 16 lines that must report it
    **{part: (Wrong(part), 8) for part in PARTS},
    **{
        f"NaN for {part}": (Wrong(part, first_row_is_nan), 8)
        for part in PARTS
        if part != "gradient"
    },
    **{f"float64 {part}": (Wrong(part, lambda x: x * (1 + 1e-10), dtype=D), 2) for part in PARTS},
    "loss of bfloat16": (Wrong("loss", dtype=torch.bfloat16), 4),
    "loss of float16": (Wrong("loss", dtype=torch.float16), 4),
    "loss inplace": (Wrong("loss", mode="inplace_backward"), 16),
    "loss of the fused mode": (Wrong("loss", mode="grad_in_forward"), 12),
    "loss of probabilities": (Wrong("loss", soft=True), 8),
    "loss of all options": (Wrong("loss", all_options=True), 8),
    "loss of indices, plain": (Wrong("loss", soft=False, all_options=False), 4),
}


@pytest.mark.parametrize("name", WRONG)
def test_report_of_a_wrong_kernel(name, monkeypatch, capsys):
    """A fault in any kind of result or call is reported as WRONG and sets the exit status."""
    wrong, least = WRONG[name]
    monkeypatch.setattr(__main__, "SHAPES", ((8, 100), (2, 5, 3)))
    assert __main__.main([]) == 0
    assert "WRONG" not in capsys.readouterr().out
    monkeypatch.setattr(__main__, "cross_entropy", wrong.loss)
    monkeypatch.setattr(__main__, "cross_entropy_with_statistics", wrong.statistics)
    assert __main__.main([]) == 1
    *_, last = report = capsys.readouterr().out.splitlines()
    n_wrong = sum(line.endswith("  WRONG") for line in report)
    assert n_wrong >= least
    assert last == f"{n_wrong} lines are WRONG"


@pytest.mark.parametrize("index", range(3))
def test_report_of_one_wrong_shape(index, monkeypatch):
    """The fault is found in any of the shapes that are checked."""
    shapes = ((8, 100), (4, 10), (2, 5, 3))
    monkeypatch.setattr(__main__, "SHAPES", shapes)

    def wrong(input, *arguments, **options):
        loss = fused_xent.cross_entropy(input, *arguments, **options)
        return loss * 1.001 if input.shape == shapes[index] else loss

    monkeypatch.setattr(__main__, "cross_entropy", wrong)
    assert __main__.main([]) == 1


def test_report_into_a_closed_pipe(run_python):
    script = "import subprocess as s, sys; p = s.Popen([sys.executable, '-m', 'fused_xent'], "
    script += "stdout=s.PIPE, stderr=s.PIPE); p.stdout.readline(); p.stdout.close(); "
    script += "print(p.stderr.read().decode())"
    assert run_python("-c", script).stdout.strip() == ""


def test_unknown_instruction_set(run_python):
    report = run_python("-m", "fused_xent", FUSED_XENT_CPU_CAPABILITY="sse")
    assert report.returncode == 1
    assert "must be avx512_bf16, avx512, avx2 or portable, got 'sse'" in report.stdout
    assert "Traceback" not in report.stderr


def test_version(run_python):
    report = run_python("-m", "fused_xent", "--version")
    assert (report.returncode, report.stdout) == (0, f"{fused_xent.__version__}\n")


GPUS = {  # compute capability, and what the report says if CUDA kernels are loaded
    (7, 5): "no kernels: compute capability 8.0 is the least",
    (8, 0): "native kernels",
    (9, 0): "native kernels, clusters of blocks for long rows in fused mode",
    (12, 0): "native kernels, clusters of blocks for long rows in fused mode",
}


@pytest.fixture
def two_gpus(monkeypatch):
    """Pretends that there are two GPUs of the given compute capability."""

    def pretend(capability):
        class Properties:
            name, (major, minor) = "Some GPU", capability

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return pretend


@pytest.mark.parametrize("error", [None, "some reason, and another", "same"])
@pytest.mark.parametrize("capability", GPUS)
def test_report_of_gpus(capability, error, two_gpus, monkeypatch, capsys):
    """Each GPU is listed with its kernels, and checked if it has any."""
    two_gpus(capability)
    monkeypatch.setattr(_ops, "CUDA_LOAD_ERROR", error)
    monkeypatch.setattr(_ops, "LOAD_ERROR", error if error == "same" else None)
    checked = []
    monkeypatch.setattr(__main__, "print_checks", lambda device: checked.append(device) or 0)
    assert __main__.main([]) == 0
    report = capsys.readouterr().out.splitlines()
    said = {
        None: ("native kernels", GPUS[capability]),
        "same": ("torch operations, as on the CPU", "torch operations"),
        "some reason, and another": (
            "torch operations, because some reason, and another",
            "torch operations",
        ),
    }[error]
    if capability < (8, 0):
        said = said[0], GPUS[capability]
    assert f"CUDA: {said[0]}" in report
    shown = f"compute capability {capability[0]}.{capability[1]}: {said[1]}"
    assert [line for line in report if "GPU" in line] == [
        f"  GPU {index}: Some GPU, {shown}" for index in range(2)
    ]
    assert checked == (["cpu", "cuda"] if capability >= (8, 0) else ["cpu"])


def test_exit_status_counts_every_device(two_gpus, monkeypatch, capsys):
    two_gpus((9, 0))
    monkeypatch.setattr(__main__, "print_checks", lambda device: 2 if device == "cuda" else 1)
    assert __main__.main([]) == 1
    assert capsys.readouterr().out.endswith("\n3 lines are WRONG\n")
