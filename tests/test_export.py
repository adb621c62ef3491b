"""torch.export, make_fx, jit.trace, decompositions and ONNX: right values and gradients."""

import copy
import warnings

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import fused_xent

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

N, H, C = 6, 8, 11
TARGET = torch.tensor([1, 4, -100, 0, 10, 3])
OPTIONS = {
    "plain": {},
    "all options": {
        "label_smoothing": 0.1,
        "lse_square_scale": 1e-2,
        "softcap": 3.0,
        "logit_scale": 0.7,
        "focal_gamma": 1.5,
    },
    "none": {"reduction": "none", "softcap": 3.0},
    "float64 loss": {"loss_dtype": torch.float64},
}


class Logits(torch.nn.Module):
    """A linear layer, then the loss of its logits."""

    def __init__(self, function, **options):
        super().__init__()
        self.layer = torch.nn.Linear(H, C)
        self.function, self.options = function, options

    def forward(self, hidden, target):
        return self.function(self.layer(hidden), target, **self.options).sum()


class Linear(Logits):
    """The fused loss of a linear layer."""

    def forward(self, hidden, target):
        weight, bias = self.layer.weight, self.layer.bias
        loss = self.function(hidden, weight, target, linear_bias=bias, **self.options)
        return loss.sum()


class WithStatistics(Logits):
    def forward(self, hidden, target):
        results = self.function(self.layer(hidden), target, **self.options)
        return results.loss.sum() + results.lse.sum() + (results.entropy * 0.1).sum()


MODULES = {
    "loss": (Logits, fused_xent.cross_entropy, fused_xent.reference.cross_entropy),
    "linear loss": (Linear, fused_xent.linear_cross_entropy, None),
    "statistics": (
        WithStatistics,
        fused_xent.cross_entropy_with_statistics,
        fused_xent.reference.cross_entropy_with_statistics,
    ),
}


def make(kind, **options):
    """Return a module, and one with the same parameters that uses fused_xent.reference."""
    module_class, function, by_reference = MODULES[kind]
    module = module_class(function, **options)
    plain = Logits if by_reference is None else module_class
    expected = plain(by_reference or fused_xent.reference.cross_entropy, **without_dtype(options))
    expected.load_state_dict(module.state_dict())
    return module, expected


def without_dtype(options):
    return {name: value for name, value in options.items() if name != "loss_dtype"}


def gradients(function, parameters, hidden):
    hidden = hidden.detach().clone().requires_grad_()
    loss = function(hidden, TARGET)
    return loss, torch.autograd.grad(loss * 2, [hidden, *parameters])


def assert_trains(traced, parameters, expected, hidden):
    found, exact = gradients(traced, parameters, hidden), None
    exact = gradients(expected, list(expected.parameters()), hidden)
    torch.testing.assert_close(found[0].double(), exact[0].double())
    torch.testing.assert_close(found[1], exact[1])


def export(module, *, strict, context=torch.enable_grad):
    arguments = (torch.randn(N, H), TARGET)
    with context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of torch
        return torch.export.export(module, arguments, strict=strict)


by_kind = pytest.mark.parametrize("kind", MODULES)
by_options = pytest.mark.parametrize("options", OPTIONS)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@by_options
@by_kind
def test_exported_programs(kind, options, strict, context):
    module, expected = make(kind, **OPTIONS[options])
    program = export(module, strict=strict, context=context)
    trained = program.module()
    assert_trains(trained, list(trained.parameters()), expected, torch.randn(N, H))


@by_options
@by_kind
def test_decomposed_programs(kind, options):
    module, expected = make(kind, **OPTIONS[options])
    program = export(module, strict=False)
    assert "fused_xent" in str(program.graph)
    table = torch.export.default_decompositions() | fused_xent.decompositions()
    program = program.run_decompositions(table)
    assert "fused_xent" not in str(program.graph)
    trained = program.module()
    assert_trains(trained, list(trained.parameters()), expected, torch.randn(N, H))


KINDS = ["index", "index, weighted", "probabilities", "probabilities, weighted"]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@by_options
@pytest.mark.parametrize("labels", KINDS)
def test_decompositions_equal_the_operators(labels, options, reduction):
    """Values and dtypes agree, with all upstream gradients and with each alone."""
    operators, table = torch.ops.fused_xent, fused_xent.decompositions()
    options = without_dtype(OPTIONS[options]) | {"ignore_index": 4}
    options.pop("reduction", None)
    logits = torch.randn(N, C, 2, dtype=torch.float64)
    target = torch.randn(N, C, 2).softmax(1).double() if "prob" in labels else TARGET[:, None]
    target = target if "prob" in labels else target.clamp(min=0).repeat(1, 2)
    weights = (None, None)
    if "weighted" in labels:
        tokens = torch.rand(N, 2, dtype=torch.float64)
        tokens[1] = 0
        weights = (torch.rand(C, dtype=torch.float64), tokens)
    code = {"none": 0, "mean": 1, "sum": 2}[reduction]
    forward = operators.forward_with_statistics.default
    arguments = (logits, target, *weights, None, 1, code)
    found, (loss, total, state, *statistics) = (
        function(*arguments, **options) for function in (table[forward], forward)
    )
    torch.testing.assert_close(found[:2] + found[3:], (loss, total, *statistics))
    assert (found[2].shape, found[2].dtype) == (state.shape, state.dtype)
    rows = torch.randn(N, 2, dtype=torch.float64)
    upstream = (torch.randn_like(loss), rows, rows.flip(0))
    backward = operators.backward.default
    saved = (*arguments[:4], total, 1, code, state, statistics[1])
    for given in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        grads = [grad if wanted else None for grad, wanted in zip(upstream, given, strict=True)]
        results = [function(*saved, *grads, **options) for function in (table[backward], backward)]
        torch.testing.assert_close(*results)


def test_decompositions_cover_all_but_overwriting_operators():
    """A graph without gradients has the operator loss; its decomposition is used."""
    logits = torch.randn(N, C)
    table = fused_xent.decompositions()
    graph = make_fx(
        lambda x: fused_xent.cross_entropy(x, TARGET, softcap=3.0), decomposition_table=table
    )(logits)
    assert "fused_xent" not in str(graph.graph)
    expected = fused_xent.cross_entropy(logits, TARGET, softcap=3.0)
    torch.testing.assert_close(graph(logits), expected)
    operators = torch.ops.fused_xent
    names = ("loss", "forward", "forward_with_statistics", "backward")
    names += ("linear_forward", "linear_backward")
    names += ("selected_log_probs", "linear_selected_log_probs", "add_up_shards")
    assert set(table) == {getattr(operators, name).default for name in names}


def results_of(logits, target, weight=None, tokens=None, normalizer=None, **options):
    """Return results and the gradient of the decompositions, then of the operators."""
    operators, table = torch.ops.fused_xent, fused_xent.decompositions()
    forward, backward = operators.forward_with_statistics.default, operators.backward.default
    results = []
    for one, other in ((table[forward], table[backward]), (forward, backward)):
        loss, total, state, *statistics = one(
            logits, target, weight, tokens, normalizer, 1, 1, **options
        )
        kernels = forward(logits, target, weight, tokens, normalizer, 1, 1, **options)
        saved = (logits, target, weight, tokens, total, 1, 1, kernels[2], statistics[1])
        upstream = (torch.ones_like(loss), torch.ones(N).to(state), -torch.ones(N).to(state))
        gradient = other(*saved, *upstream, **options)
        results.append((loss, total, torch.empty_like(state).fill_(0), *statistics, gradient))
    return results


@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
def test_decompositions_skip_dropped_rows(soft):
    """Logits and probabilities of such rows may be NaN or infinite."""
    logits, tokens = torch.randn(N, C).double(), torch.rand(N).double()
    logits[2], logits[4], tokens[4] = torch.nan, torch.inf, 0
    target, options = TARGET, {}
    if soft:
        target = torch.rand(N, C).double()
        target[4], tokens[2] = torch.nan, 0
    torch.testing.assert_close(*results_of(logits, target, None, tokens, **options))


@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
def test_decompositions_at_logits_of_minus_infinity(soft):
    logits = torch.randn(N, C).double()
    logits[:, 2] = -torch.inf
    target = torch.rand(N, C).double().index_fill(1, torch.tensor([2]), 0) if soft else TARGET
    torch.testing.assert_close(*results_of(logits, target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_decompositions_have_the_dtypes_of_the_operators(dtype):
    decomposed, exact = results_of(torch.randn(N, C).to(dtype), TARGET)
    assert [x.dtype for x in decomposed] == [x.dtype for x in exact]
    torch.testing.assert_close(decomposed, exact)


def test_decompositions_of_a_mean_by_0():
    zero = torch.tensor(0.0, dtype=torch.float64)
    decomposed, exact = results_of(
        torch.randn(N, C).double(), TARGET, None, None, zero, lse_square_scale=0.1
    )
    torch.testing.assert_close(decomposed, exact, equal_nan=True)
    assert exact[-1][0].isnan().all()


def test_decompositions_with_narrow_targets():
    """ignore_index does not fit in uint8, where it would wrap around to a class."""
    target = torch.tensor([1, 4, 4, 0, 10, 3], dtype=torch.uint8)
    logits = torch.randn(N, C).double()
    torch.testing.assert_close(*results_of(logits, target, ignore_index=256 + 4))


def test_decompositions_with_an_infinite_weight():
    """The weight is of a class that is no row's target."""
    logits, weight = torch.randn(N, C).double(), torch.rand(C).double()
    weight[2] = torch.inf
    torch.testing.assert_close(*results_of(logits, TARGET, weight))


def test_decomposed_focal_loss_of_certain_rows():
    logits = torch.randn(N, C).double()
    logits[0] = torch.tensor(0.0).expand(C)
    logits[0, TARGET[0]] = 900
    for gamma in (0.5, 2.0):
        torch.testing.assert_close(*results_of(logits, TARGET, focal_gamma=gamma))


def gradient_of(logits, target, **options):
    """Return the gradient of a sum of losses by the decompositions, then by the operators."""
    operators, table = torch.ops.fused_xent, fused_xent.decompositions()
    _, total, state = operators.forward.default(logits, target, None, None, None, 1, 2, **options)
    saved = (logits, target, None, None, total, 1, 2, state, None, torch.ones(()), None, None)
    backward = operators.backward.default
    return [function(*saved, **options) for function in (table[backward], backward)]


@pytest.mark.parametrize("focal_gamma", [0.0, 2.0])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
def test_decompositions_of_confident_rows(soft, focal_gamma):
    """The gradients have their digits where the probability of the target rounds to 1."""
    logits = torch.randn(N, C)
    logits[range(N), TARGET.clamp(min=0)] = 30
    target = torch.eye(C)[TARGET.clamp(min=0)] if soft else TARGET.clamp(min=0)
    options = {"focal_gamma": focal_gamma}
    decomposed, exact = gradient_of(logits, target, **options)
    if soft:  # the kernels keep the digits for class indices only
        exact = gradient_of(logits.double(), TARGET.clamp(min=0), **options)[1].float()
    assert (exact != 0).all()
    torch.testing.assert_close(decomposed, exact, rtol=1e-5, atol=0)


def test_decomposed_focal_loss_of_a_masked_target():
    logits = torch.randn(N, C).double()
    logits[0, TARGET[0]] = -torch.inf
    decomposed, exact = gradient_of(logits, TARGET, focal_gamma=2.0)
    assert exact[0, TARGET[0]] == -1
    torch.testing.assert_close(decomposed, exact)


def test_decomposed_gradient_of_targets_out_of_range_is_nan():
    logits, target = torch.randn(N, C), torch.tensor([1, C, 4, -1, 0, 2])
    backward = torch.ops.fused_xent.backward.default
    saved = (logits, target, None, None, None, 1, 2, torch.zeros(2, N), None)
    gradient = fused_xent.decompositions()[backward](*saved, torch.ones(()), None, None)
    assert gradient.isnan().all(1).tolist() == [False, True, False, True, False, False]


@pytest.mark.parametrize("needs", [(1, 1, 1), (0, 1, 0), (1, 0, 1)], ids=str)
@pytest.mark.parametrize("classes", [(C,), (C, 2)], ids=str)
@pytest.mark.parametrize("logits_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_linear_decompositions_equal_the_operators(dtype, logits_dtype, classes, needs):
    """Gradients from forward agree, and those of backward for each upstream gradient alone."""
    if dtype == torch.float64 and logits_dtype is not None:
        pytest.skip("logits_dtype must not be narrower than the layer")
    operators, table = torch.ops.fused_xent, fused_xent.decompositions()
    logits_dtype = logits_dtype or dtype
    layer = [torch.randn(N, H), torch.randn(*classes, H) / 3, torch.randn(classes)]
    target = TARGET if len(classes) == 1 else TARGET[:, None].repeat(1, 2)
    tensors = (*(x.to(dtype) for x in layer), target, None, None, None, None, 1)
    arguments = (*tensors, logits_dtype, torch.float32, True, None, list(needs))
    forward, backward = operators.linear_forward.default, operators.linear_backward.default
    options = OPTIONS["all options"]
    decomposed, exact = (f(*arguments, **options) for f in (table[forward], forward))
    assert [(x.shape, x.dtype) for x in decomposed] == [(x.shape, x.dtype) for x in exact]
    limits = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(tuple(decomposed), tuple(exact), **limits)
    if logits_dtype == torch.float32:  # logits are not rounded
        torch.testing.assert_close(tuple(decomposed[:4]), tuple(exact[:4]))
    of_rows = torch.linspace(1, 2, target.numel()).view(target.shape).to(exact[1])
    upstream = (torch.tensor(0.5).to(exact[1]), of_rows, of_rows.flip(0))
    for i in range(3):
        grads = [grad if i == j else None for j, grad in enumerate(upstream)]
        results = [tuple(f(*grads, *arguments, **options)) for f in (table[backward], backward)]
        assert [x.dtype for x in results[0]] == [x.dtype for x in results[1]]
        torch.testing.assert_close(*results, **limits)


@by_options
@by_kind
def test_make_fx_of_the_forward(kind, options):
    """make_fx traces the forward only."""
    module, expected = make(kind, **OPTIONS[options])
    hidden = torch.randn(N, H)
    parameters = dict(module.named_parameters())

    def function(parameters, hidden):
        return torch.func.functional_call(module, parameters, (hidden, TARGET))

    with torch.no_grad():
        graph = make_fx(function)(copy.deepcopy(parameters), hidden)
    leaves = {name: x.detach().requires_grad_() for name, x in parameters.items()}
    assert_trains(lambda x, _: graph(leaves, x), list(leaves.values()), expected, hidden)


def test_drop_ignored_does_not_bake_rows_into_a_trace():
    """A trace would drop the ignored rows of its example, whatever the target."""
    weight, hidden = torch.randn(C, H), torch.randn(N, H)

    def loss(hidden, target):
        return fused_xent.linear_cross_entropy(hidden, weight, target, drop_ignored=True)

    graph, other = make_fx(loss)(hidden, TARGET), torch.tensor([-100, -100, 4, 2, 7, -100])
    torch.testing.assert_close(graph(hidden, other), loss(hidden, other))


@by_options
@by_kind
def test_make_fx_of_forward_and_backward(kind, options):
    module, expected = make(kind, **OPTIONS[options])
    parameters = list(module.parameters())

    def step(hidden):
        loss = module(hidden, TARGET)
        return torch.autograd.grad(loss, [hidden, *parameters])

    hidden = torch.randn(N, H, requires_grad=True)
    graph = make_fx(step)(hidden)
    other = torch.randn(N, H, requires_grad=True)
    exact = torch.autograd.grad(expected(other, TARGET), [other, *expected.parameters()])
    torch.testing.assert_close(tuple(graph(other)), exact)


@pytest.mark.parametrize("kind", ["loss", "linear loss"])
@by_options
def test_jit_trace(kind, options):
    module, expected = make(kind, **OPTIONS[options])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of torch about the trace
        traced = torch.jit.trace(module, (torch.randn(N, H), TARGET), check_trace=False)
    assert_trains(traced, list(traced.parameters()), expected, torch.randn(N, H))


def test_gradients_of_class_weights_in_an_exported_program():
    """The kernels do not compute this gradient; torch operations do, in the program too."""

    class Weighted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(C))

        def forward(self, hidden, target):
            return fused_xent.cross_entropy(hidden, target, self.weight)

    logits = torch.randn(N, C)
    program = torch.export.export(Weighted(), (logits, TARGET)).module()
    loss = program(logits, TARGET)
    (found,) = torch.autograd.grad(loss, [program.weight])
    exact = program.weight.detach().clone().requires_grad_()
    reference = fused_xent.reference.cross_entropy(logits, TARGET, exact)
    (expected,) = torch.autograd.grad(reference, [exact])
    torch.testing.assert_close(found, expected)


@by_kind
def test_onnx(kind, tmp_path):
    onnx = pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    assert onnx
    module, expected = make(kind)
    table = torch.export.default_decompositions() | fused_xent.decompositions()
    program = export(module.eval(), strict=False).run_decompositions(table)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(program, dynamo=True)
    exported.save(tmp_path / "model.onnx")
    operators = {node.domain for node in exported.model.graph}
    assert "fused_xent" not in operators
    hidden = torch.randn(N, H)
    found = exported.call_reference({"hidden": hidden, "target": TARGET})
    torch.testing.assert_close(torch.as_tensor(found[0]), expected(hidden, TARGET).detach())


@pytest.mark.parametrize("mode", ["inplace_backward", "grad_in_forward"])
@pytest.mark.parametrize("view", [(4, 9), (2, 2, 9)], ids=["leaf", "view of a leaf"])
@pytest.mark.parametrize("export", [False, True], ids=["jit.trace", "torch.export"])
def test_traced_programs_do_not_overwrite_leaves(export, view, mode):
    """The trace saw logits without a gradient, for which any mode is valid."""

    class Loss(torch.nn.Module):
        def forward(self, logits, target):
            logits = logits if logits.dim() == 2 else logits.view(-1, 9)
            return fused_xent.cross_entropy(logits, target, **{mode: True})

    logits, target = torch.randn(view), torch.arange(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its own tracer
        if export:
            program = torch.export.export(Loss(), (logits, target)).module()
        else:
            program = torch.jit.trace(Loss(), (logits, target))
    leaf, before = logits.clone().requires_grad_(), logits.clone()
    with pytest.raises(RuntimeError, match="inplace_backward must be False where input is a leaf"):
        program(leaf, target).backward()
    assert torch.equal(leaf, before)
    loss = fused_xent.cross_entropy(leaf.view(-1, 9), target)
    assert torch.equal(program(logits, target), loss)
    if export:  # jit.trace may have removed the product
        program(leaf * 1, target).backward()
        (expected,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(leaf.grad, expected)
