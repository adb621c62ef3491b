"""Log-probabilities of selected classes, against log_softmax and gather in float64."""

import pytest
import torch
from cases import DTYPES
from compare import half_ulp, smallest
from problems import assert_near
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fused_xent
from fused_xent import SelectedLogProbs, selective_log_softmax

ERROR = 5e-6  # relative to the summed terms
WITH_ENTROPY = {"with_entropy": True}


def make_index(shape, n_classes, n_selected, dim=-1):
    """Return classes: repeated, padded, and one row of padding only."""
    rows = list(shape)
    n_dims = len(rows)
    del rows[dim]
    if n_selected is None:
        index = torch.randint(n_classes, rows)
        index.view(-1)[1::4] = -100
        return index
    rows.insert(dim % n_dims, n_selected)
    index = torch.randint(n_classes, rows)
    index.masked_fill_(torch.rand(rows) < 0.2, -100)
    by_row = index.movedim(dim, -1)
    if n_selected > 1:
        by_row[..., 1] = by_row[..., 0]
    if by_row.dim() > 1:
        by_row[1:2] = -100
    return index


def exact(logits, index, dim=-1, softcap=None, logit_scale=1.0):
    """Return log-probabilities and entropy in float64. Logits of rows of padding have no effect."""
    dim = dim % logits.dim()
    classes = index.unsqueeze(dim) if index.dim() < logits.dim() else index
    padding = classes == -100
    z = logits.double().masked_fill(padding.all(dim, keepdim=True), 0) * logit_scale
    z = z if softcap is None else softcap * (z / softcap).tanh()
    log_prob = z.log_softmax(dim)
    log_probs = log_prob.gather(dim, classes.long().clamp(min=0)).masked_fill(padding, 0)
    entropy = -(log_prob.exp() * log_prob).nan_to_num(0).sum(dim)
    entropy = entropy.masked_fill(padding.all(dim), 0)
    return SelectedLogProbs(log_probs.view(index.shape), entropy)


def gradient_terms(logits, index, grads, dim=-1, softcap=None, logit_scale=1.0):
    """Return the magnitude of the terms that each entry of the gradient sums."""
    dim = dim % logits.dim()
    classes, grad_log_probs = index, grads[0].double().abs()
    if index.dim() < logits.dim():
        classes, grad_log_probs = (x.unsqueeze(dim) for x in (index, grad_log_probs))
    padding = classes == -100
    grad_log_probs = grad_log_probs.masked_fill(padding, 0)
    z = logits.detach().double().masked_fill(padding.all(dim, keepdim=True), 0) * logit_scale
    z = z if softcap is None else softcap * (z / softcap).tanh()
    log_prob = z.log_softmax(dim)
    p = log_prob.exp()
    terms = p * grad_log_probs.sum(dim, keepdim=True)
    terms = terms.scatter_add(dim, classes.long().clamp(min=0), grad_log_probs)
    if len(grads) > 1:
        bound = grads[1].double().abs().unsqueeze(dim) * p * (1 - 2 * log_prob.clamp(min=-1e3))
        terms = terms + bound * (1 + p.shape[dim] ** 0.5 / 100)
    return terms.masked_fill(padding.all(dim, keepdim=True), 0) * logit_scale


def check(logits, index, *, with_entropy=False, inplace=False, **options):
    """Compare results and gradient of the logits with float64, entry by entry."""
    leaf = logits.detach().requires_grad_()
    exact_leaf = logits.detach().double().requires_grad_()
    given = options | ({"inplace_backward": True} if inplace else {})
    computed = leaf.clone() if inplace else leaf
    found = selective_log_softmax(computed, index, with_entropy=with_entropy, **given)
    expected = exact(exact_leaf, index, **options)
    assert isinstance(found, SelectedLogProbs if with_entropy else torch.Tensor)
    found, expected = (tuple(found), expected) if with_entropy else ((found,), expected[:1])
    error = ERROR if logits.dtype != torch.float64 else 1e-12
    error *= 1 + options.get("softcap", 0) / 10
    for name, one, other in zip(("log_probs", "entropy"), found, expected, strict=False):
        assert one.dtype == torch.promote_types(logits.dtype, torch.float32)
        assert_near(name, one, other, error * (1 + other.detach().abs()))
    grads = [torch.randn(x.shape, dtype=x.dtype) for x in found]
    (gradient,) = torch.autograd.grad(found, leaf, grads)
    exact_grads = [grad.double() for grad in grads]
    (exact_gradient,) = torch.autograd.grad(expected, exact_leaf, exact_grads)
    terms = gradient_terms(logits, index, grads, **options)
    tolerance = error * terms + 1.01 * half_ulp(logits.dtype) * exact_gradient.abs()
    at_padding = terms == 0  # exactly 0
    tolerance = (tolerance + 4 * smallest(logits.dtype)).masked_fill(at_padding, 0)
    assert gradient.dtype == logits.dtype
    assert_near("gradient", gradient, exact_gradient, tolerance)
    if inplace:
        assert torch.equal(computed.nan_to_num(), gradient.nan_to_num())


@pytest.mark.kernels
@pytest.mark.parametrize("n_selected", [None, 1, 3, 64, 1000])
@pytest.mark.parametrize("n_classes", [5, 100, 1000, 50257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype, n_classes, n_selected):
    n_rows = 3 if n_classes > 1000 else 7
    logits = (torch.randn(n_rows, n_classes) * 3).to(dtype)
    index = make_index(logits.shape, n_classes, n_selected)
    check(logits, index)
    check(logits, index, with_entropy=True)
    check(logits, index, inplace=True)
    check(logits, index, with_entropy=True, inplace=True)


LAYOUTS = {  # logits, and the dimension of the classes
    "one row": lambda: (torch.randn(40), -1),
    "sequences": lambda: (torch.randn(2, 3, 50), -1),
    "shifted sequences": lambda: (torch.randn(2, 4, 50)[:, :-1], 2),
    "image": lambda: (torch.randn(2, 30, 4, 5), 1),
    "image of many classes": lambda: (torch.randn(2, 300, 3, 5), 1),
    "channels last": lambda: (torch.randn(2, 30, 4, 5).to(memory_format=torch.channels_last), 1),
    "transposed": lambda: (torch.randn(60, 7).t(), -1),
    "a part of the classes": lambda: (torch.randn(6, 1100)[:, :1001], -1),
    "an odd start": lambda: (torch.randn(6, 1101)[:, 1:], 1),
    "classes first": lambda: (torch.randn(150, 3, 2), 0),
    "every second class": lambda: (torch.randn(5, 400)[:, ::2], -1),
    "no rows": lambda: (torch.randn(0, 9), -1),
}


@pytest.mark.kernels
@pytest.mark.parametrize("n_selected", [None, 1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, n_selected):
    logits, dim = LAYOUTS[layout]()
    index = make_index(logits.shape, logits.shape[dim], n_selected, dim)
    check(logits, index, dim=dim)
    check(logits.bfloat16(), index.int(), dim=dim, with_entropy=True)


@pytest.mark.parametrize("n_selected", [None, 4])
def test_layouts_of_index_and_upstream_gradient(n_selected):
    """A transposed index, and an expanded upstream gradient."""
    logits = torch.randn(5, 30, requires_grad=True)
    index = make_index(logits.shape, 30, n_selected)
    strided = torch.stack([index, index * 0], -1)[..., 0]
    strided = strided.t().contiguous().t() if n_selected else strided
    for sign in (1, -2):
        found, expected = (
            torch.autograd.grad((sign * f(logits, i)).sum(), logits)
            for f, i in (
                (selective_log_softmax, strided),
                (lambda x, i: exact(x, i).log_probs, index),
            )
        )
        assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.kernels
@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"logit_scale": 0.7}, "both"], ids=str)
@pytest.mark.parametrize("n_selected", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap_and_logit_scale(dtype, n_selected, options):
    options = {"softcap": 5.0, "logit_scale": 1.3} if options == "both" else options
    for n_classes in (40, 700):
        logits = (torch.randn(6, n_classes) * 3).to(dtype)
        index = make_index(logits.shape, n_classes, n_selected)
        for with_entropy in (False, True):
            check(logits, index, with_entropy=with_entropy, **options)


@pytest.mark.parametrize("n_selected", [None, 3])
@pytest.mark.parametrize("n_classes", [20, 500])
def test_rows_of_padding_are_not_read(n_classes, n_selected):
    logits = torch.randn(4, n_classes)
    index = make_index(logits.shape, n_classes, n_selected)
    assert (index.view(4, -1)[1] == -100).all()
    logits[1] = torch.nan
    for with_entropy in (False, True):
        check(logits, index, with_entropy=with_entropy)
        check(logits, index, with_entropy=with_entropy, inplace=True)
    found = selective_log_softmax(logits, index, with_entropy=True)
    for result in found:
        assert result[1].eq(0).all()
        assert not result[1].signbit().any()


@pytest.mark.parametrize("n_selected", [None, 2])
def test_impossible_classes(n_selected):
    """The log-probability of a logit of -inf is -inf, and the gradient is finite."""
    logits = torch.randn(3, 30)
    logits[:, 4:9] = -torch.inf
    index = torch.full((3,) if n_selected is None else (3, 2), 5)
    index[0] = 1
    leaf, exact_leaf = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found, expected = selective_log_softmax(leaf, index), exact(exact_leaf, index).log_probs
    assert_close(found.double(), expected)
    assert found[1:].isneginf().all()
    for result in (found, expected):
        result[:1].sum().backward()
    assert_close(leaf.grad.double(), exact_leaf.grad)


@pytest.mark.kernels
@pytest.mark.parametrize("n_selected", [None, 1, 5])
@pytest.mark.parametrize("n_classes", [50, 1000])
@pytest.mark.parametrize("gap", [10, 30])
def test_probabilities_close_to_1(gap, n_classes, n_selected):
    """Log-probability and gradient keep their relative precision; float64 alone would not."""
    logits = torch.randn(6, n_classes)
    top = torch.randint(n_classes, (6,))
    logits.scatter_(1, top.unsqueeze(1), logits.amax(1, keepdim=True) + gap)
    index = top
    if n_selected is not None:
        index = torch.randint(n_classes, (6, n_selected))
        index[:, -1] = top
    leaf = logits.clone().requires_grad_()
    found = selective_log_softmax(leaf, index)
    found = found if n_selected is None else found[:, -1]
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    z = logits.double()
    others = (z - z.gather(1, top.unsqueeze(1))).exp().scatter(1, top.unsqueeze(1), 0)
    rest = others.sum(1)
    assert_close(found.double(), -rest.log1p(), rtol=2e-6, atol=1e-40)
    expected = (-others / (1 + rest).unsqueeze(1)).scatter(
        1, top.unsqueeze(1), (rest / (1 + rest)).unsqueeze(1)
    )
    assert_close(gradient.double(), expected, rtol=4e-6, atol=1e-37)


@pytest.mark.parametrize("n_selected", [None, 3])
def test_the_gradient_of_the_entropy_alone(n_selected):
    logits = torch.randn(6, 50, requires_grad=True)
    index = make_index(logits.shape, 50, n_selected)
    found = selective_log_softmax(logits, index, with_entropy=True).entropy
    expected = exact(logits, index).entropy
    upstream = torch.randn(6)
    found, expected = (
        torch.autograd.grad(x, logits, upstream)[0] for x in (found, expected.float())
    )
    assert_close(found, expected)


@pytest.mark.parametrize("dim", [-1, 1])
def test_cases_of_trl(dim):
    """TRL's selective_log_softmax, in bfloat16: as exact as from float32 log-probabilities."""
    logits = torch.randn(4, 32, 1024).bfloat16()
    for index in (torch.randint(1024, (4, 32)), torch.randint(1024, (4, 32, 3))):
        of_each = index if index.dim() == 3 else index.unsqueeze(-1)
        expected = logits.float().log_softmax(-1).gather(-1, of_each).view(index.shape)
        given = (logits, index) if dim == -1 else (logits.mT, index)
        if dim == 1 and index.dim() == 3:
            given = (logits.mT, index.mT)
        found = selective_log_softmax(*given, dim=dim)
        found = found.mT if dim == 1 and index.dim() == 3 else found
        assert found.dtype == torch.float32
        assert_close(found, expected, rtol=1e-5, atol=1e-5)
        rounded = logits.log_softmax(-1).gather(-1, of_each).view(index.shape)
        assert (rounded.float() - expected).exp().sub(1).abs().max() > 0.01


# ---- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_selected", [None, 8])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_nothing_of_the_logits_size_is_allocated_or_saved(with_entropy, n_selected):
    n_rows, n_classes = 64, 5000
    leaf = torch.randn(n_rows, n_classes, requires_grad=True)
    index = make_index(leaf.shape, n_classes, n_selected)
    logits, saved = leaf * 1, []
    activity = ProfilerActivity.CPU if leaf.is_cpu else ProfilerActivity.CUDA

    def note(tensor):
        saved.append(tensor)
        return tensor

    fused_xent.empty_cache()
    hooks = saved_tensors_hooks(note, lambda tensor: tensor)
    with profile(activities=[activity], profile_memory=True) as forward, hooks:
        results = selective_log_softmax(
            logits, index, with_entropy=with_entropy, inplace_backward=True
        )
    log_probs = results.log_probs if with_entropy else results
    with profile(activities=[activity], profile_memory=True) as backward:
        (gradient,) = torch.autograd.grad(log_probs.sum(), logits)
    for run in (forward, backward):
        sizes = [event.self_cpu_memory_usage for event in run.events()]
        assert sum(size for size in sizes if size > 0) < 0.1 * leaf.nbytes
    big = {tensor.data_ptr() for tensor in saved if tensor.nbytes > 0.1 * leaf.nbytes}
    assert big == {logits.data_ptr()}
    assert gradient.data_ptr() == logits.data_ptr()


# ---- derivatives and transforms ----------------------------------------------------------------


def small(dtype=torch.float64):
    logits = torch.randn(4, 7, dtype=dtype, requires_grad=True)
    index = torch.tensor([[1, -100, 3], [6, 6, 0], [-100, -100, -100], [2, 2, 2]])
    return logits, index


INDEXES = {"K": lambda index: index, "one class": lambda index: index[:, 0]}
by_index = pytest.mark.parametrize("which", INDEXES)
OPTIONS = {"softcap": 4.0, "logit_scale": 0.7}


@by_index
@pytest.mark.parametrize("derivative", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "all options"])
def test_finite_differences(options, derivative, which):
    logits, index = small()
    index = INDEXES[which](index)
    assert derivative(lambda x: selective_log_softmax(x, index, **options), logits)
    both = {**options, **WITH_ENTROPY}
    assert derivative(lambda x: tuple(selective_log_softmax(x, index, **both)), logits)
    assert derivative(lambda x: selective_log_softmax(x, index, **both).entropy, logits)


func = torch.func
TRANSFORMS = {
    "grad": func.grad,
    "grad of grad": lambda f: func.grad(lambda x: func.grad(f)(x).pow(2).sum()),
    "hessian": func.hessian,
    "jacrev": func.jacrev,
    "jacfwd": func.jacfwd,
    "jvp": lambda f: lambda x: func.jvp(f, (x,), (x.cos(),)),
    "vmap": lambda f: lambda x: func.vmap(f)(torch.stack([x, 2 * x])),
    "vmap of grad": lambda f: lambda x: func.vmap(func.grad(f))(torch.stack([x, 2 * x])),
}


@by_index
@pytest.mark.filterwarnings("ignore")  # of torch's own forward-mode formulas
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func(transform, which):
    logits, index = small()
    index, logits = INDEXES[which](index), logits.detach()

    def total(function):
        def run(x):
            log_probs, entropy = function(x)
            return (log_probs * torch.arange(3.0).view(3, -1)[: index.dim()].sum()).sum() + (
                entropy.square().sum()
            )

        return run

    def fused(x):
        return selective_log_softmax(x, index, with_entropy=True, **OPTIONS)

    def plain(x):
        return exact(x, index, **OPTIONS)

    apply = TRANSFORMS[transform]
    assert_close(apply(total(fused))(logits), apply(total(plain))(logits))


@by_index
def test_logits_used_after_their_transform(which):
    """Logits that torch.func.grad passed to its function are used after grad returned."""
    left = []

    def keep(logits):
        left.append(logits)
        return logits.sum()

    leaf, index = small()
    index = INDEXES[which](index)
    func.grad(keep)(leaf)
    results = [
        (found, *torch.autograd.grad(found.sum(), leaf))
        for found in (
            selective_log_softmax(left[0], index),
            exact(left[0], index)[0],
        )
    ]
    assert_close(*results)


def test_vmap_marks_classes_out_of_range():
    logits, _ = small(torch.float32)
    index = torch.tensor([[1, 7], [0, 2], [-100, 3], [-1, -100]])
    found = func.vmap(selective_log_softmax)(logits.detach(), index)
    assert found[[0, 3]].isnan().all()  # of padding beside them too, as on GPUs
    assert_close(found[1:3].double(), exact(logits.detach(), index.clamp(max=6))[0][1:3])


@by_index
def test_batched_gradients(which):
    logits, index = small()
    index = INDEXES[which](index)
    outputs = tuple(selective_log_softmax(logits, index, with_entropy=True))
    grads = [torch.randn(3, *x.shape, dtype=x.dtype) for x in outputs]
    keep = {"retain_graph": True}
    expected = torch.stack(
        [torch.autograd.grad(outputs, logits, each, **keep)[0] for each in zip(*grads, strict=True)]
    )
    for create_graph in (False, True):
        options = {"is_grads_batched": True, "create_graph": create_graph}
        (found,) = torch.autograd.grad(outputs, logits, grads, **keep, **options)
        assert_close(found, expected)
        assert found.requires_grad == create_graph


@by_index
def test_batched_gradients_are_refused_in_place(which):
    logits, index = small()
    found = selective_log_softmax(logits * 1, INDEXES[which](index), inplace_backward=True)
    with pytest.raises(RuntimeError, match="inplace_backward must be False for is_grads_batched"):
        torch.autograd.grad(found, logits, torch.stack([found] * 2), is_grads_batched=True)


@by_index
def test_forward_mode(which):
    logits, index = small()
    logits, tangent = logits.detach(), torch.randn(4, 7, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits, tangent)
        results = [
            torch.autograd.forward_ad.unpack_dual(x)
            for x in (
                selective_log_softmax(dual, INDEXES[which](index)),
                exact(dual, INDEXES[which](index)).log_probs,
            )
        ]
    assert_close(tuple(results[0]), tuple(results[1]))


@by_index
@pytest.mark.parametrize("options", [{}, WITH_ENTROPY], ids=["alone", "with entropy"])
def test_checkpoints(options, which):
    """A checkpoint lets a backward read its saved tensors only once."""
    logits, index = small()
    index = INDEXES[which](index)

    def run(logits):
        results = selective_log_softmax(logits * 2, index, **options)
        return results.log_probs.sum() + results.entropy.sum() if options else results.sum()

    found = checkpoint(run, logits, use_reentrant=False)
    assert_close(*(torch.autograd.grad(x, logits)[0] for x in (found, run(logits))))


@by_index
def test_logits_that_change_before_the_backward(which):
    logits, index = small()
    index = INDEXES[which](index)
    changed = logits * 1
    found = selective_log_softmax(changed, index)
    changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()
    found = selective_log_softmax(logits * 1, index, inplace_backward=True).sum()
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


@by_index
@pytest.mark.filterwarnings("ignore")  # of torch.jit
def test_traced_graphs(which):
    logits, index = small(torch.float32)
    index, logits = INDEXES[which](index), logits.detach()

    def gradient(logits):
        leaf = logits.detach().requires_grad_()
        results = selective_log_softmax(leaf, index, with_entropy=True)
        return torch.autograd.grad(results.log_probs.sum() + results.entropy.sum(), leaf)[0]

    assert_close(make_fx(gradient)(logits)(2 * logits), gradient(2 * logits))
    traced = torch.jit.trace(lambda x: selective_log_softmax(x, index), logits)
    leaf = (2 * logits).requires_grad_()
    expected = selective_log_softmax(leaf, index)
    assert_close(traced(leaf), expected)
    assert_close(*(torch.autograd.grad(x.sum(), leaf) for x in (traced(leaf), expected)))


@by_index
@pytest.mark.filterwarnings("ignore")  # of torch.compile
def test_compiles_for_any_shape(which):
    torch.compiler.reset()
    compiled = torch.compile(
        selective_log_softmax, backend="aot_eager", dynamic=True, fullgraph=True
    )
    for n_rows in (6, 9, 12):
        logits = torch.randn(n_rows, 30 + n_rows)
        index = INDEXES[which](make_index(logits.shape, 30, 3))
        assert_close(compiled(logits, index), selective_log_softmax(logits, index))


@by_index
@pytest.mark.filterwarnings("ignore")  # of torch.compile
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(backend, which):
    torch.compiler.reset()
    logits, index = small(torch.float32)
    index = INDEXES[which](index)

    def model(logits):
        results = selective_log_softmax(logits * 3, index, with_entropy=True, **OPTIONS)
        alone = selective_log_softmax(logits * 2, index, inplace_backward=True)
        return 2 * results.log_probs.exp().sum() + results.entropy.square().sum() + alone.sum()

    found = torch.compile(model, backend=backend, fullgraph=True)(logits)
    assert_close(found, model(logits))
    gradients = [torch.autograd.grad(x, logits)[0] for x in (found, model(logits))]
    assert_close(*gradients)


@by_index
@pytest.mark.filterwarnings("ignore")  # of torch.compile
@pytest.mark.parametrize("inplace", [False, True])
def test_logits_of_a_compiled_graph_are_overwritten(inplace, which):
    """But not before they are used elsewhere."""
    torch.compiler.reset()
    leaf, index = small(torch.float32)
    index = INDEXES[which](index)

    def model(leaf):
        logits = leaf * 3
        return selective_log_softmax(logits, index, inplace_backward=inplace).sum(), logits.sin()

    results = torch.compile(model, backend="aot_eager", fullgraph=True)(leaf)
    expected = exact(leaf.double() * 3, index).log_probs.sum(), (leaf.double() * 3).sin()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        (gradient,) = torch.autograd.grad(results[0] + results[1].sum(), leaf)
    operators = {event.key for event in seen.key_averages()}
    assert ("fused_xent::backward_" in operators) == inplace
    assert ("fused_xent::backward" in operators) != inplace
    assert_close(results[1].double(), expected[1], rtol=1e-5, atol=1e-5)
    (exact_gradient,) = torch.autograd.grad(expected[0] + expected[1].sum(), leaf)
    assert_close(gradient, exact_gradient, rtol=1e-5, atol=1e-5)


class Model(torch.nn.Module):
    def __init__(self, index):
        super().__init__()
        self.index = index

    def forward(self, logits):
        log_probs, entropy = selective_log_softmax(
            logits * 2, self.index, with_entropy=True, **OPTIONS
        )
        return log_probs, entropy, selective_log_softmax(logits, self.index)


@by_index
@pytest.mark.filterwarnings("ignore")  # of torch.export
@pytest.mark.parametrize("strict", [False, True])
def test_exported_and_decomposed_programs(strict, which):
    logits, index = small(torch.float32)
    index = INDEXES[which](index)
    program = torch.export.export(Model(index), (logits.detach(),), strict=strict)
    table = torch.export.default_decompositions() | fused_xent.decompositions()
    decomposed = program.run_decompositions(table)
    assert "fused_xent" in str(program.graph)
    assert "fused_xent" not in str(decomposed.graph)
    expected = exact(logits * 2, index, **OPTIONS), exact(logits, index).log_probs
    expected = [x.float() for x in (*expected[0], expected[1])]
    for each in (program, decomposed):
        found = each.module()(logits)
        assert_close(tuple(found), tuple(expected))
        gradients = (
            torch.autograd.grad(x, logits, x, retain_graph=True) for x in (found, expected)
        )
        assert_close(*gradients)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, with_entropy):
    operator = torch.ops.fused_xent.selected_log_probs.default
    logits, index = small(dtype)
    torch.library.opcheck(operator, (logits, index, 1, with_entropy), OPTIONS)
    torch.library.opcheck(operator, (logits.mT.detach(), index.mT, 0, with_entropy))
    image = torch.randn(2, 7, 3, 5, requires_grad=True)
    classes = torch.randint(7, (2, 4, 3, 5), dtype=torch.int32)
    torch.library.opcheck(operator, (image, classes, 1, with_entropy))


def test_the_operator_refuses_to_overwrite_a_leaf():
    logits, index = small()
    with pytest.raises(RuntimeError, match="inplace_backward must be False where input is a leaf"):
        torch.ops.fused_xent.selected_log_probs(logits, index, 1, False, inplace_backward=True)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_the_decomposition_equals_the_operator(with_entropy):
    operator = torch.ops.fused_xent.selected_log_probs.default
    logits, index = small(torch.bfloat16)
    options = {"ignore_index": 6, "softcap": 4.0}
    arguments = (logits.detach(), index.masked_fill(index < 0, 6), 1, with_entropy)
    found = fused_xent.decompositions()[operator](*arguments, **options)
    expected = operator(*arguments, **options)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]
    for i in (0, 2, 3):  # the state is NaN
        assert_close(found[i], expected[i], rtol=1e-5, atol=1e-6)


def test_without_kernels(monkeypatch):
    monkeypatch.setattr("fused_xent._ops.has_kernels", lambda tensor: False)
    for n_selected in (None, 3):
        for dtype in DTYPES:
            logits = torch.randn(5, 40).to(dtype)
            check(logits, make_index(logits.shape, 40, n_selected), with_entropy=True, **OPTIONS)
    with pytest.raises(IndexError, match=r"^index must be in \[0, 40\) or -100"):
        selective_log_softmax(logits, torch.full((5, 2), 40))


@pytest.mark.parametrize("shape", [(3,), (3, 2)])
def test_no_classes(shape):
    logits, padding = torch.randn(3, 0, requires_grad=True), torch.full(shape, -100)
    found = selective_log_softmax(logits, padding, with_entropy=True)
    assert_close(found.log_probs, torch.zeros(shape))
    assert_close(found.entropy, torch.zeros(3))
    assert torch.autograd.grad(found.log_probs.sum(), logits)[0].shape == (3, 0)


def test_meta_tensors():
    logits = torch.randn(4, 9, device="meta", dtype=torch.bfloat16, requires_grad=True)
    index = torch.zeros(4, 3, dtype=torch.int64, device="meta")
    found = selective_log_softmax(logits, index, with_entropy=True)
    assert (found.log_probs.shape, found.log_probs.dtype) == ((4, 3), torch.float32)
    assert (found.entropy.shape, found.entropy.dtype) == ((4,), torch.float32)
    (found.log_probs.sum() + found.entropy.sum()).backward()
    assert logits.grad.shape == logits.shape


def test_subclasses_take_precedence():
    class Named(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), options=None):
            return function.__name__, len(arguments), sorted(options or {})

    names = ["dim", "inplace_backward", "logit_scale", "num_classes", "process_group", "softcap"]
    names += ["vocab_start", "with_entropy"]
    found = selective_log_softmax(torch.randn(2, 3).as_subclass(Named), torch.tensor([0, 1]))
    assert found == ("selective_log_softmax", 2, names)


# ---- errors ------------------------------------------------------------------------------------

LOGITS, CLASSES = torch.randn(4, 9), torch.zeros(4, dtype=torch.int64)
SEVERAL = CLASSES.unsqueeze(1).expand(4, 3)
REFUSED = {  # arguments, options, the error and the start of its message
    "no tensor": ((LOGITS, 3), {}, TypeError, "index must be a tensor, got int"),
    "list": (([1.0], CLASSES), {}, TypeError, "input must be a tensor, got list"),
    "bytes": (
        (LOGITS, CLASSES.to(torch.uint8)),
        {},
        ValueError,
        "index must be int64 or int32, got torch.uint8",
    ),
    "numbers": ((LOGITS, CLASSES * 1.0), {}, ValueError, "index must be int64 or int32, got"),
    "integers": ((LOGITS.long(), CLASSES), {}, ValueError, "input must be float32, float64, bf"),
    "too many rows": (
        (LOGITS, torch.zeros(5, dtype=torch.int64)),
        {},
        ValueError,
        r"index must have shape \(4,\) \(one class in each row\) or \(4, K\), with K from 1 to "
        r"1024, got \(5,\)",
    ),
    "another row": (
        (LOGITS, SEVERAL.t()),
        {},
        ValueError,
        r"index must have shape \(4,\) .*\(3, 4",
    ),
    "no class": ((LOGITS, SEVERAL[:, :0]), {}, ValueError, r"index must have .* got \(4, 0\)"),
    "too many classes": (
        (LOGITS, CLASSES.unsqueeze(1).expand(4, 1025)),
        {},
        ValueError,
        r"index must have .* got \(4, 1025\)",
    ),
    "meta": ((LOGITS, CLASSES.to("meta")), {}, ValueError, "index must be on input's device"),
    "sparse": ((LOGITS, CLASSES.to_sparse()), {}, ValueError, "index must be a dense tensor"),
    "scalar": ((LOGITS[0, 0], CLASSES), {}, ValueError, "input must have a class dimension"),
    "softcap": ((LOGITS, CLASSES), {"softcap": 0}, ValueError, "softcap must be in"),
    "softcap of K": ((LOGITS, SEVERAL), {"softcap": 0}, ValueError, "softcap must be in"),
    "scale": ((LOGITS, SEVERAL), {"logit_scale": "1"}, TypeError, "logit_scale must be a number"),
    "dim": ((LOGITS, CLASSES), {"dim": 2}, IndexError, r"dim must be in \[-2, 2\), got 2"),
    "dim of K": ((LOGITS, SEVERAL), {"dim": -3}, IndexError, r"dim must be in \[-2, 2\), got -3"),
    "no dim": ((LOGITS, CLASSES), {"dim": None}, TypeError, "dim must be an int, got NoneType"),
    "entropy": ((LOGITS, CLASSES), {"with_entropy": 1}, TypeError, "with_entropy must be a bool"),
    "in place": (
        (LOGITS, SEVERAL),
        {"inplace_backward": None},
        TypeError,
        "inplace_backward must be a bool",
    ),
    "a leaf": (
        (LOGITS.clone().requires_grad_(), SEVERAL),
        {"inplace_backward": True},
        RuntimeError,
        "inplace_backward must be False where input is a leaf",
    ),
}


@pytest.mark.cpu("the tensors are made at import")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    arguments, options, error, message = REFUSED[name]
    with pytest.raises(error, match=f"^{message}"):
        selective_log_softmax(*arguments, **options)


@pytest.mark.cpu("the check would wait for the GPU")
@pytest.mark.parametrize("options", [{}, WITH_ENTROPY, {"inplace_backward": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("wrong", [9, -1, -99])
def test_classes_out_of_range(wrong, dtype, options):
    index = SEVERAL.to(dtype).clone()
    index[2, 1] = wrong
    start = rf"^index must be in \[0, 9\) or -100 \(padding\), got {wrong} at position "
    with pytest.raises(IndexError, match=rf"{start}\(2, 1\)$"):
        selective_log_softmax(LOGITS, index, **options)
    with pytest.raises(IndexError, match=rf"{start}\(2,\)$"):
        selective_log_softmax(LOGITS, index[:, 1], **options)
