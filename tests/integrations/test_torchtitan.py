"""torchtitan's llama with fused_xent's losses has the losses and gradients of torchtitan's own."""

import contextlib

import processes
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims, parallel_dims
from torchtitan.distributed.full_dtensor import parallelize_inputs
from torchtitan.distributed.spmd_types import annotate_input_spmd_types, set_current_spmd_mesh
from torchtitan.distributed.utils import get_spmd_context, set_spmd_backend
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.linear import Linear
from torchtitan.models.llama3 import _debugmodel
from torchtitan.models.llama3.parallelize import parallelize_llama
from torchtitan.models.llama3.sharding import set_llama3_sharding_config
from torchtitan.models.muse_glimmer.model import SoftCappedLinear

import fused_xent
from fused_xent.integrations.torchtitan import FusedCrossEntropyLoss, FusedLinearCrossEntropyLoss

pytestmark = [
    pytest.mark.cpu("uses gloo between processes"),
    pytest.mark.filterwarnings("ignore"),  # of the frameworks
]
VOCAB_SIZE = 2048
MESHES = {}  # of each process
BACKENDS = ("spmd_types", "partial_dtensor", "full_dtensor")


def make_losses(**options):
    """Return torchtitan's losses, and those of fused_xent that replace them."""
    size = {"global_vocab_size": VOCAB_SIZE}
    chunked = ChunkedLossWrapper.Config(num_chunks=2, loss_fn=CrossEntropyLoss.Config(**size))
    return [
        (CrossEntropyLoss.Config(**size), FusedCrossEntropyLoss.Config(**size, **options)),
        (chunked, FusedLinearCrossEntropyLoss.Config(**size, **options)),
    ]


class Run:
    """A llama of two layers, distributed as torchtitan's trainer does, and a batch."""

    def __init__(self, n_tensor, n_data, backend, dtype="float32", **options):
        parallel_dims.device_type = "cpu"  # torchtitan would take CUDA
        set_spmd_backend(backend)
        if backend not in MESHES:  # torchtitan compares meshes by identity
            degrees = {"dp_shard": n_data, "tp": n_tensor}
            degrees |= dict.fromkeys(["dp_replicate", "cp", "pp", "ep"], 1)
            size = n_tensor * n_data
            MESHES[backend] = ParallelDims(**degrees, world_size=size, spmd_backend=backend)
            MESHES[backend].build_mesh()
        self.dims = MESHES[backend]
        parallelism = ParallelismConfig(
            tensor_parallel_degree=n_tensor,
            data_parallel_shard_degree=n_data,
            spmd_backend=backend,
            **options,
        )
        config = _debugmodel("flex")
        config.layers = config.layers[:2]
        for layer in config.layers:  # flex attention is compiled, which takes minutes
            layer.attention.inner_attention = ScaledDotProductAttention.Config()
        set_llama3_sharding_config(config, enable_sp=parallelism.enable_sequence_parallel)
        is_first = backend == "spmd_types"  # initialization is that of whole parameters
        with torch.device("cpu" if is_first else "meta"):
            model = config.build()
        torch.manual_seed(dist.get_rank())
        if is_first:
            self._initialize(model)
        if backend == "spmd_types":  # FSDP of torch 2.13 does not know this backend's parameters
            model.parallelize(self.dims)
            self.model = model
        else:
            self.model = parallelize_llama(
                model,
                parallel_dims=self.dims,
                training=TrainingConfig(mixed_precision_param=dtype),
                parallelism=parallelism,
                compile_config=CompileConfig(),
                ac_config=None,
                dump_folder="",
            )
        for module in self.model.modules():
            if isinstance(module, FSDPModule):  # gloo has no other reduction
                module.set_force_sum_reduction_for_comms(True)
        if not is_first:
            self.model.to_empty(device="cpu")
            self._initialize(self.model)
        self.context = get_spmd_context(parallel_dims=self.dims)
        self.batch = self._make_batch(n_tensor, n_data, backend)

    def _initialize(self, model):
        with torch.no_grad():
            model.init_weights(buffer_device=torch.device("cpu"))

    def _make_batch(self, n_tensor, n_data, backend):
        torch.manual_seed(3)
        tokens = torch.randint(VOCAB_SIZE, (4, 17))
        labels = tokens[:, 1:].clone()
        labels[0, :7] = labels[3, 15:] = -100
        part = dist.get_rank() // n_tensor
        rows = slice(4 // n_data * part, 4 // n_data * (part + 1))
        inputs, own = tokens[rows, :-1].contiguous(), labels[rows].contiguous()
        if backend == "full_dtensor":
            inputs, own, _ = parallelize_inputs(self.dims, inputs, own, {})
        elif backend == "spmd_types":
            inputs, own, _ = annotate_input_spmd_types(self.dims, inputs, own, {})
        return inputs, own, (labels != -100).sum()

    def step(self, config):
        """Return the loss and the gradients of all parameters, of this process."""
        loss_function = config.build(compile_config=CompileConfig())
        self.model._skip_lm_head = isinstance(loss_function, ChunkedLossWrapper)
        if self.model._skip_lm_head:
            loss_function.set_lm_head(self.model.lm_head)
        inputs, labels, n_valid = self.batch
        with self.context():
            loss, metrics = loss_function(self.model(inputs), labels, n_valid)
            loss.backward()
        assert metrics == {}
        values = [loss.detach(), *(x.grad for x in self.model.parameters())]
        names = ["loss", *(name for name, _ in self.model.named_parameters())]
        self.model.zero_grad()
        # A partial loss stays partial.
        values = [x.to_local() if isinstance(x, DTensor) else x for x in values]
        return type(loss), dict(zip(names, values, strict=True))

    def validate(self, config):
        loss_function = config.build(compile_config=CompileConfig())
        if self.model._skip_lm_head:
            loss_function.set_lm_head(self.model.lm_head)
        inputs, labels, _ = self.batch
        with torch.no_grad(), self.context():
            return loss_function(self.model(inputs), labels)[0]


def check(run, tolerance=1e-4, **options):
    for of_titan, ours in make_losses(**options):
        own, right = run.step(of_titan)
        kind, found = run.step(ours)
        assert kind is own, (kind, own, type(ours))
        for name, value in right.items():
            scale = 1e-6 + value.abs().max().item()
            error = (found[name].float() - value.float()).abs().max().item()
            assert error <= tolerance * scale, (type(ours), name, error, scale)
        one, other = run.validate(ours), run.validate(of_titan)
        if isinstance(one, DTensor):
            one, other = one.full_tensor(), other.full_tensor()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def check_backends(n_tensor, n_data):
    n_tensor, n_data = int(n_tensor), int(n_data)
    for backend in BACKENDS:
        run = Run(n_tensor, n_data, backend)
        check(run)
        if n_tensor > 1:
            assert "forward" in vars(run.model.lm_head)  # torchtitan's own is there again
            check(Run(n_tensor, n_data, backend, enable_sequence_parallel=False))
        if n_tensor > 1 and backend == "spmd_types":
            check_vocab_size(run)
        if backend == "full_dtensor":
            check(Run(n_tensor, n_data, backend, "bfloat16"), 3e-2)
    if n_tensor == 1:
        check_split_head()


def check_vocab_size(run):
    for cls in (FusedCrossEntropyLoss, FusedLinearCrossEntropyLoss):
        with pytest.raises(ValueError, match=r"global_vocab_size must be .* got None"):
            run.step(cls.Config())
        with pytest.raises(ValueError, match=r"global_vocab_size must be .* got 3000: rank"):
            run.step(cls.Config(global_vocab_size=3000))


def check_split_head():
    """Classes that do not divide by the processes, a bias, plain tensors and DTensors."""
    n_classes, mesh = 41, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    whole, hidden = torch.nn.Linear(8, n_classes), torch.randn(2, 6, 8)
    labels = torch.randint(n_classes, (2, 6))
    labels[0, :3] = -100
    leaf = hidden.clone().requires_grad_()
    logits = whole(leaf).flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
    wanted.backward()
    own = slice(21 * dist.get_rank(), 21 * dist.get_rank() + 21)
    for options in ({}, {"drop_ignored": True}, {"chunk_rows": 3}):
        config = FusedLinearCrossEntropyLoss.Config(global_vocab_size=n_classes, **options)
        for kind in ("plain", "weight", "both"):
            layer, loss_function = torch.nn.Linear(8, 41), config.build()
            for name, value in whole.named_parameters():
                mine = distribute_tensor(value.data, mesh, [Shard(0)], src_data_rank=None)
                value = value.data[own].clone() if kind == "plain" else mine
                setattr(layer, name, torch.nn.Parameter(value))
            loss_function.set_lm_head(layer)
            x = hidden.clone()
            x = distribute_tensor(x, mesh, [Replicate()]) if kind == "both" else x
            x.requires_grad_()
            set_spmd_backend("spmd_types" if kind == "plain" else "partial_dtensor")
            with set_current_spmd_mesh(mesh) if kind == "plain" else contextlib.nullcontext():
                loss, _ = loss_function(x, labels)
                loss.backward()
                nothing, _ = loss_function(x.detach(), torch.full_like(labels, -100))
            assert isinstance(loss, DTensor) == (kind == "both")
            if kind == "plain":
                dist.all_reduce(x.grad)  # each rank has its part
            found = [loss, x.grad, nothing, layer.weight.grad, layer.bias.grad]
            found = [x.full_tensor() if isinstance(x, DTensor) else x for x in found]
            rows = own if kind == "plain" else slice(None)
            right = [wanted.detach(), leaf.grad, torch.tensor(0.0)]
            right += [whole.weight.grad[rows], whole.bias.grad[rows]]
            for one, other in zip(found, right, strict=True):
                torch.testing.assert_close(one.detach(), other, rtol=1e-4, atol=1e-5)
    layer.weight = torch.nn.Parameter(distribute_tensor(whole.weight.data, mesh, [Shard(1)]))
    with pytest.raises(ValueError, match="must share their work as in torchtitan"):
        loss_function(x, labels)


@pytest.mark.parametrize(("n_tensor", "n_data"), [(2, 2), (1, 2)])
def test_llama(n_tensor, n_data):
    """With tensor parallelism and FSDP, or FSDP alone, in each backend."""
    processes.run(check_backends, n_tensor * n_data, str(n_tensor), str(n_data))


# ---- one process ---------------------------------------------------------------------------------


@pytest.fixture
def one_process(monkeypatch):
    """The losses ask for the backend; without a mesh, nothing is split."""
    monkeypatch.setattr("torchtitan.distributed.utils._spmd_backend", "spmd_types")


def head(cls=None, **options):
    torch.manual_seed(0)
    return (cls or Linear).Config(in_features=8, out_features=40, **options).build()


def logits_loss(config, hidden, labels, layer, *n_valid):
    return config.build()(layer(hidden), labels, *n_valid)


def hidden_loss(config, hidden, labels, layer, *n_valid):
    loss = config.build()
    loss.set_lm_head(layer)
    return loss(hidden, labels, *n_valid)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"lse_square_scale": 0.01}])
def test_options(options, one_process):
    layer, labels = head(bias=True), torch.randint(40, (3, 5))
    labels[0, 2:] = -100
    hidden = torch.randn(3, 5, 8)
    wide = torch.nn.functional.linear(hidden.double(), layer.weight.double(), layer.bias.double())
    wanted = fused_xent.reference.cross_entropy(
        wide, labels, dim=-1, reduction="sum", **options
    ).detach()
    calls = [
        (logits_loss, FusedCrossEntropyLoss.Config(**options)),
        (logits_loss, FusedCrossEntropyLoss.Config(inplace_backward=True, **options)),
        (hidden_loss, FusedLinearCrossEntropyLoss.Config(**options)),
        (hidden_loss, FusedLinearCrossEntropyLoss.Config(drop_ignored=True, **options)),
        (hidden_loss, FusedLinearCrossEntropyLoss.Config(chunk_rows=2, **options)),
    ]
    gradients = []
    for call, config in calls:
        leaf = hidden.clone().requires_grad_()
        loss, metrics = call(config, leaf, labels, layer)
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
        part, _ = call(config, leaf, labels, layer, torch.tensor(7))
        torch.testing.assert_close(part.double(), wanted / 7, rtol=1e-5, atol=1e-5)
        assert metrics == {}
        gradients.append(torch.autograd.grad(part, [leaf, layer.weight, layer.bias]))
        for one, other in zip(gradients[-1], gradients[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert "forward" not in vars(layer)


def test_compiled_loss(one_process):
    compile_config = CompileConfig(enable=True, components=["loss"], backend="aot_eager")
    loss = FusedCrossEntropyLoss.Config().build(compile_config=compile_config)
    logits, labels = torch.randn(3, 5, 40), torch.randint(40, (3, 5))
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    torch.testing.assert_close(loss(logits, labels)[0], wanted)


def test_heads_that_are_not_linear(one_process):
    loss = FusedLinearCrossEntropyLoss.Config().build()
    with pytest.raises(RuntimeError, match=r"lm_head must be set .* use set_lm_head"):
        loss(torch.randn(3, 5, 8), torch.randint(40, (3, 5)))
    with pytest.raises(ValueError, match="got a SoftCappedLinear with a forward of its own"):
        loss.set_lm_head(head(SoftCappedLinear))
    layer = head()
    layer.forward = lambda hidden: 2 * hidden @ layer.weight.T
    with pytest.raises(ValueError, match="got a Linear with a forward of its own"):
        loss.set_lm_head(layer)
    layer = head()
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match="got a Linear with a forward hook"):
        loss.set_lm_head(layer)


def test_forward_is_restored_after_an_error(one_process):
    layer = head()
    with pytest.raises(ValueError, match="target must have shape"):
        hidden_loss(
            FusedLinearCrossEntropyLoss.Config(), torch.randn(3, 5, 8), torch.zeros(3), layer
        )
    assert "forward" not in vars(layer)
