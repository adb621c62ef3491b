"""Two processes, each with half of a batch, get the gradient of the whole batch."""

from concurrent.futures import ThreadPoolExecutor

import pytest

pytestmark = pytest.mark.cpu("uses gloo between processes")

SCRIPT = """
import os
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import fused_xent

rank, path = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
hidden, target = torch.arange(128).view(8, 16).sin(), torch.arange(8) * 7
target[:3] = -100  # only in one half: averaging the means of both would be wrong
kept = (target != -100).sum()
mine = slice(4 * rank, 4 * rank + 4)


def gradient(make_parallel, hidden, target, **options):
    torch.manual_seed(0)
    model = make_parallel(torch.nn.Linear(16, 50, bias=False))
    fused_xent.cross_entropy(model(hidden), target, **options).backward()
    return next(model.parameters()).grad


whole = gradient(lambda model: model, hidden, target)
# Gradients are averaged over two processes, so each divides by half of the count.
half = {"normalizer": kept / 2, "grad_in_forward": True}
by_ddp = gradient(torch.nn.parallel.DistributedDataParallel, hidden[mine], target[mine], **half)
torch.testing.assert_close(by_ddp, whole)
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
by_fsdp = gradient(lambda m: fully_shard(m, mesh=mesh), hidden[mine], target[mine], **half)
torch.testing.assert_close(by_fsdp.full_tensor(), whole)
dist.destroy_process_group()
print("right", flush=True)
os._exit(0)  # a torch thread that waits for the GIL at exit would abort the process
"""


def test_data_parallel_in_two_processes(run_python, tmp_path):
    """DistributedDataParallel and FSDP2."""

    def work(rank):
        return run_python("-W", "ignore", "-c", SCRIPT, str(rank), str(tmp_path / "store"))

    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(work, range(2)):
            assert result.returncode == 0, result.stderr[-3000:]
            assert result.stdout.strip().endswith("right")
