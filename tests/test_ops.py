"""The operators: what torch asks of them, and that arguments which do not fit are refused."""

import re
from pathlib import Path

import pytest
import torch
from cases import LABELS, make_logits, make_options, make_target
from torch.library import opcheck

import fused_xent
from fused_xent import _ops

ops = torch.ops.fused_xent
SHAPES = ((4, 9), (3, 200), (2, 9, 5), (9,), (2, 17000))
KINDS = ("index", "index, uint8", "index, weighted and smoothed", "probabilities, all options")


PLAIN = [0.0, 0.0, 0.0, 0.0, 1.0]  # label_smoothing, lse_square_scale, focal_gamma, softcap, scale
ALL_NUMBERS = [0.1, 0.01, 2.0, 5.0, 0.5]
SAVED = ("total_weight", "row_max", "log_sum", "label_mass", "loss_slope", "entropy")
SHARED = ("weight", "token_weight", "dim", "ignore_index", "numbers", "reduction")


def make_arguments(shape=(4, 9), dtype=torch.float32, kind="index", reduction=1, extras=False):
    """Return the arguments of forward by name; with extras, all options and the statistics."""
    logits = make_logits(shape, dtype)
    labels = LABELS[kind]
    if labels.dtype == torch.uint8 and max(shape) > 255:
        labels = labels._replace(ignore_index=254)
    target = make_target(logits, labels)
    options = make_options(logits, labels)
    acc = _ops.accumulation_dtype(dtype)
    dim = 0 if len(shape) == 1 else 1
    rows = logits.select(dim, 0).shape
    weight = options.get("weight")
    return {
        "logits": logits,
        "target": target,
        "weight": None if weight is None else weight.to(acc),
        "token_weight": torch.rand(rows, dtype=acc).round(decimals=1) if extras else None,
        "normalizer": torch.tensor(3.0, dtype=torch.float64) if extras else None,
        "dim": dim,
        "ignore_index": options.get("ignore_index", -100),
        "numbers": ALL_NUMBERS if extras else [options["label_smoothing"], *PLAIN[1:]],
        "reduction": reduction,
        "loss_dtype": torch.float32,
        "statistics": extras,
    }


def make_backward(forward):
    """Return the arguments of backward after these of forward, and what forward returned."""
    outputs = ops.forward(**forward)
    loss, *saved = outputs
    rows = torch.ones_like(saved[1]) if forward["statistics"] else None
    backward = {
        "grad_loss": torch.ones_like(loss),
        "grad_lse": rows,
        "grad_entropy": rows,
        **{name: forward[name] for name in ("logits", "target", *SHARED)},
        **dict(zip(SAVED, saved, strict=False)),
    }
    return backward, outputs


OPCHECKED = [
    *((torch.float32, shape, kind) for shape in ((9,), (4, 9), (2, 9, 5)) for kind in KINDS),
    *((dtype, (3, 200), "index") for dtype in _ops.DTYPES),
]


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "all options"])
@pytest.mark.parametrize(("dtype", "shape", "kind"), OPCHECKED, ids=str)
def test_opcheck(dtype, shape, kind, extras):
    forward = make_arguments(shape, dtype, kind, int(extras), extras)
    opcheck(ops.forward.default, (), forward)
    backward, (loss, *_) = make_backward(forward)
    opcheck(ops.backward.default, (), backward)
    opcheck(ops.backward_.default, (), backward | {"logits": forward["logits"].clone()})
    opcheck(ops.forward_backward_.default, (), forward | {"logits": forward["logits"].clone()})
    scale = {
        "grad_logits": ops.backward(**backward),
        "grad_loss": 2 * torch.ones_like(loss),
        **{name: forward[name] for name in ("target", "token_weight", "dim", "ignore_index")},
    }
    opcheck(ops.scale_gradient_.default, (), scale)


def to_meta(arguments):
    return {name: x.to("meta") if torch.is_tensor(x) else x for name, x in arguments.items()}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "all options"])
def test_meta_implementations_agree_in_strides(extras, transposed, shape):
    forward = make_arguments(shape, extras=extras)
    if transposed and len(shape) > 1:
        forward["logits"] = forward["logits"].mT.contiguous().mT
    backward, outputs = make_backward(forward)
    real = (*outputs, ops.backward(**backward))
    fake = (*ops.forward(**to_meta(forward)), ops.backward(**to_meta(backward)))
    in_place = forward | {"logits": forward["logits"].clone()}
    real += ops.forward_backward_(**in_place)
    fake += ops.forward_backward_(**to_meta(in_place))
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("number", range(5))
def test_meta_implementations_agree_by_each_option_alone(number, soft):
    """What is returned depends on some of them: the slope, and the mass of probabilities."""
    numbers = [*PLAIN[:number], ALL_NUMBERS[number], *PLAIN[number + 1 :]]
    forward = make_arguments(kind="probabilities" if soft else "index") | {"numbers": numbers}
    both = (ops.forward(**forward), ops.forward(**to_meta(forward)))
    for one, other in zip(*both, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.parametrize("name", ["backward_", "scale_gradient_"])
def test_meta_tensors_are_overwritten_by_nothing(name):
    assert getattr(ops, name)(**to_meta(OVERWRITING[name][0])) is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", _ops.DTYPES, ids=str)
def test_forward_saves_what_its_documentation_says(dtype, shape):
    """row_max and log_sum, of their product the log-sum-exp, and total_weight in float64."""
    forward = make_arguments(shape, dtype)
    logits, dim = forward["logits"], forward["dim"]
    weight = torch.rand(shape[dim], dtype=_ops.accumulation_dtype(dtype))
    outputs = ops.forward(**forward | {"weight": weight, "loss_dtype": torch.float64})
    _, total_weight, row_max, log_sum, *others = outputs
    assert torch.equal(row_max, logits.amax(dim).to(row_max.dtype))
    torch.testing.assert_close(
        (row_max + log_sum).double(), logits.double().logsumexp(dim), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(total_weight, weight[forward["target"]].double().sum())
    assert row_max.dtype == log_sum.dtype == _ops.accumulation_dtype(dtype)
    assert all(other.numel() == 0 for other in others)


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "all options"])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 5000)], ids=str)
def test_fused_mode_returns_what_forward_does(shape, extras):
    """For the statistics: the rows' results, in its order."""
    forward = make_arguments(shape, extras=extras)
    loss, _, row_max, log_sum, _, _, entropy, argmax = ops.forward(**forward)
    fused = ops.forward_backward_(**forward | {"logits": forward["logits"].clone()})
    torch.testing.assert_close(fused, (loss, row_max, log_sum, entropy, argmax))


def test_a_normalizer_divides_the_gradient():
    forward = make_arguments(reduction=1)
    normalizer = torch.tensor(2.5, dtype=torch.float64)
    divided, _ = make_backward(forward | {"normalizer": normalizer})
    summed, _ = make_backward(forward | {"reduction": 2})
    torch.testing.assert_close(divided["total_weight"], normalizer)
    torch.testing.assert_close(ops.backward(**divided), ops.backward(**summed) / 2.5)


LOGITS, TARGET = torch.randn(4, 9), torch.arange(4)
SOFT, EXPANDED = LOGITS.softmax(1), torch.randn(9).expand(4, 9)
ROW_WEIGHT = torch.ones(4)
FORWARD = {
    "logits": LOGITS,
    "target": TARGET,
    "weight": None,
    "token_weight": None,
    "normalizer": None,
    "dim": 1,
    "ignore_index": -100,
    "numbers": PLAIN,
    "reduction": 1,
    "loss_dtype": torch.float32,
    "statistics": False,
}
WRONG_FORWARD = {
    "dim too high": {"dim": 2},
    "dim negative": {"dim": -1},
    "dim of another target": {"dim": 0},
    "scalar logits": {"logits": torch.tensor(1.0), "target": torch.tensor(0), "dim": 0},
    "integer logits": {"logits": LOGITS.long()},
    "too few targets": {"target": TARGET[1:]},
    "too many targets": {"target": torch.zeros(5, dtype=torch.long)},
    "targets of two dimensions": {"target": TARGET[:, None]},
    "target out of range": {"target": TARGET + 100},
    "int16 targets": {"target": TARGET.short()},
    "bool targets": {"target": TARGET > 1},
    "probabilities of other shape": {"target": SOFT[:, 1:]},
    "probabilities of more precision": {"target": SOFT.double()},
    "probabilities of less precision": {"target": SOFT.half()},
    "float32 probabilities under float64": {"logits": LOGITS.double(), "target": SOFT},
    "probabilities of another 16-bit type": {"logits": LOGITS.half(), "target": SOFT.bfloat16()},
    "float64 probabilities under 16 bits": {"logits": LOGITS.half(), "target": SOFT.double()},
    "transposed probabilities": {"target": SOFT.mT},
    "short weight": {"weight": torch.ones(8)},
    "weight of other dtype": {"weight": torch.ones(9).double()},
    "weight with a step": {"weight": torch.ones(18)[::2]},
    "weight of two dimensions": {"weight": torch.ones(9, 1)},
    "short token_weight": {"token_weight": ROW_WEIGHT[1:]},
    "token_weight of other dtype": {"token_weight": ROW_WEIGHT.double()},
    "token_weight with a step": {"token_weight": torch.ones(8)[::2]},
    "normalizer of float32": {"normalizer": torch.tensor(4.0)},
    "normalizer of one dimension": {"normalizer": torch.tensor([4.0]).double()},
    "too few numbers": {"numbers": PLAIN[1:]},
    "too many numbers": {"numbers": [*PLAIN, 0.0]},
    "long weight": {"weight": torch.ones(10)},
    "token_weight of two dimensions": {"token_weight": torch.ones(4, 1)},
    "unknown reduction": {"reduction": 3},
    "negative reduction": {"reduction": -1},
    "loss of integers": {"loss_dtype": torch.int64},
    "target out of range beside a normalizer": {
        "target": TARGET + 6,
        "normalizer": torch.tensor(4.0).double(),
    },
    "statistics of 2^31 classes": {
        "logits": torch.ones(1, 1).expand(0, 2**31),
        "target": TARGET[:0],
        "statistics": True,
    },
}
FOCAL = [0.0, 0.0, 2.0, 0.0, 1.0]
BACKWARD, _ = make_backward(FORWARD)
ROWS = BACKWARD["row_max"]
WRONG_BACKWARD = {
    "upstream of other shape": {"grad_loss": torch.ones(5)},
    "upstream of two dimensions": {"grad_loss": torch.ones(4, 9)},
    "short row_max": {"row_max": ROWS[1:]},
    "row_max of other dtype": {"row_max": ROWS.double()},
    "row_max with a step": {"row_max": torch.ones(8)[::2]},
    "short log_sum": {"log_sum": ROWS[1:]},
    "total_weight of float32": {"total_weight": torch.tensor(4.0)},
    "total_weight of one dimension": {"total_weight": torch.tensor([4.0]).double()},
    "probabilities without label_mass": {"target": SOFT},
    "label_mass of other shape": {"target": SOFT, "label_mass": ROWS[1:]},
    "target out of range": {"target": TARGET + 100},
    "logits of other shape": {"logits": torch.randn(5, 9)},
    "short grad_lse": {"grad_lse": ROWS[1:]},
    "grad_lse of other dtype": {"grad_lse": ROWS.double()},
    "grad_entropy with a step": {"grad_entropy": torch.ones(8)[::2], "entropy": ROWS},
    "focal loss without its slope": {"numbers": FOCAL},
    "short token_weight": {"token_weight": ROW_WEIGHT[1:]},
    "log_sum of other dtype": {"log_sum": ROWS.double()},
    "log_sum with a step": {"log_sum": torch.ones(8)[::2]},
    "log_sum of two dimensions": {"log_sum": ROWS[:, None]},
    "label_mass of other dtype": {"target": SOFT, "label_mass": ROWS.double()},
    "label_mass with a step": {"target": SOFT, "label_mass": torch.ones(8)[::2]},
    "slope of other dtype": {"numbers": FOCAL, "loss_slope": ROWS.double()},
    "slope of other shape": {"numbers": FOCAL, "loss_slope": ROWS[1:]},
    "entropy of other dtype": {"grad_entropy": ROWS, "entropy": ROWS.double()},
    "short entropy": {"grad_entropy": ROWS, "entropy": ROWS[1:]},
    "short grad_entropy": {"grad_entropy": ROWS[1:], "entropy": ROWS},
    "grad_lse with a step": {"grad_lse": torch.ones(8)[::2]},
    "grad_lse of a batch": {"grad_lse": ROWS[None]},
    "upstream of one row": {"grad_loss": torch.ones(1)},
    "unknown reduction": {"reduction": 3},
    "negative reduction": {"reduction": -1},
    "too few numbers": {"numbers": PLAIN[1:]},
    "grad_entropy without an entropy": {"grad_entropy": ROWS},
}


def skip_what_only_the_cpu_refuses(wrong, device):
    if wrong == "target out of range" and device != "cpu":
        pytest.skip("such rows become NaN: test_cuda.py")


@pytest.mark.parametrize("wrong", WRONG_FORWARD)
def test_wrong_arguments_of_forward_are_refused(wrong, device):
    skip_what_only_the_cpu_refuses(wrong, device)
    arguments = FORWARD | WRONG_FORWARD[wrong]
    before = arguments["logits"].clone()
    for operator in (ops.forward, ops.forward_backward_):
        with pytest.raises((ValueError, RuntimeError, IndexError), match="must"):
            operator(**arguments)
        assert torch.equal(arguments["logits"], before)


@pytest.mark.parametrize("wrong", WRONG_BACKWARD)
def test_wrong_arguments_of_backward_are_refused(wrong, device):
    skip_what_only_the_cpu_refuses(wrong, device)
    arguments = BACKWARD | WRONG_BACKWARD[wrong]
    before = arguments["logits"].clone()
    for operator in (ops.backward, ops.backward_):
        with pytest.raises((ValueError, RuntimeError, IndexError), match="must"):
            operator(**arguments)
    assert torch.equal(arguments["logits"], before)


STRIDES = {  # of four rows or more, and whether elements share memory
    "a row after the other": ((4, 6), (6, 1), False),
    "a row begins where the other ends": ((4, 6), (5, 1), True),
    "classes and rows of one stride": ((4, 6), (1, 1), True),
    "columns": ((4, 6), (1, 4), False),
    "columns that overlap": ((4, 6), (1, 3), True),
    "three dimensions, one after the other": ((4, 6, 3), (18, 3, 1), False),
    "the outermost steps over the middle one alone": ((4, 6, 3), (16, 3, 1), True),
    "the outermost ends within the others": ((4, 6, 3), (17, 3, 1), True),
    "dimensions of size 1 have any stride": ((4, 6, 1), (6, 1, 0), False),
    "gaps": ((4, 6, 3), (100, 12, 4), False),
    "one number": ((4, 6), (0, 0), True),
}


@pytest.mark.parametrize("strides", STRIDES)
def test_memory_of_gradients(strides):
    """What has a place for every element is written to, all else is refused."""
    shape, strides, is_shared = STRIDES[strides]
    logits = torch.randn(400).as_strided(shape, strides)
    target = torch.randint(6, shape[:1] + shape[2:])
    forward = FORWARD | {"logits": logits, "target": target}
    backward, _ = make_backward(forward)
    scale = (logits, 2 * backward["grad_loss"], target, None, 1, -100)
    expected = ops.backward(**backward)
    before = logits.clone()
    if is_shared:
        for operator in (lambda: ops.backward_(**backward), lambda: ops.scale_gradient_(*scale)):
            with pytest.raises((ValueError, RuntimeError), match="must have one memory location"):
                operator()
        assert torch.equal(logits, before)
    else:
        ops.backward_(**backward)
        assert torch.equal(logits, expected)
        ops.scale_gradient_(*scale)
        torch.testing.assert_close(logits, 2 * expected)


def test_more_row_dimensions_than_are_counted_are_not_overwritten():
    """A copy would do for reading."""
    logits = torch.randn((9, *[4] * 6))[:, ::2, ::2, ::2, ::2, ::2].movedim(0, 1)
    target = torch.zeros(logits.shape[:1] + logits.shape[2:], dtype=torch.int64)
    forward = FORWARD | {"logits": logits, "target": target}
    before = logits.clone()
    with pytest.raises((ValueError, RuntimeError), match="at most 4 row dimensions"):
        ops.forward_backward_(**forward)
    assert torch.equal(logits, before)


def test_dimensions_of_size_1_are_no_row_dimensions():
    """The kernels count four that do not merge; these have none to be walked along."""
    shape, strides = (2, 9, 1, 3, 1, 2, 1, 2), (1, 300, 77, 7, 1000, 29, 500, 90)
    logits = torch.randn(4000).as_strided(shape, strides)
    target = torch.randint(9, shape[:1] + shape[2:])
    backward, _ = make_backward(FORWARD | {"logits": logits, "target": target})
    expected = ops.backward(**backward | {"logits": logits.contiguous()})
    ops.backward_(**backward)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
def test_rows_of_no_classes(soft):
    """Their loss is 0, and no class the greatest."""
    logits = torch.empty(4, 0)
    target = torch.empty(4, 0) if soft else torch.full((4,), -100)
    arguments = FORWARD | {"logits": logits, "target": target, "numbers": FOCAL, "reduction": 0}
    outputs = ops.forward(**arguments | {"statistics": True})
    loss, _, row_max, log_sum, mass, slope, entropy, argmax = outputs
    for rows in (loss, row_max, log_sum, slope, entropy, *([mass] if soft else [])):
        assert torch.equal(rows, torch.zeros(4))
    assert torch.equal(argmax, torch.full((4,), -1))
    assert not ops.forward_backward_(**arguments)[0].any()
    backward, _ = make_backward(arguments)
    assert ops.backward(**backward).shape == (4, 0)
    ops.scale_gradient_(logits, torch.tensor(2.0), target, None, 1, -100)


@pytest.mark.cpu("its memory alone")
def test_huge_pages_are_asked_for_within_the_gradient():
    """Where the system tells; each mapping of /proc/self/smaps ends with its flags."""
    smaps = Path("/proc/self/smaps")
    if not (smaps.exists() and Path("/sys/kernel/mm/transparent_hugepage").exists()):
        pytest.skip("this system has no transparent huge pages")
    logits, target = torch.randn(2000, 5000), torch.randint(5000, (2000,))
    backward, _ = make_backward(FORWARD | {"logits": logits, "target": target})
    gradient = ops.backward(**backward)
    begin = gradient.data_ptr()
    end, page = begin + gradient.numel() * 4, 2 << 20
    asked = []
    for mapping in re.findall(
        r"(?m)^([0-9a-f]+-[0-9a-f]+) (?:(?!VmFlags).*\n)*.*VmFlags:.* hg", smaps.read_text()
    ):
        first, last = (int(address, 16) for address in mapping.split("-"))
        if first < end and begin < last:
            asked.append((first, last))
    assert all(begin <= first and last <= end for first, last in asked)
    assert sum(last - first for first, last in asked) > end - begin - 2 * page


def test_overlapping_memory_is_not_written_to():
    before = EXPANDED.clone()
    with pytest.raises((ValueError, RuntimeError), match="must have one memory location"):
        ops.backward_(**BACKWARD | {"logits": EXPANDED})
    with pytest.raises((ValueError, RuntimeError), match="must have one memory location"):
        ops.forward_backward_(**FORWARD | {"logits": EXPANDED})
    with pytest.raises((ValueError, RuntimeError), match="must have one memory location"):
        ops.scale_gradient_(EXPANDED, 2 * BACKWARD["grad_loss"], TARGET, None, 1, -100)
    assert torch.equal(EXPANDED, before)


OVERWRITING = {  # each with the name of what it overwrites
    "forward_backward_": (FORWARD, "logits"),
    "backward_": (BACKWARD, "logits"),
    "scale_gradient_": (
        {
            **{name: FORWARD[name] for name in ("target", "token_weight", "dim", "ignore_index")},
            "grad_logits": LOGITS,
            "grad_loss": 2 * BACKWARD["grad_loss"],
        },
        "grad_logits",
    ),
}


@pytest.mark.parametrize("name", OVERWRITING)
def test_version_of_what_is_overwritten(name):
    """One more after the call, of no other argument, and none after a refusal."""
    arguments, overwritten = OVERWRITING[name]
    arguments = {n: x.clone() if torch.is_tensor(x) else x for n, x in arguments.items()}
    before = {n: x._version for n, x in arguments.items() if torch.is_tensor(x)}
    with pytest.raises((ValueError, RuntimeError), match="must"):
        getattr(ops, name)(**arguments | {"target": TARGET[1:]})
    assert {n: arguments[n]._version for n in before} == before
    getattr(ops, name)(**arguments)
    after = before | {overwritten: before[overwritten] + 1}
    assert {n: arguments[n]._version for n in before} == after


@pytest.mark.parametrize(
    ("gradient", "upstream", "target"),
    [
        (LOGITS, torch.ones(5), TARGET),
        (LOGITS, torch.ones(4, 1), TARGET),
        (LOGITS[1:], torch.ones(4), TARGET),
        (LOGITS, torch.ones(4), TARGET[1:]),
        (LOGITS.long(), torch.ones(4), TARGET),
    ],
)
def test_wrong_arguments_of_scale_gradient_are_refused(gradient, upstream, target):
    before = gradient.clone()
    with pytest.raises((ValueError, RuntimeError), match="must"):
        ops.scale_gradient_(gradient, upstream, target, None, 1, -100)
    assert torch.equal(gradient, before)


@pytest.mark.kernels
@pytest.mark.parametrize("n_classes", [64, 1024], ids=["one row a lane", "one class a lane"])
@pytest.mark.parametrize("factor", [0.5, 1.5, 1 + 2**-8, 2**-9 * 1.25, 3e4, "NaN of all bits"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_16_bit_numbers_are_read_and_rounded_to_nearest_even(dtype, factor, n_classes):
    """Infinities, NaN, numbers below the normal ones, and products halfway between two numbers."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, n_classes)
    target = torch.zeros(len(numbers), dtype=torch.int64)
    gradient = numbers.clone()
    if factor == "NaN of all bits":  # which rounding up would make a 0
        factor = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    ops.scale_gradient_(gradient, torch.as_tensor(factor), target, None, 1, -100)
    expected = (numbers.float() * factor).to(dtype)
    if dtype == torch.bfloat16 and fused_xent.cpu_capability() == "avx512_bf16":
        # The processor's own conversion takes numbers below the normal ones for 0.
        below = (numbers.float() * factor).abs() < torch.finfo(dtype).tiny
        gradient = gradient.where(~below | (gradient != 0), expected)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)


def test_capability_is_one_of_those_documented():
    assert fused_xent.cpu_capability() in ("avx512_bf16", "avx512", "avx2", "portable")
