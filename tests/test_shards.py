"""The operator that adds up the rows of a split vocabulary: on the CPU, in the emulator, in torch.

What each rank would send is computed in float64 from its part of the logits, and the results are
compared with those of all logits. With ``--device cuda`` the same cases run on a GPU.
"""

import math

import cuda_builds
import pytest
import torch
import torch.nn.functional as F

import fused_xent
from fused_xent import _ops
from fused_xent._meta import AddedUp

SIZES = {"two": (60, 41), "uneven": (1, 1, 201), "empty": (0, 30, 0, 7), "one": (20,)}
N_ROWS = 150  # more than a block of the kernel
DTYPES = (torch.float32, torch.float64)
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
IGNORED, BAD = 3, 5  # rows


@pytest.fixture(params=["native", "emulated", "decomposed"])
def operator(request, device, emulator_builds):
    if request.param == "native":
        return _ops._ops.add_up_shards.default
    if request.param == "decomposed":
        return fused_xent.decompositions()[_ops._ops.add_up_shards.default]
    if device != "cpu":
        pytest.skip("runs on a GPU, not in the emulator")
    if cuda_builds.MISSING:
        pytest.skip(cuda_builds.MISSING)
    cuda_builds.module(emulator_builds, "sm_100")
    return torch.ops.fused_xent_emulated.add_up_shards.default


class Case:
    """Logits and labels of all classes, and what each rank sends of its own."""

    def __init__(self, sizes, dtype, logits=None, labels=None):
        self.sizes, self.dtype, self.n_classes = sizes, dtype, sum(sizes)
        if logits is None:
            logits = 3 * torch.randn(N_ROWS, self.n_classes, dtype=torch.float64)
            logits[7] += 1e4
        self.logits = logits.to(dtype).double()
        self.target = torch.randint(self.n_classes, (len(logits),))
        self.labels = labels
        q = F.one_hot(self.target, self.n_classes).double() if labels is None else labels.double()
        self.q, self.ends = q, torch.tensor(sizes).cumsum(0)
        self.top = self.logits.max(1).values
        self.log_sum = (self.logits - self.top.unsqueeze(1)).logsumexp(1)
        self.log_p = (self.logits - self.top.unsqueeze(1)) - self.log_sum.unsqueeze(1)
        self.cross_entropy = -(q * self.log_p.masked_fill(q == 0, 0)).sum(1)
        parts = [self._sent(end - size, end) for size, end in zip(sizes, self.ends, strict=True)]
        self.sent = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        if labels is None:
            is_elsewhere = self.sent.pop("label_mass") == 0
            self.sent["part"].masked_fill_(is_elsewhere, -1)

    def _sent(self, start, end):
        z, q, zeros = self.logits[:, start:end], self.q[:, start:end], self.logits.new_zeros(())
        if start == end:
            zeros = zeros.expand(len(z))
            numbers = {"max": zeros - math.inf, "log_sum": zeros, "part": zeros}
            numbers |= {"label_mass": zeros, "entropy": zeros}
            argmax = zeros
        else:
            top = z.max(1, keepdim=True).values
            d = z - top
            # The greatest class is kept out of the sum, which may be far below 1 beside it.
            beside = d.exp().scatter(1, z.argmax(1, keepdim=True), 0).sum(1)
            log_sum = beside.log1p() + (top - top).squeeze(1)  # NaN for an infinite maximum
            log_p = d - log_sum.unsqueeze(1)
            entropy = -(log_p.exp() * log_p.masked_fill(log_p.isneginf(), 0)).sum(1)
            part = -(q * log_p.masked_fill(q == 0, 0)).sum(1)
            numbers = {"max": top.squeeze(1), "log_sum": log_sum, "part": part}
            numbers |= {"label_mass": q.sum(1), "entropy": entropy}
            argmax = z.argmax(1) + start
        bits = torch.int32 if self.dtype == torch.float32 else torch.int64
        numbers = {name: values.to(self.dtype) for name, values in numbers.items()}
        ends = [torch.tensor([float(end)], dtype=self.dtype) for end in (start, end)]
        return {**numbers, "argmax": argmax.to(bits).view(self.dtype)} | dict(
            zip(("first_class", "end_class"), ends, strict=True)
        )

    def run(self, operator, device, rank=0, without=(), **given):
        """Call the operator as a rank does: what was sent lies in one tensor."""
        sent = {name: x for name, x in self.sent.items() if name not in without}
        packed = torch.cat(list(sent.values()), 1).to(device)
        parts = packed.split([x.shape[1] for x in sent.values()], 1)
        of_name = dict(zip(sent, parts, strict=True))
        options = {x: given.pop(x) for x in ("lse_square_scale", "focal_gamma") if x in given}
        known = {"token_weight": None, "is_bad": None, "keeps_mass": False, **given}
        known = [x.to(device) if isinstance(x, torch.Tensor) else x for x in known.values()]
        token_weight, is_bad, keeps_mass = known
        found = operator(
            *(of_name.get(name) for name in _ops.SENT),
            *(token_weight, is_bad, rank, self.n_classes, keeps_mass),
            **options,
        )
        return AddedUp._make([x.cpu() for x in found])


def near(found, wanted, dtype, what):
    error = (found.double() - wanted).abs() / wanted.abs().clamp(min=1)
    assert error.max() < TOLERANCE[dtype], (what, error.max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_rows(operator, device, sizes, dtype):
    case = Case(sizes, dtype)
    for rank, end in enumerate(case.ends.tolist()):
        found = case.run(operator, device, rank)
        near(found.state[0], case.top, dtype, "max")
        near(found.state[1], case.log_sum, dtype, "log_sum")
        near(found.loss, case.cross_entropy, dtype, "loss")
        near(found.lse, case.top + case.log_sum, dtype, "lse")
        near(found.entropy, -(case.log_p.exp() * case.log_p).sum(1), dtype, "entropy")
        assert torch.equal(found.argmax, case.logits.argmax(1))
        is_own = (case.target >= end - sizes[rank]) & (case.target < end)
        assert torch.equal(found.other_mass, (~is_own).to(dtype))
        assert found.rise.numel() == 0
        assert found.state.shape == (2, N_ROWS)


@pytest.mark.parametrize("ranks", [(), (0, 1)], ids=["none", "two"])
def test_ranks_with_different_targets(operator, device, ranks):
    """The class of a row is on no rank, or on two: NaN, not a loss of other labels."""
    case = Case(SIZES["two"], torch.float32)
    case.sent["part"][:, BAD] = -1
    for rank in ranks:
        case.sent["part"][rank, BAD] = 1
    case.sent["part"][:, IGNORED] = -1
    token_weight = torch.ones(N_ROWS)
    token_weight[IGNORED] = 0
    found = case.run(operator, device, token_weight=token_weight)
    for name in ("loss", "other_mass"):
        values = getattr(found, name)
        assert values.isnan().nonzero().flatten().tolist() == [BAD], name
        assert values[IGNORED] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_labels_on_all_classes(operator, device, dtype):
    sizes = SIZES["uneven"]
    labels = torch.rand(N_ROWS, sum(sizes), dtype=torch.float64)
    labels[:, :1] = 0
    case = Case(sizes, dtype, labels=labels)
    for rank, (size, end) in enumerate(zip(sizes, case.ends.tolist(), strict=True)):
        found = case.run(operator, device, rank, keeps_mass=True)
        near(found.loss / labels.sum(1), case.cross_entropy / labels.sum(1), dtype, "loss")
        own = labels[:, end - size : end].sum(1)
        near(found.state[2], own, dtype, "own mass")
        near(found.other_mass, labels.sum(1) - own, dtype, "other mass")


def test_options(operator, device):
    """Focal loss, z-loss, token weights, and rows with a class out of range."""
    case = Case(SIZES["uneven"], torch.float64)
    token_weight = torch.rand(N_ROWS, dtype=torch.float64) + 0.5
    token_weight[IGNORED] = 0
    is_bad = torch.zeros(N_ROWS, dtype=torch.bool)
    is_bad[BAD] = True
    ce, lse = case.cross_entropy, case.logits.logsumexp(1)
    leaf = ce.clone().requires_grad_()
    focal = (1 - torch.exp(-leaf)) ** 1.5 * leaf
    (slope,) = torch.autograd.grad(focal.sum(), leaf)
    options = {"focal_gamma": 1.5, "lse_square_scale": 0.01}
    found = case.run(operator, device, 0, token_weight=token_weight, is_bad=is_bad, **options)
    loss = token_weight * (focal.detach() + 0.01 * lse**2)
    others = token_weight * slope * (case.target >= case.ends[0])
    assert found.loss[BAD].isnan()
    assert found.other_mass[BAD].isnan()
    good = ~is_bad
    torch.testing.assert_close(found.loss[good], loss[good])
    torch.testing.assert_close(found.other_mass[good], others[good])
    torch.testing.assert_close(found.state[2], slope)
    unread = found.loss, found.other_mass, found.lse, found.entropy
    assert [x[IGNORED].item() for x in unread] == [0, 0, 0, 0]
    assert found.argmax[IGNORED] == -1


def test_without_parts(operator, device):
    """Selected log-probabilities need the rise of the lse alone."""
    case = Case(SIZES["two"], torch.float64)
    found = case.run(operator, device, without=("part", "argmax", "entropy"))
    lse = torch.stack([x.logsumexp(1) for x in case.logits.split(SIZES["two"], 1)])
    torch.testing.assert_close(found.rise, case.logits.logsumexp(1) - lse)
    empty = found.loss, found.other_mass, found.lse, found.entropy, found.argmax
    assert [x.numel() for x in empty] == [0] * 5


@pytest.mark.parametrize("gap", [10, 20, 30])
def test_digits_of_confident_targets(operator, device, gap):
    sizes = SIZES["two"]
    logits = torch.randn(N_ROWS, sum(sizes), dtype=torch.float64) / 4
    case = Case(sizes, torch.float32, logits)
    logits.scatter_(1, case.target.unsqueeze(1), float(gap))
    target = case.target
    case = Case(sizes, torch.float32, logits)
    case = Case(sizes, torch.float32, logits, F.one_hot(target, sum(sizes)).double())
    others = logits.scatter(1, target.unsqueeze(1), -math.inf)
    wanted = (others - gap).exp().sum(1).log1p()
    found = case.run(operator, device)
    assert ((found.loss.double() - wanted).abs() / wanted).max() < 2e-6


def test_infinite_logits(operator, device):
    """-inf in a whole shard, +inf and NaN: the same rows as torch's are NaN."""
    sizes = SIZES["two"]
    logits = torch.randn(7, sum(sizes), dtype=torch.float64)
    logits[0, : sizes[0]] = -math.inf
    logits[1, sizes[0] :] = -math.inf
    logits[2] = -math.inf
    logits[3, 70] = math.inf
    logits[4, 2] = math.nan
    logits[4, 90] = math.nan
    logits[5, 90] = math.nan
    case = Case(sizes, torch.float64, logits)
    for state in ("max", "log_sum"):  # a shard of -inf alone has the lse -inf
        case.sent[state][0, 0] = -math.inf if state == "log_sum" else -1.7e308
        case.sent[state][1, 1] = -math.inf if state == "log_sum" else -1.7e308
    case.sent["max"].nan_to_num_(-5)  # as of the other classes
    case.sent["entropy"][:, :2].nan_to_num_(0)
    case.sent["part"][:, :2].nan_to_num_(math.inf)
    found = case.run(operator, device)
    wanted = -case.log_p.gather(1, case.target.unsqueeze(1)).squeeze(1)
    assert found.loss[2:6].isnan().all()
    good = wanted[[0, 1, 6]]
    torch.testing.assert_close(found.loss[[0, 1, 6]], good)
    assert found.argmax[3:6].tolist() == [70, 2, 90]
    entropy = -(case.log_p[:2].exp() * case.log_p[:2].masked_fill(case.log_p[:2] < -1e9, 0)).sum(1)
    torch.testing.assert_close(found.entropy[:2], entropy)


def test_ties_go_to_the_first_rank(operator, device):
    logits = torch.zeros(4, 10, dtype=torch.float64)
    found = Case((4, 6), torch.float32, logits).run(operator, device)
    assert found.argmax.tolist() == [0] * 4
    near(found.loss, torch.full((4,), math.log(10)), torch.float32, "loss")


@pytest.mark.parametrize(
    "ranges", [((0, 60), (61, 101)), ((0, 60), (59, 101)), ((0, 60), (60, 99))]
)
def test_wrong_ranges_are_nan(operator, device, ranges):
    case = Case(SIZES["two"], torch.float32)
    starts, ends = zip(*ranges, strict=True)
    case.sent["first_class"][:, 0] = torch.tensor(starts)
    case.sent["end_class"][:, 0] = torch.tensor(ends)
    found = case.run(operator, device)
    assert found.loss.isnan().all()
    assert found.state[1].isnan().all()


def test_empty_shards_may_begin_anywhere(operator, device):
    case = Case(SIZES["empty"], torch.float64)
    case.sent["first_class"][2] = case.sent["end_class"][2] = 4
    near(case.run(operator, device).loss, case.cross_entropy, torch.float64, "loss")


def test_no_rows(operator, device):
    case = Case(SIZES["two"], torch.float32, torch.zeros(0, 101))
    assert case.run(operator, device).loss.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 2}, r"rank must be in \[0, 2\), got 2"),
        ({"max": torch.zeros(2, 3, 1)}, r"max must be float32 or float64 of shape \(ranks, rows\)"),
        ({"max": torch.zeros(2, 3).half()}, "max must be float32 or float64"),
        ({"log_sum": torch.zeros(2, 4)}, r"log_sum must be like max, of 3 numbers .* \(2, 4\)"),
        ({"log_sum": torch.zeros(3, 2).t()}, "log_sum must be like max"),
        ({"log_sum": torch.zeros(2, 6)[:, :3]}, "log_sum must be like max"),
        ({"log_sum": torch.zeros(2, 3).double()}, "log_sum must be like max"),
        ({"first_class": torch.zeros(2, 2)}, "first_class must be like max, of 1 numbers"),
        ({"token_weight": torch.zeros(4)}, "token_weight must hold one value of each row"),
        ({"is_bad": torch.zeros(3)}, "is_bad must hold one value of each row"),
    ],
    ids=[f"case{i}" for i in range(10)],
)
def test_errors(request, operator, device, change, message):
    if "decomposed" in request.node.name:
        pytest.skip("torch operations check nothing")
    arguments = {"max": torch.zeros(2, 3), "log_sum": torch.zeros(2, 3)}
    arguments |= dict.fromkeys(_ops.SENT[2:]) | {"token_weight": None, "is_bad": None}
    arguments |= {"rank": 0, "n_classes": 5, "keeps_mass": False, **change}
    given = [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments.values()]
    with pytest.raises(ValueError, match=message):
        operator(*given)


def test_has_no_derivative():
    leaf = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="add_up_shards has no derivative"):
        _ops.add_up_shards({"max": leaf, "log_sum": leaf}, 5, 0)


@pytest.mark.parametrize("options", [{}, {"keeps_mass": True, "focal_gamma": 1.5}], ids=str)
@pytest.mark.parametrize("without", [(), ("argmax",), ("part", "argmax", "entropy")], ids=str)
def test_opcheck(options, without):
    """The schema says what the operator does, and its fake results are like the real ones."""

    def check(*arguments, **given):
        torch.library.opcheck(
            operator, arguments, given, test_utils=("test_schema", "test_faketensor")
        )
        return operator(*arguments, **given)

    operator = _ops._ops.add_up_shards.default
    labels = torch.rand(N_ROWS, sum(SIZES["two"]))
    case = Case(SIZES["two"], torch.float32, labels=labels)
    case.run(check, "cpu", without=without, **options)
