"""torch.compile(fullgraph=True): all options and modes, and no more graphs than torch's loss."""

import pytest
import torch
import torch.nn.functional as F
from cases import LABELS, make_logits, make_options, make_target
from modes import MODES
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

import fused_xent

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.compile

OPTIONS = {
    "reduction": "sum",
    "lse_square_scale": 0.1,
    "softcap": 3.0,
    "logit_scale": 0.7,
    "focal_gamma": 1.5,
}
SHAPES = ((8, 50), (5, 50), (9, 70), (3, 20))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def make_inputs(shape=SHAPES[0], labels="index, mostly ignored"):
    logits = make_logits(shape, torch.float32).requires_grad_()
    return logits, make_target(logits, LABELS[labels])


def assert_same(model, compiled, logits, *others):
    """Compare the values, and the gradients of the logits."""
    expected, actual = model(logits, *others), compiled(logits, *others)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (actual, expected)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("labels", ["index, weighted and smoothed", "probabilities, all options"])
def test_compiles_to_one_graph(labels, backend):
    logits, target = make_inputs(labels=labels)
    options = make_options(logits.detach(), LABELS[labels])

    def model(logits, target):
        return 2 * fused_xent.cross_entropy(logits * 3, target, **options).exp()

    assert_same(model, torch.compile(model, backend=backend, fullgraph=True), logits, target)


@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("mode", MODES)
def test_every_option_and_statistic(mode, soft):
    logits, target = make_inputs()
    target = logits.detach().softmax(1) if soft else target
    tokens = torch.rand(8).round(decimals=1)

    def model(logits, target):
        results = fused_xent.cross_entropy_with_statistics(
            logits * 3, target, token_weight=tokens, **OPTIONS, **MODES[mode]
        )
        return results.loss + 0.1 * (results.lse * results.entropy + results.z_loss).sum()

    def model_by_default(logits, target):
        """In default mode: eager fused mode has no gradient of statistics, compiled code does."""
        results = fused_xent.cross_entropy_with_statistics(
            logits * 3, target, token_weight=tokens, **OPTIONS
        )
        return results.loss + 0.1 * (results.lse * results.entropy + results.z_loss).sum()

    compiled = torch.compile(model, backend="inductor", fullgraph=True)
    assert_same(model_by_default, compiled, logits, target)


@pytest.mark.parametrize("function", ["cross_entropy", "cross_entropy_with_statistics"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradient(context, function):
    logits, target = make_inputs()
    function = getattr(fused_xent, function)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    with context():
        results, expected = (f(logits, target, softcap=3.0) for f in (compiled, function))
    torch.testing.assert_close(results, expected)


@pytest.mark.parametrize("mode", ["inplace", "fused"])
def test_other_uses_of_overwritten_logits(mode):
    """The compiler runs another use of the logits first, or gives it a copy."""
    logits, target = make_inputs()

    def model(logits, target):
        computed = logits * 3
        loss = fused_xent.cross_entropy(computed, target, reduction="sum", **MODES[mode])
        return loss + computed.square().sum()

    def right(logits, target):
        return F.cross_entropy(logits * 3, target, reduction="sum") + (logits * 3).square().sum()

    assert_same(right, torch.compile(model, backend="inductor", fullgraph=True), logits, target)


RETURNED = {
    "logits": lambda computed: (computed, computed),
    "logits of sequences": lambda computed: (computed.flatten(0, -2), computed.view(2, 4, -1)),
    "a function of the logits": lambda computed: (computed, computed.square()),
}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("mode", ["inplace", "fused"])
@pytest.mark.parametrize("returned", RETURNED)
def test_returned_logits_keep_their_values(returned, mode, backend):
    """The compiler copies returned logits before the gradient overwrites them."""
    leaf, target = make_inputs()

    def model(leaf, options):
        logits, output = RETURNED[returned](leaf * 3)
        return fused_xent.cross_entropy(logits, target, **options), output

    loss, output = torch.compile(model, backend=backend, fullgraph=True)(leaf, MODES[mode])
    expected_loss, expected = model(leaf, {})
    (gradient,) = torch.autograd.grad(loss + output.sin().sum(), leaf)
    torch.testing.assert_close(output, expected)
    expected = torch.autograd.grad(expected_loss + expected.sin().sum(), leaf)[0]
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("mode", MODES)
def test_logits_of_the_graph_are_overwritten(mode):
    leaf, target = make_inputs()

    def model(leaf):
        return fused_xent.cross_entropy(leaf * 3, target, **MODES[mode])

    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(leaf)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        loss.backward()
    operators = {event.key for event in seen.key_averages()}
    assert ("fused_xent::backward_" in operators) == (mode != "default")
    assert ("fused_xent::backward" in operators) == (mode == "default")


USES_OF_LOGITS = {
    "by the operation that made them": lambda leaf, loss: loss(torch.sigmoid(leaf)),
    "by another function": lambda leaf, loss: (lambda logits: logits.square().sum() + loss(logits))(
        leaf * 1
    ),
    "by another loss": lambda leaf, loss: (lambda logits: loss(logits) + 2 * loss(logits))(
        leaf * 1
    ),
}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("mode", ["inplace", "fused"])
@pytest.mark.parametrize("use", USES_OF_LOGITS)
def test_inputs_of_the_graph_are_not_overwritten(use, mode, backend):
    """So they may have other uses, outside of the graph too."""
    leaf, target = make_inputs()

    def loss(logits):
        return fused_xent.cross_entropy(logits, target, **MODES[mode])

    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    (gradient,) = torch.autograd.grad(USES_OF_LOGITS[use](leaf, compiled), leaf)
    expected = USES_OF_LOGITS[use](leaf, lambda logits: F.cross_entropy(logits, target))
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0])


OTHER_TERMS = {
    "square": lambda logits: logits.square().mean(),
    "logsumexp": lambda logits: logits.logsumexp(1).square().mean(),
    "tanh": lambda logits: logits.tanh().mean(),
}


@pytest.mark.parametrize("mode", ["inplace", "fused"])
@pytest.mark.parametrize("term", OTHER_TERMS)
def test_inputs_of_the_graph_have_other_uses_in_it(term, mode):
    """Inductor would order the other reads after the write."""
    leaf, target = make_inputs()

    def model(logits):
        loss = fused_xent.cross_entropy(logits, target, **MODES[mode])
        return loss + OTHER_TERMS[term](logits)

    (gradient,) = torch.autograd.grad(torch.compile(model, fullgraph=True)(leaf * 3), leaf)
    logits = leaf * 3
    expected = F.cross_entropy(logits, target) + OTHER_TERMS[term](logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0])


PARTS = {
    "chunk": lambda logits: logits.chunk(2),
    "slices": lambda logits: (logits[:2], logits[2:]),
    "steps": lambda logits: (logits[::2], logits[1::2]),
}


@pytest.mark.parametrize("mode", ["inplace", "fused"])
@pytest.mark.parametrize("parts", PARTS)
def test_parts_of_logits_of_dynamic_shapes(parts, mode):
    """Inductor would write a part with a symbolic offset elsewhere."""

    weight = torch.randn(50, 16)

    def model(leaf, target, **options):
        logits = leaf @ weight.t()
        pairs = zip(PARTS[parts](logits), PARTS[parts](target), strict=True)
        losses = [fused_xent.cross_entropy(*pair, reduction="sum", **options) for pair in pairs]
        return losses[0] + losses[1]

    compiled = torch.compile(model, dynamic=True)
    for n_rows in (4, 6, 8):
        leaf, target = make_inputs((n_rows, 16))
        (gradient,) = torch.autograd.grad(compiled(leaf, target, **MODES[mode]), leaf)
        (expected,) = torch.autograd.grad(model(leaf, target), leaf)
        torch.testing.assert_close(gradient, expected)


VIEWS = {
    "view": lambda logits: logits.view(-1, logits.shape[-1]),
    "slice": lambda logits: logits[0, 1:],
    "transposed": lambda logits: logits[0].t().contiguous().t(),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("mode", ["inplace", "fused"])
@pytest.mark.parametrize("view", VIEWS)
def test_inputs_of_the_graph_that_are_views(view, mode, dynamic):
    leaf = torch.randn(2, 4, 50, requires_grad=True)
    target = torch.arange(len(VIEWS[view](leaf)))
    compiled = torch.compile(fused_xent.CrossEntropyLoss(**MODES[mode]), dynamic=dynamic)
    (gradient,) = torch.autograd.grad(compiled(VIEWS[view](leaf * 3), target), leaf)
    expected = F.cross_entropy(VIEWS[view](leaf * 3), target)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0])


def test_gradients_of_weights():
    """Torch operations compute them, in compiled code too."""
    logits, target = make_inputs()
    weight, tokens = torch.rand(50, requires_grad=True), torch.rand(8, requires_grad=True)

    def model(logits, weight, tokens):
        return fused_xent.cross_entropy(logits * 3, target, weight, token_weight=tokens)

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    inputs = (logits, weight, tokens)
    gradients = [torch.autograd.grad(f(*inputs), inputs) for f in (compiled, model)]
    torch.testing.assert_close(*gradients)


def graphs(loss_function, dynamic, **options):
    """Compare compiled and eager results for all shapes; return the number of graphs."""
    torch.compiler.reset()
    counters.clear()

    def model(logits, target):
        return loss_function(logits * 3, target, reduction="sum", **options)

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for shape in SHAPES:
        assert_same(model, compiled, *make_inputs(shape))
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("mode", ["default", "inplace"])
def test_no_more_graphs_than_torch(mode, dynamic):
    theirs = graphs(F.cross_entropy, dynamic)
    assert graphs(fused_xent.cross_entropy, dynamic, **MODES[mode]) <= theirs
    assert theirs == (1 if dynamic else 3)  # static, dynamic rows, all dynamic


def test_graph_of_dynamic_shapes_with_all_options():
    options = {"softcap": 3.0, "lse_square_scale": 0.1, "focal_gamma": 2.0, "dim": -1}
    assert graphs(fused_xent.cross_entropy, True, **options) == 1


def test_ignored_rows_and_no_reduction():
    logits, target = make_inputs()
    compiled = torch.compile(fused_xent.cross_entropy, backend="aot_eager", fullgraph=True)
    for _ in range(3):  # the allocator reuses memory that held NaN
        torch.full((8,), float("nan"))
        loss = compiled(logits, target, reduction="none")
        assert torch.equal(loss, fused_xent.cross_entropy(logits, target, reduction="none"))
