"""Bugs that users reported in other implementations, one test for each.

Names state the bug; the numbers are those of the project's list of bugs. Two that need several
processes or a GPU are not here: ranks that smooth differently (6), launches that wait for the host
(7).
"""

import pytest
import torch
import torch.nn.functional as F
from cases import make_logits
from compare import assert_gradient, assert_loss, truth
from modes import MODES, loss_and_gradient, roundings

import fused_xent

by_mode = pytest.mark.parametrize("mode", MODES)
N_ROWS, N_CLASSES = 8, 1003


@pytest.fixture
def problem():
    """Float32 logits, and targets with two ignored rows."""
    target = torch.randint(0, N_CLASSES, (N_ROWS,))
    target[2:4] = -100
    return make_logits((N_ROWS, N_CLASSES), torch.float32), target


def test_01_logits_overwritten_without_being_asked(problem):
    logits, target = problem
    before = logits.clone()
    leaf = logits.requires_grad_()
    fused_xent.cross_entropy(leaf, target).backward()
    assert torch.equal(leaf, before)
    assert leaf._version == 0


@by_mode
def test_02_one_upstream_gradient_used_for_all_rows(problem, mode):
    upstream = torch.linspace(0.5, 2, N_ROWS)
    exact = truth(*problem, upstream, reduction="none")
    _, gradient = loss_and_gradient(*problem, upstream, mode, reduction="none")
    assert_gradient(gradient, exact, torch.float32, roundings(mode))


@by_mode
def test_03_stride_0_upstream_gradient_read_out_of_bounds(problem, mode):
    exact = truth(*problem, 1.5, reduction="none")
    upstream = torch.tensor(1.5).expand(N_ROWS)
    _, gradient = loss_and_gradient(*problem, upstream, mode, reduction="none")
    assert_gradient(gradient, exact, torch.float32, roundings(mode))


def test_03_wrong_loss_for_transposed_logits(problem):
    logits, target = problem
    transposed = logits.T.contiguous().T
    exact = truth(logits, target)
    loss, gradient = loss_and_gradient(transposed, target)
    assert_loss(loss, exact, torch.float32)
    assert_gradient(gradient, exact, torch.float32)


def test_03_strided_classes_make_backward_return_logits(problem):
    logits, target = problem
    spread = torch.stack([logits, torch.full_like(logits, 1e9)], 2)[..., 0]
    loss, gradient = loss_and_gradient(spread, target)
    exact = truth(logits, target)
    assert_loss(loss, exact, torch.float32)
    assert_gradient(gradient, exact, torch.float32)


@by_mode
def test_04_mean_divides_by_ignored_rows_too(problem, mode):
    logits, target = problem
    kept = target != -100
    alone, _ = loss_and_gradient(logits[kept], target[kept], mode=mode)
    loss, _ = loss_and_gradient(logits, target, mode=mode)
    torch.testing.assert_close(loss, alone)


@by_mode
def test_04_weight_smoothing_and_ignored_rows_miscounted(problem, mode):
    options = {"weight": torch.rand(N_CLASSES) + 0.1, "label_smoothing": 0.2}
    exact = truth(*problem, **options)
    loss, gradient = loss_and_gradient(*problem, mode=mode, **options)
    assert_loss(loss, exact, torch.float32)
    assert_gradient(gradient, exact, torch.float32, roundings(mode))


@by_mode
def test_05_bfloat16_gradient_patched_after_rounding(mode):
    logits = torch.zeros(1, 256, dtype=torch.bfloat16)
    logits[0, 7] = 12.5  # p = 0.99905, which bfloat16 rounds to 1
    exact = truth(logits, torch.tensor([7]), reduction="sum")
    assert -1e-3 < exact.gradient[0, 7] < -9e-4
    _, gradient = loss_and_gradient(logits, torch.tensor([7]), mode=mode, reduction="sum")
    assert_gradient(gradient, exact, torch.bfloat16, roundings(mode))


@pytest.mark.filterwarnings("ignore")  # of torch.compile
def test_08_compiled_loss_of_ignored_rows_is_whatever_was_in_memory(problem):
    compiled = torch.compile(fused_xent.cross_entropy, backend="aot_eager", fullgraph=True)
    logits, target = problem
    loss = compiled(logits.requires_grad_(), target, reduction="none")
    assert (loss[target == -100] == 0).all()
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert (gradient[target == -100] == 0).all()
    assert (gradient[target != -100] != 0).all()


def test_09_offsets_of_32_bits():
    """More than 2**32 logits; rows share memory (stride 0), so they take little."""
    n_rows, n_classes = 2**24 + 3, 256
    logits = make_logits((1, n_classes), torch.float32).expand(n_rows, n_classes)
    assert logits.numel() > 2**32
    target = torch.full((n_rows,), 255, dtype=torch.uint8)
    target[-1] = 5
    loss = fused_xent.cross_entropy(logits, target, ignore_index=255)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:1], torch.tensor([5])))


def test_10_all_rows_ignored(problem):
    """As in torch, the mean is NaN and the sum 0; the gradient has no NaN."""
    logits, target = problem
    target = torch.full_like(target, -100)
    loss, gradient = loss_and_gradient(logits, target)
    assert loss.isnan()
    assert (gradient == 0).all()
    assert loss_and_gradient(logits, target, reduction="sum")[0] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_12_dtype_mismatch_under_autocast(problem, dtype, device):
    """16-bit logits of an autocast layer with a float32 class weight give a float32 loss."""
    layer = torch.nn.Linear(16, N_CLASSES)
    weight, target = torch.rand(N_CLASSES), problem[1]
    amp = torch.bfloat16 if dtype == torch.float32 else dtype
    with torch.autocast(device, dtype=amp, enabled=dtype != torch.float32):
        logits = layer(torch.randn(N_ROWS, 16))
        loss = fused_xent.CrossEntropyLoss(weight, label_smoothing=0.1)(logits, target)
    exact = truth(logits.detach(), target, weight=weight, label_smoothing=0.1)
    assert_loss(loss, exact, torch.float32)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert_gradient(gradient, exact, dtype)


def test_14_second_backward_under_retain_graph(problem):
    logits, target = problem
    loss = fused_xent.cross_entropy(logits.requires_grad_(), target)
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@by_mode
@pytest.mark.parametrize("n_classes", [1, 3, 7, 9, 131, 1003])
def test_15_padded_lanes_take_probability(n_classes, mode):
    """With all logits at -50, a padded lane that held 0 would take nearly all probability."""
    logits = torch.full((3, n_classes), -50.0)
    target = torch.zeros(3, dtype=torch.int64)
    loss, gradient = loss_and_gradient(logits, target, mode=mode)
    exact = truth(logits, target)
    assert_loss(loss, exact, torch.float32)
    assert_gradient(gradient, exact, torch.float32, roundings(mode))


@pytest.mark.cpu("a GPU gives NaN for such rows: test_cuda.py")
@by_mode
@pytest.mark.parametrize("bad", [-1, N_CLASSES, 2**31, -(2**62)])
def test_16_target_out_of_range_reads_out_of_bounds(problem, bad, mode):
    logits, target = problem
    target[5] = bad
    with pytest.raises(IndexError, match=rf"got {bad} at position \(5,\)"):
        loss_and_gradient(logits, target, mode=mode)


def test_17_library_does_not_load_before_torch(run_python):
    result = run_python("-c", "import fused_xent; print(fused_xent.cpu_capability())")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() not in ("", "None")


def test_18_loss_is_0_without_requires_grad(problem):
    expected = F.cross_entropy(*problem)
    for mode in MODES.values():
        loss = fused_xent.cross_entropy(*problem, **mode)
        torch.testing.assert_close(loss, expected)
        assert not loss.requires_grad


@pytest.mark.parametrize("shape", [(2, 21, 64, 65), (2, 300, 33, 7), (3, 1003)], ids=str)
def test_19_results_differ_from_run_to_run(shape):
    logits = make_logits(shape, torch.float32)
    target = torch.randint(0, shape[1], logits.select(1, 0).shape)
    first = loss_and_gradient(logits, target)
    for _ in range(5):
        assert all(map(torch.equal, loss_and_gradient(logits, target), first))


@pytest.mark.parametrize("remainder", range(17))
def test_20_tail_loop_strides_by_one(remainder):
    """Each class of the tail gets its gradient exactly once, for every remainder."""
    n_classes = 1024 + remainder
    logits, target = make_logits((3, n_classes), torch.float32), torch.tensor([0, 5, n_classes - 1])
    loss, gradient = loss_and_gradient(logits, target, reduction="sum")
    exact = truth(logits, target, reduction="sum")
    assert_loss(loss, exact, torch.float32)
    assert_gradient(gradient, exact, torch.float32)
