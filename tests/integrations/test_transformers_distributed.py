"""A fused head under DistributedDataParallel and fully_shard, against one process."""

import copy

import processes
import pytest
import torch
import torch.distributed as dist
from tiny_models import batch, compare, make, step

pytestmark = pytest.mark.cpu("uses gloo between processes")

CASES = {
    "ddp, then apply": "gemma2",
    "apply, then ddp": "gemma2",
    "apply, then fsdp": "gemma2",
    "fsdp, then apply": "llama",
    "apply, then fsdp of head": "llama",
    "fsdp of head, then apply": "llama",
    "apply, then fsdp tied": "qwen3",
}


def wrapped(model, case):
    """Apply and wrap the model in the order of the case."""
    from torch.distributed.fsdp import fully_shard

    from fused_xent.integrations.transformers import apply

    if case.startswith("apply"):
        apply(model, fuse_head=True)
    if "ddp" in case:
        model = torch.nn.parallel.DistributedDataParallel(model)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        if "head" in case:
            fully_shard(model.lm_head)
        fully_shard(model)
    if case.endswith("apply"):
        apply(model, fuse_head=True)
    return model


def check_case(case):
    model = make(CASES[case])
    torch.manual_seed(1)
    whole = {**batch(4), "num_items_in_batch": torch.tensor(20)}
    wanted = step(copy.deepcopy(model), whole)
    model = wrapped(model, case)
    own = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    inputs = {name: whole[name][own] for name in ("input_ids", "labels")}
    inputs["num_items_in_batch"] = torch.tensor(10)  # the mean of two processes divides by 2
    for _ in range(2):
        output, gradients = step(model, inputs)
    assert output.logits is None
    loss = output.loss.detach().clone()
    dist.all_reduce(loss)
    of_names = {
        name.removeprefix("module."): g.full_tensor() if hasattr(g, "full_tensor") else g
        for name, g in gradients.items()
    }
    compare(({0: loss / 2}, of_names), ({0: wanted[0].loss.detach()}, wanted[1]))


@pytest.mark.parametrize("case", CASES)
def test_wrapped_model(case):
    processes.run(check_case, 2, case)
