"""The CUDA operators called from Python, in the emulator: PTX of sm_100, CPU tensors.

With ``--device cuda`` the same cases run on a GPU.
"""

import mmap
import random
import re

import cuda_builds
import pytest
import torch
from cases import DTYPES, LABELS, SHAPES, VOCABULARIES, Labels, class_dim, make_logits, make_target
from compare import NEAR_1_OPTIONS, assert_gradient, assert_loss, check_near_1, smallest, truth
from modes import MODES, has_mode, loss_and_gradient, roundings
from problems import check_problem, make_problem
from test_kernels import check, make_options
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_xent
from fused_xent import _meta, _ops, reference

REGIMES = {"columns": 0, "warp": 1, "block": 2, "split": 3}


@pytest.fixture(scope="module")
def emulated(emulator_builds, device):
    if device != "cpu":
        pytest.skip("runs on a GPU, not in the emulator")
    if cuda_builds.MISSING:
        pytest.skip(cuda_builds.MISSING)
    module = cuda_builds.module(emulator_builds, "sm_100")
    module.set("sm_count", "3")
    return module


@pytest.fixture(autouse=True)
def operators(request, device, monkeypatch):
    """Replace the CPU operators by the emulated CUDA ones; return force_cuda_plan."""
    if device != "cpu":
        yield torch.ops.fused_xent.force_cuda_plan
        return
    request.getfixturevalue("emulated")
    for name, operator in cuda_builds.operators().items():
        monkeypatch.setattr(_ops, name, operator)
    yield torch.ops.fused_xent_emulated.force_cuda_plan


@pytest.fixture
def force(operators):
    """Forces plans until the end of the test."""
    forced = []

    def force(operation, regime, *, threads, team=0, parts=1, held=0, **others):
        forced.append(operation)
        rest = [others.get(name, default) for name, default in (("workers", 1), ("vector", 1))]
        plan = [REGIMES[regime], threads, team or threads, parts, held, *rest]
        operators(operation, [*plan, others.get("groups", 0)])

    yield force
    for operation in forced:
        operators(operation, [])


def test_clusters_of_three_blocks_are_refused(operators):
    plan = [REGIMES["split"], 64, 64, 3, 4, 1, 1, 0]
    with pytest.raises(ValueError, match="power of two"):
        operators("forward_backward", plan)


def cases(*tables):
    """Return all pairs of the names of two tables, each with the next dtype."""
    pairs = [(a, b) for a in tables[0] for b in tables[1]]
    return [(*pair, DTYPES[i % len(DTYPES)]) for i, pair in enumerate(pairs)]


@pytest.mark.parametrize(("shape", "labels", "dtype"), cases(SHAPES, LABELS))
def test_shape(shape, labels, dtype):
    shape, labels = SHAPES[shape], LABELS[labels]
    if labels.dtype == torch.uint8 and shape[class_dim(shape)] > 255:
        pytest.skip("255 is ignore_index here, and would be a class")
    if dtype == torch.float64 and labels.dtype == torch.float32:
        dtype = torch.bfloat16
    logits = make_logits(shape, dtype)
    reduction = ("none", "mean", "sum")[(len(shape) + shape[-1]) % 3]
    check(logits, make_target(logits, labels), reduction, **make_options(logits, labels))


@pytest.mark.parametrize("index", range(0, len(VOCABULARIES), 3))
def test_vocabulary(index):
    for i, vocab_size in enumerate(VOCABULARIES[index : index + 3]):
        dtype = DTYPES[(index // 3 + i) % len(DTYPES)]
        logits = make_logits((3, vocab_size), dtype)
        check(logits, torch.tensor([0, vocab_size // 2, vocab_size - 1]))
        check(logits, make_target(logits, Labels(True)), label_smoothing=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    target = torch.tensor([4, 0, 49, 7])
    wide = make_logits((4, 101), dtype)
    check(wide[:, ::2][:, :50], target)
    check(wide[:, 1:51], target)
    check(make_logits((50, 4), dtype).t(), target)
    check(make_logits((2, 64, 50), dtype).transpose(1, 2), torch.randint(50, (2, 64)))


def misaligned_views(dtype: torch.dtype, offset: int) -> list[torch.Tensor]:
    """Return logits of about 3000 classes; offset elements lie before the first."""
    n = 3001
    return [
        make_logits((3, 3016), dtype)[:, offset : offset + n],
        make_logits((3, n + 9), dtype)[:, offset : offset + n],
        make_logits((3 * n + offset,), dtype)[offset:].view(3, n),
        make_logits((2 * 3 * n + offset,), dtype)[offset:].view(2, 3, n)[:, :-1],
        make_logits((2 * 3 * n + offset,), dtype)[offset:].view(3, 2, n)[:-1].transpose(0, 1),
    ]


@pytest.mark.parametrize("labels", ["index", "uniform", "probabilities", "weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", range(8))
def test_rows_of_any_alignment_move_16_bytes(emulated, offset, dtype, labels):
    """Only labels that are aligned in another way are read one by one."""
    for logits in misaligned_views(dtype, offset):
        rows, n_classes = logits.shape[:-1], logits.shape[-1]
        options = {"label_smoothing": 0.1} if labels in ("uniform", "weights") else {}
        if labels == "weights":
            options["weight"] = torch.rand(n_classes)
        target = torch.randint(n_classes, rows)
        if labels == "probabilities":
            target = torch.rand(logits.shape).softmax(-1).to(dtype)
        # Forward and backward read these, and twice in a call, kernels sum all class weights.
        most = {"probabilities": 2.5, "weights": 3.3}.get(labels, 0.5)
        for softcap in (None, 5.0):
            leaf = logits.detach().requires_grad_()
            before = emulated.narrow_accesses()
            loss = fused_xent.cross_entropy(leaf, target, dim=-1, softcap=softcap, **options)
            (gradient,) = torch.autograd.grad(loss, leaf)
            moved = emulated.narrow_accesses() - before
            per_class = moved / logits[..., 0].numel() / n_classes
            assert per_class < most
            assert gradient.untyped_storage().nbytes() <= 1.01 * gradient.nbytes + 64
            if softcap is None:
                of_rows = target.reshape(-1, *target.shape[len(rows) :])
                exact = truth(logits.reshape(-1, n_classes), of_rows, **options)
                assert_gradient(gradient.reshape(-1, n_classes), exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["default", "inplace", "fused"])
def test_short_rows_move_16_bytes(emulated, mode, dtype):
    """Rows of at most 128 bytes pass through shared memory, all rows of a block at once."""
    if not has_mode(mode, dtype):
        pytest.skip("refused")
    for n_rows, n_classes in ((300, 128 // dtype.itemsize), (333, 13)):
        logits = make_logits((n_rows, n_classes), dtype)
        target = torch.randint(n_classes, (n_rows,))
        target[::7] = -100
        before = emulated.narrow_accesses()
        loss, gradient = loss_and_gradient(logits, target, mode=mode)
        moved = emulated.narrow_accesses() - before
        assert moved / n_rows < 24  # the target, its logit, the loss and so on
        exact = truth(logits, target)
        assert_loss(loss, exact, torch.float64 if dtype == torch.float64 else torch.float32)
        assert_gradient(gradient, exact, dtype, roundings(mode))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 3])
def test_fake_gradients_are_laid_out_like_real_ones(emulated, offset, dtype):
    views = misaligned_views(dtype, offset)
    wide = make_logits((4, 3, 200, 260), dtype)
    views += [wide[:, :2, :, offset:], wide[1:, :, ::2, offset : offset + 256], wide.mT]
    views += [wide[:, :, :, :100], wide[:1].expand(4, 3, 200, 260), wide[:, 1:2], wide[:0]]
    for logits in views:
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        dim, rows = logits.dim() - 1, logits.shape[:-1]
        target, state = torch.zeros(rows, dtype=torch.int64), torch.zeros(2, *rows, dtype=acc)
        rest = (None, None, None, dim, 2, state, None, torch.ones(()), None, None)
        real = torch.ops.fused_xent_emulated.backward(logits, target, *rest)
        with FakeTensorMode():
            n_elements = logits.untyped_storage().nbytes() // dtype.itemsize
            fake = torch.empty(n_elements, dtype=dtype, device="cuda")
            fake = fake.as_strided(logits.shape, logits.stride(), logits.storage_offset())
            fake = _meta._empty_gradient(fake, dim)
        assert fake.stride() == real.stride(), (logits.shape, logits.stride())
        assert fake.storage_offset() == real.storage_offset()


@pytest.mark.parametrize("seed", range(12))
def test_any_combination_of_options(seed):
    draw = random.Random(seed)
    for _ in range(10):
        check_problem(make_problem(lambda choices: draw.choice(choices)))


@pytest.mark.parametrize("regime", ["block", "split", "warp"])
def test_options_with_forced_plans(regime, force):
    """Statistics and their gradients: a team of threads per row, a block, or several blocks."""
    shape = {"threads": 32 if regime == "warp" else 64, "team": 8 if regime == "warp" else 0}
    parts = 3 if regime == "split" else 1
    for operation in ("forward", "backward"):
        force(operation, regime, parts=parts, **shape)
    force("forward_backward", "warp" if regime == "warp" else "block", **shape)
    draw = random.Random(7)
    for _ in range(6):
        problem = make_problem(lambda choices: draw.choice(choices))
        if problem.logits.shape[problem.dim] > 200 and problem.dim == problem.logits.dim() - 1:
            check_problem(problem._replace(statistics=True))


@pytest.mark.parametrize("parts", ["uniform", "one-hot"])
@pytest.mark.parametrize("shape", [(2, 60000), (1, 3000, 40)])
def test_label_sums_over_all_classes(shape, parts, force):
    """The fewest threads add the most terms, all rounded in the same direction."""
    if len(shape) == 2:
        force("forward", "block", threads=64)
    else:
        force("forward", "columns", threads=64)
    logits = torch.zeros(shape) if parts == "uniform" else make_logits(shape, torch.float32)
    target = torch.full(shape, 1 / shape[1])
    if parts == "one-hot":
        target = torch.zeros(shape).scatter(1, torch.full_like(logits[:, :1], 7).long(), 1)
    options = {"reduction": "none", "label_smoothing": 0.1}
    loss = fused_xent.cross_entropy(logits, target, **options)
    exact = torch.nn.functional.cross_entropy(logits.double(), target.double(), **options)
    torch.testing.assert_close(loss.double(), exact, rtol=0, atol=5e-6)


@pytest.mark.parametrize("first", [True, False])
def test_small_exponentials_beside_a_large_one(first, force):
    force("forward", "columns", threads=64)
    logits = torch.full((1, 4000, 40), -16.75)
    logits[:, 0 if first else -1] = 0
    target = torch.full((1, 40), 0 if first else 3999)
    loss = fused_xent.cross_entropy(logits, target, reduction="none")
    exact = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=0, atol=5e-7)


@pytest.mark.parametrize("strided", [False, True])
def test_compensation_terms_are_rescaled(strided, force):
    """4000 classes whose sum is rounded, then one so large that it makes them negligible."""
    regime = {"regime": "columns"} if strided else {"regime": "block"}
    force("forward", threads=64, **regime)
    logits = torch.zeros(1, 4000, 40)
    logits[:, 0], logits[:, -1] = 0.3, 20
    if not strided:
        logits = logits[:, :, :2].mT.contiguous().mT
    target = torch.full((1, logits.shape[2]), 3999)
    exact = torch.distributions.Categorical(logits=logits.double().mT).entropy()
    results = fused_xent.cross_entropy_with_statistics(logits, target, reduction="none")
    torch.testing.assert_close(results.entropy.double(), exact, rtol=0, atol=1e-6)
    for loss in (results.loss, fused_xent.cross_entropy(logits, target, reduction="none")):
        exact = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
        torch.testing.assert_close(loss.double(), exact, rtol=0, atol=5e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_exponentials_of_a_long_row(dtype, force):
    """Each thread of one block sums about a thousand of them beside a large one."""
    force("forward", "block", threads=256)
    n_classes = 2**18
    logits = torch.full((1, n_classes), -16.75, dtype=dtype)
    logits[:, 8] = 0
    target = torch.tensor([8])
    loss = fused_xent.cross_entropy(logits, target, loss_dtype=torch.float32)
    exact = torch.nn.functional.cross_entropy(logits.double(), target)
    torch.testing.assert_close(loss.double(), exact, rtol=0, atol=5e-6)


NEAR_1 = {  # the shape of the logits, and plans that differ from those of a small device
    "few classes": ((40, 10), {}),
    "columns": ((2, 300, 21), {"regime": "columns", "threads": 64, "workers": 2}),
    "columns of vectors": ((1, 21, 64), {"regime": "columns", "threads": 64, "vector": 8}),
    "warp": ((9, 1003), {"regime": "warp", "threads": 64, "team": 16}),
    "block": ((4, 5007), {"regime": "block", "threads": 64}),
    "parts": ((4, 5007), {"regime": "split", "threads": 64, "parts": 3}),
    "cluster": ((4, 9009), {"regime": "split", "threads": 64, "parts": 4, "held": 4}),
}


@pytest.mark.parametrize("option", NEAR_1_OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("plan", NEAR_1)
def test_loss_and_target_gradient_as_p_approaches_1(plan, dtype, option, force):
    """The exponential of the target is in no sum, wherever the target is."""
    shape, plan = NEAR_1[plan]
    by_rows = plan.get("regime", "columns") != "columns"
    is_general = option == "statistics" or (
        option == "softcap" and not (by_rows and dtype != torch.float64)
    )
    if "vector" in plan:
        plan = {**plan, "vector": 1 if is_general else 16 // dtype.itemsize}
    if "held" in plan:
        if not is_general:
            force("forward_backward", **plan)
    elif plan:
        force("forward", **plan)
        if "parts" not in plan:
            force("forward_backward", **plan)
    for mode in MODES:
        check_near_1(shape, dtype, option, mode)


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(3, 10), (3, 1003), (3, 5007), (1, 21, 64)], ids=str)
def test_infinite_logits(shape, mode, softcap):
    """Row 0: of the target, row 1: of another class, row 2: all but the target are -inf."""
    logits = torch.randn(shape)
    target = torch.full((shape[0], *shape[2:]), 5)
    rows = logits.movedim(1, -1).view(-1, shape[1])
    rows[0, 5] = rows[1, 6] = torch.inf
    rows[2, :5] = rows[2, 6:] = -torch.inf
    options = {"reduction": "none", "softcap": softcap}
    loss, gradient = loss_and_gradient(logits, target, mode=mode, **options)
    leaf = logits.double().requires_grad_()
    expected = fused_xent.reference.cross_entropy(leaf, target, **options)
    expected.sum().backward()
    torch.testing.assert_close(loss.double(), expected, rtol=5e-6, atol=1e-7, equal_nan=True)
    tolerance = {"rtol": 1e-5, "atol": 1e-7, "equal_nan": True}
    torch.testing.assert_close(gradient.double(), leaf.grad, **tolerance)


def transformed_rows(n_classes: int, dtype: torch.dtype) -> torch.Tensor:
    """Make rows of usual, large, offset, ascending, equal and masked logits."""
    logits = torch.randn(8, n_classes) * 3
    logits[1] *= 200  # a softcap saturates most of them
    logits[2] += 100
    logits[3] = torch.linspace(-40, 20, n_classes)
    logits[4] = -1e4  # the least number that a softcap gives
    logits[5] = 17
    logits[6, 1::2] = -torch.inf
    logits[7] /= 1000
    return logits.to(dtype)


TRANSFORMS = {
    "none": {},
    "scale": {"logit_scale": 3.0},
    "small scale": {"logit_scale": 0.0625, "focal_gamma": 2.0},
    "softcap": {"softcap": 5.0},
    "softcap and scale": {"softcap": 30.0, "logit_scale": 0.5, "lse_square_scale": 1e-3},
}


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("plan", ["warp", "block", "parts", "cluster"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transformed_and_uniformly_smoothed_rows(transform, plan, dtype, label_smoothing, force):
    """The kernels by rows transform logits, and sum them for label smoothing."""
    n_classes, plan = {**NEAR_1, "warp": ((8, 1003), NEAR_1["warp"][1])}[plan]
    n_classes = n_classes[1]
    if "held" in plan:
        force("forward_backward", **plan)
    else:
        for operation in ("forward", "backward", "forward_backward"):
            if operation != "forward_backward" or "parts" not in plan:
                force(operation, **plan)
    options = TRANSFORMS[transform]
    logits = transformed_rows(n_classes, dtype)
    if label_smoothing == 0:
        logits[6, 1::4] = torch.finfo(dtype).min
    target = torch.tensor([0, 7, n_classes - 1, n_classes - 1, 3, n_classes // 2, 2, 9])
    leaf = logits.double().requires_grad_()
    exact = reference.cross_entropy(
        leaf, target, reduction="none", label_smoothing=label_smoothing, **options
    )
    finite = exact.isfinite()  # not with a class at -inf and label smoothing
    assert finite.sum() >= 7
    (exact_gradient,) = torch.autograd.grad(exact[finite].sum(), leaf)
    z = reference.transform(logits.double(), options.get("softcap"), options.get("logit_scale", 1))
    size = 3.5 * options["softcap"] if "softcap" in options else z[z.abs() < 1e6].abs().max()
    rounding = 0 if transform == "none" else float(2**-23 * size)  # of transformed logits
    for mode in MODES:
        if not has_mode(mode, dtype):
            continue
        loss, gradient = loss_and_gradient(
            logits, target, mode=mode, reduction="none", label_smoothing=label_smoothing, **options
        )
        assert torch.equal(loss.isfinite(), finite)
        error = (loss.double() - exact)[finite].abs() / exact[finite].abs().clamp(min=1)
        assert error.max() <= 2e-6 + rounding
        actual, expected = gradient[finite].double(), exact_gradient[finite]
        relative = roundings(mode) * (torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0)
        relative += 3e-5 + 4 * rounding
        # Labels and probabilities may cancel; float16 has a smallest number.
        absolute = 1e-7 + label_smoothing / n_classes * 1e-5
        torch.testing.assert_close(actual, expected, rtol=relative, atol=absolute)


IGNORED = {torch.int64: -100, torch.int32: -1, torch.uint8: 255}  # by the target's dtype


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("team", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_short_rows(dtype, team, label_smoothing, force):
    """Teams of every size have one row (of several blocks) or several, of any alignment."""
    for i, n_classes in enumerate((2, 9, 65, 250, 1000, 1024)):
        kind = list(IGNORED)[i % (3 if n_classes < 255 else 2)]
        n_rows = 70 if n_classes < 10 else 37  # 70: one block would have more rows than lanes
        wide = make_logits((n_rows, n_classes + 8), dtype)
        for groups, offset in ((0, i), (1, 0), (1, 3)):
            for operation in ("forward", "backward", "forward_backward"):
                force(operation, "warp", threads=64, team=team, groups=groups)
            target = torch.randint(n_classes, (n_rows,)).to(kind)
            target[0], target[1], target[2] = 0, n_classes - 1, n_classes // 2
            target[3::5] = IGNORED[kind]
            options = {"ignore_index": IGNORED[kind], "label_smoothing": label_smoothing}
            logits = wide[:, offset : offset + n_classes]
            check(logits, target, ("none", "mean")[groups], **options)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_short_rows_are_like_others(dtype, label_smoothing, force):
    """Of any values and targets, with row options or without; a block of 32 threads has one row."""
    logits = make_logits((2, 20, 333), dtype)
    target = torch.randint(333, (2, 20))
    rows, targets = logits.view(40, 333), target.view(40)
    rows[1, 7], rows[2, 7] = torch.nan, torch.inf
    rows[3, targets[3]] = torch.inf
    rows[4], rows[5, 1:] = -torch.inf, -torch.inf
    rows[6, targets[6]] = -torch.inf
    rows[8, targets[8]] = 90
    targets[5], targets[9::7], targets[10] = 0, -100, 333
    weight, tokens = torch.rand(333) + 0.5, torch.rand(20, 2)
    tokens[0, 0] = 0
    for options in (
        {},
        {"token_weight": torch.ones(20, 2)},
        {"token_weight": tokens, "lse_square_scale": 1e-3, "focal_gamma": 1.5},
        {} if label_smoothing else {"weight": weight},
    ):
        options = {"dim": -1, "label_smoothing": label_smoothing, **options}
        found = []
        for plan in (("warp", 8), ("warp", 2), ("block", 0)):
            for operation in ("forward", "backward"):
                force(operation, plan[0], threads=32, team=plan[1], groups=2)
            leaf = logits.transpose(0, 1).detach().requires_grad_()
            loss = fused_xent.cross_entropy(leaf, target.mT, reduction="none", **options)
            (gradient,) = torch.autograd.grad(loss.float().sum(), leaf)
            found.append((loss.double(), gradient.double()))
        assert 3 <= found[2][0].isnan().sum() <= 8
        tolerance = 2 * torch.finfo(dtype).eps
        for loss, gradient in found[:2]:
            same = {"rtol": 1e-6 + tolerance, "atol": 1e-7, "equal_nan": True}
            torch.testing.assert_close(loss, found[2][0], **same)
            torch.testing.assert_close(gradient, found[2][1], **same | {"rtol": 1e-5 + tolerance})


def test_short_rows_have_their_kernels(emulated, force):
    """Without labels to read, softcap, float64 and statistics."""
    logits, target = make_logits((70, 300), torch.bfloat16), torch.arange(70)
    cuda_builds.launches(emulated)
    loss_and_gradient(logits, target)
    loss_and_gradient(logits, target, label_smoothing=0.1)
    names = [launch.kernel for launch in cuda_builds.launches(emulated)]
    assert names.count("forward_lane_rows") == names.count("backward_lane_rows") == 2
    for options in ({"softcap": 5.0}, {"weight": torch.ones(300), "label_smoothing": 0.1}):
        loss_and_gradient(logits, target, **options)
    loss_and_gradient(logits.double(), target)
    names = [launch.kernel for launch in cuda_builds.launches(emulated)]
    assert names.count("forward_rows") == names.count("backward_rows") == 3
    blocks = {}
    for groups in (0, 1, 3):
        force("forward", "warp", threads=64, team=8, groups=groups)
        loss_and_gradient(logits, target)
        launches = {launch.kernel: launch.blocks for launch in cuda_builds.launches(emulated)}
        blocks[groups] = launches["forward_lane_rows"]
    assert blocks == {0: 9, 1: 2, 3: 3}  # of 8 rows, of 8 for each of 8 teams, of 3 for each


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_small_softcapped_logits(dtype):
    """The tanh of logits up to two thirds of the softcap is a polynomial."""
    logits = torch.linspace(-20, 20, 4096).repeat(3, 1)
    logits[1:] *= torch.tensor([[0.25], [1.5]])  # all are small, and most are not
    logits, target = logits.to(dtype), torch.tensor([0, 2000, 4095])
    leaf = logits.double().requires_grad_()
    exact = reference.cross_entropy(leaf, target, reduction="none", softcap=30.0)
    (exact_gradient,) = torch.autograd.grad(exact.sum(), leaf)
    for mode in MODES:
        if not has_mode(mode, dtype):
            continue
        loss, gradient = loss_and_gradient(
            logits, target, mode=mode, reduction="none", softcap=30.0
        )
        assert (loss.double() - exact).abs().max() <= 1e-5  # three roundings of the softcap
        relative = roundings(mode) * (torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0)
        torch.testing.assert_close(
            gradient.double(), exact_gradient, rtol=relative + 1.5e-5, atol=smallest(dtype)
        )


@pytest.mark.parametrize("large", [3.0, -4.5, 1e38, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_one_large_logit_among_small_softcapped_ones(dtype, large):
    """No logit of a vector is taken for a small one, wherever it is."""
    logits, target = torch.randn(128, 192).clamp(-1.9, 1.9).to(dtype), torch.full((128,), 190)
    logits.diagonal().fill_(min(large, torch.finfo(dtype).max) if large < torch.inf else large)
    options = {"reduction": "none", "softcap": 3.0}  # the least logit counts
    leaf = logits.double().requires_grad_()
    exact = reference.cross_entropy(leaf, target, **options)
    (exact_gradient,) = torch.autograd.grad(exact.sum(), leaf)
    for mode in MODES:
        if not has_mode(mode, dtype):
            continue
        loss, gradient = loss_and_gradient(logits, target, mode=mode, **options)
        torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=2e-6)
        relative = roundings(mode) * (torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0)
        torch.testing.assert_close(
            gradient.double(), exact_gradient, rtol=relative + 3e-5, atol=1e-9 + smallest(dtype)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_group_of_large_softcapped_logits_in_fused_mode(dtype, force):
    """Of more than 32 groups a thread: in registers, in shared memory, or read twice."""
    force("forward_backward", "block", threads=32, held=8, groups=2)  # blocks of several rows
    size = 32 * 4 * 16 // dtype.itemsize
    groups = [0, 1, 2, 3, 4, 31, 32, 34]
    logits = torch.randn(len(groups), 35 * size + 3).clamp(-1.9, 1.9).to(dtype)
    for row, group in zip(logits, groups, strict=True):
        row[group * size : (group + 1) * size : 100] = 4.5
    target = torch.tensor(groups) * size + 5
    options = {"reduction": "none", "softcap": 3.0}
    leaf = logits.double().requires_grad_()
    exact = reference.cross_entropy(leaf, target, **options)
    (exact_gradient,) = torch.autograd.grad(exact.sum(), leaf)
    loss, gradient = loss_and_gradient(logits, target, mode="fused", **options)
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=2e-6)
    relative = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0
    torch.testing.assert_close(
        gradient.double(), exact_gradient, rtol=relative + 3e-5, atol=1e-9 + smallest(dtype)
    )


@pytest.mark.parametrize("softcap", [1e-4, 20.0])
@pytest.mark.parametrize("size", [1e-25, 1e-5, 1e5, 1e25])
def test_softcapped_logits_of_any_size(softcap, size):
    """Terms of a polynomial would leave float32's range."""
    logits, target = torch.randn(5, 600) * size, torch.arange(5)
    options = {"reduction": "none", "softcap": softcap, "logit_scale": 1 / size}
    leaf = logits.double().requires_grad_()
    exact = reference.cross_entropy(leaf, target, **options)
    (exact_gradient,) = torch.autograd.grad(exact.sum(), leaf)
    for mode in MODES:
        loss, gradient = loss_and_gradient(logits, target, mode=mode, **options)
        assert (loss.double() - exact).abs().max() <= 1e-5
        largest = exact_gradient.abs().max()
        assert ((gradient.double() - exact_gradient).abs() <= 1e-5 * largest).all()


@pytest.mark.parametrize("softcap", [200.0, 1e6])
def test_softcap_far_above_the_logits(softcap):
    """An error of a rounding of the softcap would be an error of the logits."""
    logits, target = torch.randn(40, 3000) * 3, torch.arange(40)
    options = {"reduction": "none", "softcap": softcap}
    exact = reference.cross_entropy(logits.double(), target, **options)
    for mode in MODES:
        loss, _ = loss_and_gradient(logits, target, mode=mode, **options)
        assert (loss.double() - exact).abs().max() <= 5e-6


@pytest.mark.parametrize("offset", [0.0, -1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sum_of_all_logits(dtype, offset, force):
    """Of label smoothing: few threads add many terms, whose sums are rounded in one direction."""
    force("forward", "block", threads=64)
    logits = torch.full((1, 2**18), offset - 31.96896875).to(dtype)
    logits[:, 5] = offset
    target, options = torch.tensor([5]), {"reduction": "none", "label_smoothing": 0.1}
    loss, _ = loss_and_gradient(logits, target, **options)
    exact = torch.nn.functional.cross_entropy(logits.double(), target, **options)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("n_classes", [300, 30000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sum_of_great_logits_is_finite(dtype, n_classes):
    logits = torch.full((3, n_classes), torch.finfo(dtype).max, dtype=dtype)
    loss, _ = loss_and_gradient(logits, torch.tensor([0, 5, 99]), label_smoothing=0.1)
    torch.testing.assert_close(loss, torch.tensor(n_classes).float().log())


@pytest.mark.parametrize("n_classes", [65, 3000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_target_of_a_softcap_that_all_reach(dtype, n_classes):
    """The target is left out of the sum, though its exponential is the least that there is."""
    logits = torch.full((n_classes, n_classes), -1e4).to(dtype)[:70]
    target = torch.arange(len(logits)) * (n_classes - 1) // (len(logits) - 1)
    for mode in MODES:
        loss, gradient = loss_and_gradient(
            logits, target, mode=mode, reduction="none", softcap=20.0, logit_scale=0.01
        )
        exact = torch.full_like(loss, n_classes).log()
        torch.testing.assert_close(loss, exact, rtol=0, atol=8e-6)
        assert (gradient.gather(1, target.unsqueeze(1)) < 0).all()


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize(
    "shape", [(6, 20), (6, 700), (2, 20000), (2, 20, 3), (0, 7), (2, 0)], ids=str
)
def test_total_weight_is_written(operators, shape, statistics, force):
    """Of a mean or sum it is that of the CPU; of other losses 0, where there are any."""
    if shape[1] > 1000:
        force("forward", "split", threads=64, parts=3)
    name = "forward_with_statistics" if statistics else "forward"
    logits = make_logits(shape, torch.float32)
    rows = shape[:1] + shape[2:]
    target = torch.randint(max(shape[1], 1), rows)
    if shape[1] == 0:
        target = torch.rand(shape)
    elif target.numel() > 1:
        target.view(-1)[0] = -100
    weight, tokens = torch.rand(shape[1]), torch.rand(rows)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        for reduction in (0, 1, 2):
            arguments = (logits, target, weight, tokens, None, 1, reduction)
            found = getattr(torch.ops.fused_xent_emulated, name)(*arguments)[1]
            expected = getattr(torch.ops.fused_xent, name)(*arguments)[1]
            is_unread = reduction == 0 and logits.numel() > 0
            torch.testing.assert_close(found, torch.zeros_like(found) if is_unread else expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_total_weight_beyond_float32():
    logits, weight = make_logits((100, 20), torch.float32), torch.full((20,), 1e37)
    check(logits, torch.arange(100) % 20, "mean", weight=weight)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("mode", ["default", "inplace", "fused"])
@pytest.mark.parametrize("shape", [(6, 20), (6, 700), (6, 20000), (2, 20, 3)])
def test_target_out_of_range_gives_nan(shape, mode, reduction):
    logits = make_logits(shape, torch.float32)
    n_classes, rows = shape[1], shape[:1] + shape[2:]
    target = torch.randint(n_classes, rows)
    target.view(-1)[0], target.view(-1)[1], target.view(-1)[-1] = -100, n_classes, -1
    bad = (target == n_classes) | (target == -1)
    loss, gradient = loss_and_gradient(logits, target, 1.0, mode, reduction=reduction)
    if reduction == "none":
        assert torch.equal(loss.isnan(), bad)
    else:
        assert loss.isnan()
    gradient = gradient.movedim(1, -1)
    assert gradient[bad].isnan().all()
    assert not gradient[~bad].isnan().any()
    kept = torch.where(bad, -100, target)
    scale = (kept != -100).sum() if reduction == "mean" else 1
    exact = truth(logits, kept, 1.0, reduction="sum").gradient.movedim(1, -1) / scale
    torch.testing.assert_close(gradient[~bad].double(), exact[~bad], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(
    ("n_classes", "plans"),
    [
        (40, {"forward": {"regime": "columns", "threads": 64, "workers": 2}}),
        (500, {"forward": {"regime": "block", "threads": 128}}),
        (500, {"backward": {"regime": "split", "threads": 64, "parts": 3}}),
        (3000, {"forward": {"regime": "split", "threads": 64, "parts": 7}}),
        (3000, {"forward_backward": {"regime": "split", "threads": 64, "parts": 8, "held": 4}}),
        (3000, {"forward_backward": {"regime": "block", "threads": 64, "held": 8, "groups": 2}}),
        (3000, {"forward_backward": {"regime": "warp", "threads": 64, "team": 16, "groups": 1}}),
    ],
)
def test_forced_plans(force, n_classes, plans, dtype):
    for operation, plan in plans.items():
        force(operation, **plan)
    logits = make_logits((7, n_classes), dtype)
    for labels in ("index, mostly ignored", "probabilities, all options"):
        target = make_target(logits, LABELS[labels])
        check(logits, target, "mean", **make_options(logits, LABELS[labels]))


def test_shared_memory_is_allowed_once(emulated, force):
    """The limit is the device's: a launch must not lower that of another host thread."""
    logits, target = make_logits((2, 9000), torch.bfloat16), torch.arange(2)
    limits = set()
    for held in (52, 64, 48):
        force("forward_backward", "block", threads=64, held=held)
        cuda_builds.launches(emulated)
        loss_and_gradient(logits, target, 1.0, "fused")
        launches = {x.kernel: x for x in cuda_builds.launches(emulated)}
        limits.add(launches["forward_backward_rows"].shared_limit)
    assert min(limits) >= 226 * 2**10
    assert len(limits) == 1


@pytest.mark.parametrize("largest", [1, 2])
def test_cluster_that_the_device_has_no_room_for(emulated, force, largest):
    """A smaller one takes its place, or one block. A plan of its own, since answers are kept."""
    emulated.set("largest_cluster", str(largest))
    try:
        force("forward_backward", "split", threads=32 * largest, parts=8, held=8, groups=1)
        logits = make_logits((5, 3000), torch.bfloat16)
        cuda_builds.launches(emulated)
        check(logits, torch.arange(5), "mean")
        launches = [x for x in cuda_builds.launches(emulated) if x.kernel.startswith("forward_b")]
        assert {(x.cluster_size, x.blocks) for x in launches} == {(largest, {1: 5, 2: 8}[largest])}
    finally:
        emulated.set("largest_cluster", "0")


def test_driver_that_is_too_old(emulated):
    problem = torch.ops.fused_xent_emulated.cuda_driver_problem
    for version, message in (
        (0, ""),  # no driver, so no GPU
        (13000, ""),
        (14010, ""),
        (12080, "the kernels need a driver for CUDA 13.0 or newer, got one for CUDA 12.8"),
    ):
        emulated.set("driver_version", str(version))
        try:
            assert problem() == message
        finally:
            emulated.set("driver_version", "13000")


def test_invalid_plan(force):
    force("forward", regime="block", threads=100)
    with pytest.raises(ValueError, match="threads must be a power of two"):
        fused_xent.cross_entropy(make_logits((2, 5000), torch.float32), torch.tensor([0, 1]))


def test_row_vectors_need_aligned_classes(force):
    force("forward", "columns", threads=64, vector=4)
    logits, target = make_logits((40, 33), torch.float32)[:, :32].t(), torch.arange(32)
    with pytest.raises(ValueError, match="row_vector must be 1, or of adjacent rows"):
        fused_xent.cross_entropy(logits, target)


@pytest.mark.parametrize("shape", [(9, 300), (3, 40000), (2, 30, 70)])
def test_results_do_not_depend_on_the_schedule(emulated, shape):
    logits = make_logits(shape, torch.bfloat16)
    target = torch.randint(shape[1], shape[:1] + shape[2:])
    results = []
    for order in ("forward", "reverse", "random"):
        emulated.set("order", order)
        for mode in ("default", "fused"):
            results.append(loss_and_gradient(logits, target, 1.0, mode))
    emulated.set("order", "forward")
    for (loss, gradient), expected in zip(results[2:], results[:2] * 2, strict=True):
        assert torch.equal(loss, expected[0])
        assert torch.equal(gradient, expected[1])


def test_offsets_beyond_32_bits(device):
    n_rows, n_classes = 2**16 + 3, 2**15 + 8  # 4 GiB of bfloat16; few rows are touched
    if device == "cpu":
        memory = mmap.mmap(-1, n_rows * n_classes * 2)
        logits = torch.frombuffer(memory, dtype=torch.bfloat16).view(n_rows, n_classes)
    else:
        logits = torch.empty(n_rows, n_classes, dtype=torch.bfloat16)
    target = torch.full((n_rows,), -100)
    for row in (n_rows - 1, 2**15):
        target.fill_(-100)
        target[row] = n_classes - 1
        logits[row] = make_logits((n_classes,), torch.bfloat16)
        exact = truth(logits[row], target[row])
        loss = fused_xent.cross_entropy(logits, target, loss_dtype=torch.float32)
        assert_loss(loss, exact, torch.float32)


@pytest.mark.parametrize(
    ("shape", "strides", "dim"),
    [((2, 2, 20), (64, 2**31 + 2**29, 1), -1), ((3, 2), (1, 2**32), 1)],
    ids=["rows", "classes"],
)
def test_strides_beyond_32_bits(emulated, shape, strides, dim):
    far = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (far + 1)), dtype=torch.bfloat16)
    logits = memory.as_strided(shape, strides)
    logits.copy_(make_logits(shape, torch.bfloat16))
    target = torch.randint(shape[dim], logits.select(dim, 0).shape)
    loss = fused_xent.cross_entropy(logits, target, dim=dim, loss_dtype=torch.float32)
    exact = truth(logits.reshape(-1, shape[dim]), target.flatten())
    assert_loss(loss, exact, torch.float32)


def test_sums_of_several_blocks_beside_class_weights():
    """The sums over rows and over class weights share memory."""
    logits, target = make_logits((16400, 5), torch.float32), torch.randint(5, (16400,))
    check(logits, target, "mean", weight=torch.rand(5) + 0.1, label_smoothing=0.3)


@pytest.mark.parametrize(
    ("reduction", "normalizer"), [("none", None), ("sum", None), ("mean", None), ("mean", 3.0)]
)
@pytest.mark.parametrize("mode", MODES)
def test_sums_are_launched_where_there_is_something_to_add(emulated, mode, reduction, normalizer):
    """Fused mode needs the total weight for the gradient, before there is a loss to add."""
    logits, target = make_logits((6, 20), torch.float32), torch.arange(6)
    cuda_builds.launches(emulated)
    loss_and_gradient(logits, target, 1.0, mode, reduction=reduction, normalizer=normalizer)
    kernels = [launch.kernel for launch in cuda_builds.launches(emulated)]
    is_twice = mode == "fused" and reduction == "mean" and normalizer is None
    expected = 0 if reduction == "none" else 1 + is_twice
    assert kernels.count("sum_blocks_of_rows") == expected
    assert "sum_partials" not in kernels


@pytest.mark.parametrize("mode", ["default", "fused"])
def test_mean_by_weights_that_cancel(mode):
    options = {"reduction": "mean", "token_weight": torch.tensor([1.0, -1.0])}
    logits, target = make_logits((2, 20), torch.float32), torch.tensor([1, 2])
    loss, gradient = loss_and_gradient(logits, target, 1.0, mode, **options)
    assert loss.isnan()
    assert gradient.isnan().all()


def test_more_rows_than_a_grid_has_blocks(force):
    force("forward_backward", "block", threads=32, groups=70000)
    logits = make_logits((65540, 65), torch.float32)
    target = torch.full((65540,), -100)
    target[-1] = 5
    exact = truth(logits[-1:], target[-1:])
    loss, gradient = loss_and_gradient(logits, target, 1.0, "fused")
    assert_loss(loss, exact, torch.float32)
    assert_gradient(gradient[-1:], exact, torch.float32)


def test_argmax_with_idle_threads(force):
    force("forward", "block", threads=64)
    logits, target = torch.full((2, 20), -torch.inf), torch.tensor([0, 1])
    results = fused_xent.cross_entropy_with_statistics(logits, target, reduction="none")
    assert results.argmax.tolist() == [0, 0]


def test_focal_loss_of_certain_targets():
    """Their cross-entropy must not be below 0, or its power is NaN."""
    values = torch.linspace(0.25, 60, 400).bfloat16().unique()
    logits = torch.full((len(values), 300), -300.0).bfloat16()
    logits[:, 7] = values
    target = torch.full((len(values),), 7)
    options = {"reduction": "none", "loss_dtype": torch.float32}
    assert (fused_xent.cross_entropy(logits, target, **options) >= 0).all()
    assert not fused_xent.cross_entropy(logits, target, focal_gamma=2.0, **options).isnan().any()


def test_gradient_beyond_32_bits(emulated):
    n_classes = 2**15 + 8
    memory = mmap.mmap(-1, (2**16 + 3) * n_classes * 2)
    logits = torch.frombuffer(memory, dtype=torch.bfloat16).view(-1, 2**16 + 3, n_classes)[0]
    logits = logits[:: 2**16 + 2].requires_grad_()  # two rows, far apart
    with torch.no_grad():
        logits.copy_(make_logits((2, n_classes), torch.bfloat16))
    target = torch.tensor([3, n_classes - 1])
    (logits,) = [logits.detach()]
    exact = truth(logits, target)
    loss, gradient = loss_and_gradient(logits, target)
    assert_loss(loss, exact, torch.float32)
    assert_gradient(gradient, exact, torch.bfloat16)
    operators = torch.ops.fused_xent_emulated
    tensors, mean = (logits, target, None, None), 1
    _, total_weight, state = operators.forward(*tensors, None, 1, mean, torch.float32)
    upstream = (torch.ones(()), None, None)
    operators.backward_(*tensors, total_weight, 1, mean, state, None, *upstream)
    assert_gradient(logits, exact, torch.bfloat16)


@pytest.mark.parametrize("factor", [1.3, float("nan"), float("inf"), 0.0, 1.0])
@pytest.mark.parametrize("shape", [(7, 40), (5, 700), (2, 20000), (2, 3, 90)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multiply(dtype, shape, factor):
    """All elements are multiplied, even in rows of zeros; memory between them is not written."""
    memory = make_logits((*shape[:-1], 2 * shape[-1]), dtype)
    memory[0] = 0
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    factor = torch.tensor(factor, dtype=torch.float64)  # cast to the accumulation dtype
    for view in (lambda x: x[..., : shape[-1]], lambda x: x[..., ::2], lambda x: x.mT):
        expected = memory.clone()
        view(expected).copy_((view(memory).to(acc) * factor.to(acc)).to(dtype))
        actual = memory.clone()
        _ops.multiply_(view(actual), factor)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_scaling_of_rows_in_vectors(force):
    """Each row has its own factor; ignored ones stay 0, whatever theirs is."""
    force("backward", "columns", threads=64, vector=4)
    gradient, target = make_logits((2, 30, 32), torch.float32), torch.randint(30, (2, 32))
    factor = torch.rand(2, 32) + 0.5
    target[:, 5:14] = -100
    gradient = gradient.masked_fill((target == -100).unsqueeze(1), 0)
    expected = gradient * factor.unsqueeze(1)
    factor[target == -100] = torch.inf
    _ops.scale_gradient_(gradient, factor, target, None, 1, -100)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("shape", [(5000, 600), (40, 20000), (9000, 20), (2, 40, 9000)], ids=str)
def test_scaling_launches_no_more_blocks_than_run_at_once(emulated, shape):
    """The factor is 1 mostly, and each block only starts and exits."""
    gradient, factor = torch.ones(shape), torch.tensor(1.0)
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
    cuda_builds.launches(emulated)
    _ops.scale_gradient_(gradient, factor, target, None, 1, -100)
    (launch,) = cuda_builds.launches(emulated)
    assert launch.kernel in ("scale_rows", "scale_columns")
    assert 3 <= launch.blocks <= 3 * 1024 // 64  # 3 multiprocessors


def test_too_many_rows_or_classes():
    logits = torch.empty(1, dtype=torch.float32).expand(2**31, 1)
    target = torch.zeros(1, dtype=torch.uint8).expand(2**31)
    with pytest.raises(ValueError, match=re.escape("less than 2^31 rows")):
        _ops.scale_gradient_(logits, torch.ones(()), target, None, 1, -100)
    logits = torch.empty(1, 1).expand(1, 2**30 + 1)
    with pytest.raises(ValueError, match=re.escape("at most 2^30 classes")):
        _ops.scale_gradient_(logits, torch.ones(()), torch.tensor([-100]), None, 1, -100)
