"""cross_entropy with torch.func, batched and higher derivatives, hooks, autocast, threads."""

import threading

import pytest
import torch
import torch.nn.functional as F
from modes import MODES, make_problem
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from fused_xent import cross_entropy, cross_entropy_with_statistics

# Warnings of torch itself: of its forward-mode formulas and of linearize.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr:UserWarning"),
]

DOUBLE = torch.float64
TARGET = torch.tensor([1, -100, 5])
TOKENS = torch.tensor([1.0, 2.0, -0.5], dtype=DOUBLE)
OPTIONS = {
    "token_weight": TOKENS,
    "lse_square_scale": 0.1,
    "softcap": 3.0,
    "logit_scale": 0.7,
    "label_smoothing": 0.1,
}


def small(**options):
    return torch.randn(3, 6, dtype=DOUBLE, **options)


def outputs(logits, target, **options):
    results = cross_entropy_with_statistics(logits, target, **options)
    return results.loss, results.lse, results.entropy, results.z_loss


def assert_close(one, other):
    torch.testing.assert_close(one, other)


# ---- derivatives -------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
def test_all_options(soft, reduction, gamma, check):
    options = OPTIONS | {"focal_gamma": gamma, "reduction": reduction}
    logits = small(requires_grad=True)
    if soft:
        target = torch.rand(3, 6, dtype=DOUBLE, requires_grad=True)
        assert check(lambda x, t: outputs(x, t, **options), (logits, target))
    else:
        assert check(lambda x: outputs(x, TARGET, **options), (logits,))


def test_gradients_of_weights_and_normalizer():
    logits, tokens = small(requires_grad=True), TOKENS.clone().requires_grad_()
    weight = torch.rand(6, dtype=DOUBLE, requires_grad=True)
    normalizer = torch.tensor(3.0, dtype=DOUBLE, requires_grad=True)

    def loss(x, w, t, n):
        return cross_entropy(x, TARGET, w, token_weight=t, normalizer=n, lse_square_scale=0.1)

    assert gradcheck(loss, (logits, weight, tokens, normalizer))


def ours(x):
    return cross_entropy(x, TARGET)


def theirs(x):
    return F.cross_entropy(x, TARGET)


def our_rows(x):
    return cross_entropy(x, TARGET, reduction="none")


def their_rows(x):
    return F.cross_entropy(x, TARGET, reduction="none")


func = torch.func
TRANSFORMS = {
    "grad": lambda f, rows: func.grad(f),
    "grad_and_value": lambda f, rows: func.grad_and_value(f),
    "grad of grad": lambda f, rows: func.grad(lambda x: func.grad(f)(x).pow(2).sum()),
    "grad in the grad of another": lambda f, rows: func.grad(
        lambda x: func.grad(lambda y: f(x * 2) * y.sum() + f(x + y))(x.detach() + 1).pow(2).sum()
    ),
    "hessian": lambda f, rows: func.hessian(f),
    "jacrev": lambda f, rows: func.jacrev(rows),
    "jacfwd": lambda f, rows: func.jacfwd(rows),
    "jacrev of jacrev": lambda f, rows: func.jacrev(func.jacrev(rows)),
    "jvp": lambda f, rows: lambda x: func.jvp(f, (x,), (x.cos(),)),
    "linearize": lambda f, rows: lambda x: func.linearize(f, x)[1](x),
    "vmap": lambda f, rows: lambda x: func.vmap(rows)(torch.stack([x, 2 * x])),
    "vmap of grad": lambda f, rows: lambda x: func.vmap(func.grad(f))(torch.stack([x, 2 * x])),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func(name):
    x = small()
    transform = TRANSFORMS[name]
    assert_close(transform(ours, our_rows)(x), transform(theirs, their_rows)(x))


def test_per_sample_gradients():
    x, target = small(), torch.tensor([1, 2, 5])
    both = (func.vmap(func.grad(loss))(x, target) for loss in (cross_entropy, F.cross_entropy))
    assert_close(*both)


def test_dual_numbers():
    x = small()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x.cos())
        assert_close(*(forward_ad.unpack_dual(f(dual)).tangent for f in (ours, theirs)))


def test_every_mode_of_gradcheck():
    x = small(requires_grad=True)
    batched = {"check_batched_grad": True}
    assert gradcheck(ours, x, check_forward_ad=True, check_batched_forward_grad=True, **batched)
    assert gradgradcheck(ours, x, check_fwd_over_rev=True, check_rev_over_rev=True, **batched)


def test_third_derivative():
    def third(loss, x):
        for _ in range(2):
            loss = torch.autograd.grad(loss, x, create_graph=True)[0].pow(2).sum()
        return torch.autograd.grad(loss, x)[0]

    x = small(requires_grad=True)
    assert_close(third(ours(x), x), third(theirs(x), x))


def test_create_graph_gives_the_same_gradient():
    """It is bitwise the same as without create_graph."""
    x = torch.randn(3, 600, requires_grad=True)
    target = torch.tensor([1, -100, 5])
    (plain,) = torch.autograd.grad(cross_entropy(x, target), x)
    (graph,) = torch.autograd.grad(cross_entropy(x, target), x, create_graph=True)
    assert torch.equal(plain, graph)
    assert graph.requires_grad


OUTPUTS = {
    "loss": lambda x, reduction: F.cross_entropy(x, TARGET, reduction=reduction),
    "lse": lambda x, reduction: x.logsumexp(1) * (TARGET != -100),
    "entropy": lambda x, reduction: (
        torch.distributions.Categorical(logits=x).entropy() * (TARGET != -100)
    ),
}


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_vmap_over_upstream_gradients(name, reduction, dim):
    """vmap over the upstream gradient, in any of its dimensions, gives each sample its own."""
    x = small()

    def output(x):
        return getattr(cross_entropy_with_statistics(x, TARGET, reduction=reduction), name)

    one, pull = func.vjp(output, x)
    upstream = torch.randn(one.shape, dtype=DOUBLE)
    upstream = torch.stack([upstream, 2 * upstream, upstream.flip(0) if one.dim() else -upstream])
    if dim == 1 and one.dim():
        upstream = upstream.movedim(0, 1).contiguous()
    in_dim = dim if one.dim() else 0
    _, exact = func.vjp(lambda x: OUTPUTS[name](x, reduction), x)
    both = (func.vmap(f, in_dims=in_dim)(upstream)[0] for f in (pull, exact))
    assert_close(*both)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_batched_gradients_with_create_graph(reduction, dtype):
    """is_grads_batched with create_graph: each gradient can be differentiated again."""
    x = torch.randn(3, 6, dtype=dtype, requires_grad=True)
    results = []
    for function in (cross_entropy, F.cross_entropy):
        loss = function(x, TARGET, reduction=reduction)
        upstream = torch.arange(1.0, 13.0, dtype=dtype)[: 4 * loss.numel()].view(4, *loss.shape)
        (gradient,) = torch.autograd.grad(
            loss, x, upstream, create_graph=True, is_grads_batched=True
        )
        (second,) = torch.autograd.grad(gradient.pow(2).sum(), x)
        results.append((gradient, second))
    assert_close(*results)


# ---- saved tensors, repeated backwards, contexts -----------------------------------------------


@pytest.mark.parametrize("shape", ["expanded", "every second"])
def test_upstream_gradients_of_any_strides(shape):
    logits, upstream = small(requires_grad=True), small()[:, :2].reshape(-1)
    upstream = upstream[:1].expand(3) if shape == "expanded" else upstream[::2]
    for i in range(3):
        values = outputs(logits, TARGET, reduction="none")
        (gradient,) = torch.autograd.grad(values[i], logits, upstream)
        exact = (their_rows(logits), logits.logsumexp(1), None)[i]
        if i == 2:
            log_p = logits.log_softmax(1)
            exact = -(log_p.exp() * log_p).sum(1)
        (expected,) = torch.autograd.grad(exact * (TARGET != -100), logits, upstream)
        assert_close(gradient, expected)


def test_a_second_backward_with_another_upstream_gradient():
    logits = small(requires_grad=True)
    loss = ours(logits * 1)
    (first,) = torch.autograd.grad(loss, logits, torch.tensor(2.0, dtype=DOUBLE), retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits, torch.tensor(-3.0, dtype=DOUBLE))
    assert_close(first / 2, second / -3)


@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
def test_only_inputs_are_saved_at_logits_size(soft):
    logits = torch.randn(4, 1000, requires_grad=True)
    target = torch.randn(4, 1000).softmax(1) if soft else torch.arange(4)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        loss = cross_entropy(logits, target, softcap=3.0, focal_gamma=1.0)
    large = {x.data_ptr() for x in packed if x.numel() >= 4000}
    assert large == {logits.data_ptr(), *([target.data_ptr()] if soft else [])}
    assert sum(x.numel() for x in packed if x.numel() < 4000) < 40
    loss.backward()


@pytest.mark.parametrize("mode", MODES)
def test_save_on_cpu(mode):
    leaf, target = make_problem()
    expected = torch.autograd.grad(cross_entropy(leaf * 1, target), leaf)[0]
    with torch.autograd.graph.save_on_cpu():
        loss = cross_entropy(leaf * 1, target, **MODES[mode])
    assert_close(torch.autograd.grad(loss, leaf)[0], expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_activation_checkpointing(mode, reentrant):
    leaf, target = make_problem()
    expected = torch.autograd.grad(cross_entropy(leaf * 2, target), leaf)[0]

    def model(x):
        return cross_entropy(x * 2, target, **MODES[mode])

    checkpoint(model, leaf, use_reentrant=reentrant).backward()
    assert_close(leaf.grad, expected)


@pytest.mark.parametrize("mode", MODES)
def test_anomaly_mode_and_deterministic_algorithms(mode):
    leaf, target = make_problem()
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
            cross_entropy(leaf * 1, target, **MODES[mode]).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(leaf.grad, torch.autograd.grad(F.cross_entropy(leaf, target), leaf)[0])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_saved_or_overwritten(context):
    leaf, target = make_problem()
    before = leaf.detach().clone()
    with context():
        for mode in MODES.values():
            results = cross_entropy_with_statistics(leaf, target, **mode)
            assert results.loss.grad_fn is None
    assert torch.equal(leaf, before)


@pytest.mark.cpu("uses autocast of the CPU")
def test_autocast_with_statistics():
    logits, target = torch.randn(4, 50).bfloat16(), torch.arange(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = cross_entropy_with_statistics(logits, target, softcap=5.0)
    assert {results.loss.dtype, results.lse.dtype, results.entropy.dtype} == {torch.float32}
    assert_close(results.loss, F.cross_entropy(5 * torch.tanh(logits.float() / 5), target))


@pytest.mark.parametrize("mode", ["default", "inplace"])
def test_loss_scale(mode, device):
    """Gradients of about 1e-8, which underflow in float16 without a loss scale."""
    scaler = torch.amp.GradScaler(device, init_scale=2.0**15)
    leaf, target = make_problem(n_classes=4000)
    parameter = torch.nn.Parameter(leaf.detach())
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    loss = cross_entropy(parameter.half(), target, loss_dtype=torch.float32, **MODES[mode])
    scaler.scale(loss / 100).backward()
    scaler.unscale_(optimizer)
    rounded = leaf.detach().half().double().requires_grad_()
    exact = torch.autograd.grad(F.cross_entropy(rounded, target) / 100, rounded)[0]
    torch.testing.assert_close(parameter.grad.double(), exact, rtol=2e-3, atol=1e-9)


def test_calls_from_several_threads():
    """Concurrent calls, as in DataParallel, are bitwise equal to sequential ones."""
    inputs = [torch.randn(40, 700, requires_grad=True) for _ in range(4)]
    target = torch.randint(700, (40,))
    expected = [torch.autograd.grad(cross_entropy(x, target), x)[0] for x in inputs]

    def work(x):
        for _ in range(3):
            x.grad = None
            cross_entropy(x, target).backward()

    threads = [threading.Thread(target=work, args=(x,)) for x in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(x.grad, right) for x, right in zip(inputs, expected, strict=True))
