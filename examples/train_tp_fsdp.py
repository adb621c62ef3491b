"""Train a small transformer on 4 processes: tensor parallelism of 2, times FSDP2 of 2.

``parallelize_module`` splits the classes of the head over two processes, and ``fully_shard`` the
parameters over two groups of processes with different sequences. The head's logits stay split: they
are a DTensor, ``Shard(-1)``, whose placement tells ``cross_entropy`` all it needs. One all-gather
of 12 bytes a token takes the place of gathering the logits.

Run it: ``torchrun --nproc-per-node 4 examples/train_tp_fsdp.py``. It takes half a minute on a
CPU, with gloo. On GPUs, take "nccl" and "cuda", and make the tensors there.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fused_xent import cross_entropy

VOCAB_SIZE, N_FEATURES, LENGTH, BATCH, PADDING = 256, 64, 32, 8, -100


class Block(nn.Module):
    """A layer: a causal mean of the tokens before, then a feed-forward network."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.norm = nn.LayerNorm(N_FEATURES)
        self.up, self.down = nn.Linear(N_FEATURES, 256), nn.Linear(256, N_FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        """Return hidden states (B, T, H)."""
        x = x + x.cumsum(1) / torch.arange(1, x.shape[1] + 1).view(-1, 1)
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Predicts the next token."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, N_FEATURES)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(N_FEATURES, VOCAB_SIZE, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, T, V)."""
        return self.head(self.blocks(self.embedding(tokens)))


def parallelize(model: Model, mesh: DeviceMesh) -> None:
    """Split the layers over "tensor", and all parameters over "data"."""
    for block in model.blocks:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh["tensor"], plan)
        fully_shard(block, mesh=mesh["data"])
    column = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh["tensor"], {"head": column})
    fully_shard(model, mesh=mesh["data"])


def main(steps: int = 30) -> list[float]:
    """Train; return the mean loss of each step."""
    torch.manual_seed(0)  # the same model on all processes
    model, mesh = Model(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    n_data, part, losses = mesh["data"].size(), mesh["data"].get_local_rank(), []
    for _ in range(steps):
        tokens = torch.randint(VOCAB_SIZE, (BATCH, 1)) + 3 * torch.arange(LENGTH + 1)
        labels = tokens[:, 1:] % VOCAB_SIZE
        labels[:, 20:] = labels[:, 20:].masked_fill(torch.rand(BATCH, 1) < 0.5, PADDING)
        # FSDP averages gradients over "data": this makes them those of the mean over all tokens.
        normalizer = (labels != PADDING).sum() / n_data
        own = slice(part * BATCH // n_data, (part + 1) * BATCH // n_data)
        logits = model(tokens[own, :-1] % VOCAB_SIZE)
        loss = cross_entropy(logits, labels[own], dim=-1, normalizer=normalizer)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().full_tensor() / n_data
        dist.all_reduce(total, group=mesh["data"].get_group())
        losses.append(total.item())
    if dist.get_rank() == 0:
        print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    return losses


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
