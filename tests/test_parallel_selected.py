"""Selected log-probabilities of classes that are split over processes, against float64.

Each test runs in processes of its own: a function `check_...` runs in each of them.
"""

import itertools

import processes
import pytest
import torch
from shards import (
    N_FEATURES,
    N_ROWS,
    SIZES,
    Shards,
    assert_gradients,
    assert_near,
    assert_same_on_all_ranks,
    leaves,
    make_layer,
    noting_collectives,
    own_layer,
)

from fused_xent import linear_selective_log_softmax, reference, selective_log_softmax

pytestmark = pytest.mark.cpu("uses gloo between processes")

OPTIONS = [{}, {"softcap": 5.0, "logit_scale": 0.5}]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def make_index(n_classes, n_labels=None, rows=(N_ROWS,)):
    """Return one class in each row, or n_labels; with padding, and rows of padding alone."""
    shape = rows if n_labels is None else (*rows, n_labels)
    index = torch.randint(n_classes, shape)
    index[torch.rand(shape) < 0.3] = -100
    if rows and index.numel():
        index[0] = -100
    return index


def wanted_of(logits, index, **options):
    """Return log-probabilities of index's shape, and the entropy, in float64."""
    is_one = index.dim() < logits.dim()
    found = reference.selective_log_softmax(
        logits, index.unsqueeze(-1) if is_one else index, **options
    )
    return found._replace(log_probs=found.log_probs.squeeze(-1)) if is_one else found


# ---- logits --------------------------------------------------------------------------------------


def check_logits():
    shards = Shards()
    for dtype, options, n_labels in itertools.product(TOLERANCES, OPTIONS, (None, 1, 5)):
        _check_logits(shards, dtype, options, n_labels)
    for gap in (5, 10, 20, 30):
        _check_near_1(shards, gap)
    _check_other_values(shards)
    _check_shapes(shards)
    _check_modes(shards)
    _check_padded_classes(shards)


def _check_logits(shards, dtype, options, n_labels):
    logits = (torch.randn(N_ROWS, shards.n_classes) * 3).to(dtype)
    index = make_index(shards.n_classes, n_labels)
    (exact,) = leaves([logits.double()])
    wanted = wanted_of(exact, index, **options)
    upstream = [torch.randn_like(x) for x in wanted]
    of_log_probs = torch.autograd.grad(wanted[0], exact, upstream[0], retain_graph=True)[0]
    of_entropy = torch.autograd.grad(wanted[1], exact, upstream[1], retain_graph=True)[0]
    rights = {(0,): of_log_probs, (1,): of_entropy, (0, 1): of_log_probs + of_entropy}
    results = torch.promote_types(dtype, torch.float32)
    what = (dtype, options, n_labels)
    (own,) = leaves([logits[:, shards.own]])
    log_probs = selective_log_softmax(own, index, **options, **shards.given)
    found = selective_log_softmax(own, index, with_entropy=True, **options, **shards.given)
    assert torch.equal(log_probs, found.log_probs)
    for one, right in zip(found, wanted, strict=True):
        assert one.dtype == results
        assert_near(one, right, 1e-12 if dtype == torch.float64 else 2e-6, what)
    assert_same_on_all_ranks(*found)
    assert (found.log_probs[index == -100] == 0).all()
    assert (found.entropy[0] == 0).all()
    for chosen, right in rights.items():
        values, grads = [found[i] for i in chosen], [upstream[i].to(results) for i in chosen]
        (gradient,) = torch.autograd.grad(values, own, grads, retain_graph=True)
        assert gradient.dtype == dtype
        assert_near(gradient, right[:, shards.own], TOLERANCES[dtype], (chosen, *what))


def _check_near_1(shards, gap):
    """All digits of the log-probability and its gradient as p goes to 1, on whatever rank."""
    logits, rows = torch.randn(N_ROWS, shards.n_classes), torch.arange(N_ROWS)
    index = torch.randint(shards.n_classes, (N_ROWS,))
    logits[rows, index] = logits.max(1).values + gap
    (exact,) = leaves([logits.double()])
    others = exact.clone()
    others[rows, index] = -torch.inf
    wanted = -torch.log1p((others - exact[rows, index].unsqueeze(1)).exp().sum(1))
    (right,) = torch.autograd.grad(wanted.sum(), exact)
    (own,) = leaves([logits[:, shards.own]])
    found = selective_log_softmax(own, index, **shards.given)
    torch.testing.assert_close(found.detach().double(), wanted.detach(), rtol=2e-6, atol=0)
    (gradient,) = torch.autograd.grad(found.sum(), own)
    torch.testing.assert_close(gradient.double(), right[:, shards.own], rtol=4e-6, atol=1e-30)


def _check_other_values(shards):
    """Masked classes, rows that are not finite, and rows that are left out."""
    logits = torch.randn(N_ROWS, shards.n_classes) + 100
    index = torch.full((N_ROWS, 2), shards.n_classes - 1)
    index[:, 1] = 0
    logits[1, : shards.n_classes // 2] = -torch.inf
    logits[2, 7] = torch.nan
    logits[3], index[3] = torch.nan, -100
    index[4, 1] = -100
    wanted = wanted_of(logits.double(), index)
    (own,) = leaves([logits[:, shards.own]])
    found = selective_log_softmax(own, index, with_entropy=True, **shards.given)
    for one, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            one.detach().double(), right, equal_nan=True, rtol=1e-6, atol=1e-6
        )
    assert wanted.log_probs[1].isneginf().tolist() == [False, True]
    (gradient,) = torch.autograd.grad(found.log_probs[:, 0].sum(), own)
    assert torch.isfinite(gradient[1]).all()
    assert gradient[2].isnan().all()
    assert (gradient[3] == 0).all()


def _check_shapes(shards):
    """Classes in any dimension, index of any integer dtype."""
    logits = torch.randn(2, shards.n_classes, 3)
    for shape in ((2, 3), (2, 4, 3), (0, 3)):
        given = logits[: shape[0]]
        index = torch.randint(shards.n_classes, shape)
        last = index if len(shape) == 2 else index.movedim(1, -1)
        (exact,) = leaves([given.double()])
        wanted = wanted_of(exact.movedim(1, -1), last).log_probs
        wanted = wanted if len(shape) == 2 else wanted.movedim(-1, 1)
        upstream = torch.randn_like(wanted)
        (right,) = torch.autograd.grad(wanted, exact, upstream)
        (own,) = leaves([given[:, shards.own]])
        found = selective_log_softmax(own, index.int(), dim=1, **shards.given)
        assert_near(found, wanted, 2e-6, shape)
        (gradient,) = torch.autograd.grad(found, own, upstream.float())
        assert_near(gradient, right[:, shards.own], 1e-6, shape)


def _check_modes(shards):
    """The gradient over the logits; one collective in forward, none in backward."""
    logits, index = torch.randn(N_ROWS, shards.n_classes), make_index(shards.n_classes, 3)
    (own,) = leaves([logits[:, shards.own]])
    found = selective_log_softmax(own, index, **shards.given)
    (right,) = torch.autograd.grad(found.sum(), own)
    for with_entropy in (False, True):
        computed, noted = own * 1, []
        options = {"inplace_backward": True, "with_entropy": with_entropy, **shards.given}
        with noting_collectives(noted):
            found = selective_log_softmax(computed, index, **options)
            log_probs = found.log_probs if with_entropy else found
            (gradient,) = torch.autograd.grad(log_probs.sum(), own)
        assert noted == [("gather", N_ROWS * (5 + with_entropy) + 2)]
        assert torch.equal(gradient, right)
        assert torch.equal(computed, right)
    with torch.no_grad():
        assert torch.equal(selective_log_softmax(own, index, **shards.given), log_probs)


def _check_padded_classes(shards):
    """Classes from num_classes on have probability and gradient 0, whatever their logits."""
    n_classes, size = shards.n_classes, -(-shards.n_classes // shards.n_ranks) + 1
    logits, index = torch.randn(N_ROWS, n_classes), make_index(n_classes, 3)
    padded = torch.full((N_ROWS, size * shards.n_ranks), torch.nan)
    padded[:, :n_classes] = logits
    (own,) = leaves([padded[:, shards.rank * size : (shards.rank + 1) * size]])
    (exact,) = leaves([logits.double()])
    wanted = wanted_of(exact, index).log_probs
    options = {"process_group": shards.group, "num_classes": n_classes}
    found = selective_log_softmax(own, index, **options)
    assert_near(found, wanted, 2e-6, "padding")
    (right,) = torch.autograd.grad(wanted.sum(), exact)
    (gradient,) = torch.autograd.grad(found.sum(), own)
    right = right[:, shards.rank * size : (shards.rank + 1) * size]
    assert_near(gradient[:, : right.shape[1]], right, 1e-6, "padding")
    assert (gradient[:, right.shape[1] :] == 0).all()


# ---- linear layers -------------------------------------------------------------------------------


def check_layers():
    shards = Shards()
    cases = itertools.product(OPTIONS, (None, 1, 5), (False, True), (None, 5))
    for options, n_labels, sequence_parallel, chunk_rows in cases:
        given = {"sequence_parallel": sequence_parallel, "chunk_rows": chunk_rows, **options}
        _check_layer(shards, torch.float32, n_labels, (N_ROWS,), given)
    for dtype in TOLERANCES:
        _check_layer(shards, dtype, 2, (6, 5), {"sequence_parallel": True, "chunk_rows": 7})
        _check_layer(shards, dtype, 2, (6, 5), {"chunk_rows": 7})
    for rows, n_labels in itertools.product(((), (0,)), (None, 3)):
        _check_layer(shards, torch.float32, n_labels, rows, {})
    _check_calls_of_layers(shards)


def _check_layer(shards, dtype, n_labels, rows, given):
    layer, index = (
        make_layer(shards.n_classes, dtype, rows),
        make_index(shards.n_classes, n_labels, rows),
    )
    exact = leaves([x.double() for x in layer])
    options = {name: x for name, x in given.items() if name in ("softcap", "logit_scale")}
    wanted = wanted_of(exact[0] @ exact[1].t() + exact[2], index, **options)
    upstream = [torch.randn_like(x) for x in wanted]
    of_log_probs = torch.autograd.grad(wanted[0], exact, upstream[0], retain_graph=True)
    of_both = torch.autograd.grad(wanted, exact, upstream)
    is_split = given.get("sequence_parallel", False)
    hidden, linear_weight, bias = own = own_layer(shards, layer, is_split)
    given = {"linear_bias": bias, **given, **shards.given}
    log_probs = linear_selective_log_softmax(hidden, linear_weight, index, **given)
    given["with_entropy"] = True
    found = linear_selective_log_softmax(hidden, linear_weight, index, **given)
    tolerance, what = TOLERANCES[dtype], (dtype, n_labels, rows, given)
    assert_near(log_probs, wanted.log_probs, 2 * tolerance, what)
    for one, right in zip(found, wanted, strict=True):
        assert_near(one, right, 2 * tolerance, what)
    assert_same_on_all_ranks(*found)
    grads = [x.to(found.entropy.dtype) for x in upstream]
    gradients = torch.autograd.grad(log_probs, own, grads[0])
    assert_gradients(gradients, of_log_probs, shards, tolerance, what, is_split)
    gradients = torch.autograd.grad(found, own, grads, retain_graph=True)
    assert_gradients(gradients, of_both, shards, 2 * tolerance, what, is_split)
    again = torch.autograd.grad(found, own, grads)
    assert all(map(torch.equal, gradients, again))
    if not is_split:
        assert_same_on_all_ranks(gradients[0])


def _check_calls_of_layers(shards):
    """One gather of each chunk in forward, one sum in backward; parts of grad_hidden."""
    chunk_rows, n_labels = 6, 3
    layer, index = make_layer(shards.n_classes), make_index(shards.n_classes, n_labels)
    own, noted = own_layer(shards, layer), []
    options = {"linear_bias": own[2], "chunk_rows": chunk_rows, **shards.given}
    with noting_collectives(noted):
        found = linear_selective_log_softmax(*own[:2], index, **options)
        assert noted == [("gather", chunk_rows * (2 + n_labels) + 2)] * 2
        noted.clear()
        (right,) = torch.autograd.grad(found.sum(), own[0])
        assert noted == [("reduce", chunk_rows * N_FEATURES)] * 2
        noted.clear()
        options["reduce_grad_hidden"] = False
        found = linear_selective_log_softmax(*own[:2], index, **options)
        (part,) = torch.autograd.grad(found.sum(), own[0])
        assert len(noted) == 2
    torch.distributed.all_reduce(part)
    assert_near(part, right, 1e-5, "parts")


# ---- processes -----------------------------------------------------------------------------------


def check_all():
    check_logits()
    check_layers()


@pytest.mark.parametrize("n_processes", SIZES)
def test_selected(n_processes):
    processes.run(check_all, n_processes)


def check_errors():
    shards = Shards()
    hidden, linear_weight, _ = make_layer(shards.n_classes)
    linear_weight, index = linear_weight[shards.own], make_index(shards.n_classes)
    logits = hidden @ linear_weight.t()

    def fails(error, message, labels=index, **options):
        options = {**shards.given, **options}
        with pytest.raises(error, match=message):
            selective_log_softmax(logits, labels, **options)
        with pytest.raises(error, match=message):
            linear_selective_log_softmax(hidden, linear_weight, labels, **options)

    bad = index.clone()
    bad[1] = shards.n_classes
    fails(IndexError, rf"index must be in \[0, {shards.n_classes}\) or -100", labels=bad)
    fails(ValueError, "the ranks' shards must be", num_classes=shards.n_classes + 1)
    fails(TypeError, "process_group must be a ProcessGroup", process_group=3)
    fails(ValueError, "vocab_start must be None without a process_group", process_group=None)
    (own,) = leaves([logits])
    log_probs = selective_log_softmax(own, index, **shards.given)
    with pytest.raises(RuntimeError, match="process_group must be None for create_graph=True"):
        torch.autograd.grad(log_probs.sum(), own, create_graph=True)
    with pytest.raises(RuntimeError, match="process_group must be None under the transforms"):
        torch.func.grad(lambda x: selective_log_softmax(x, index, **shards.given).sum())(logits)
    options = {**shards.given, "sequence_parallel": True, "reduce_grad_hidden": False}
    with pytest.raises(ValueError, match="reduce_grad_hidden must be True with sequence_parallel"):
        linear_selective_log_softmax(hidden, linear_weight, index, **options)


def test_errors():
    processes.run(check_errors, 2)
