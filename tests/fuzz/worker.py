"""Runs calls in a process, or in each process of a group, and notes what it does in a file."""

import json
import time
import traceback
import warnings
from pathlib import Path

import torch.distributed as dist

from .calls import check_call


def check_numbers(folder: str, seed: str, numbers: str, end: str) -> None:
    """Check the calls of these numbers (JSON) until the time is over, going on after failures.

    The file of each rank has a line before each call, so that its last line names the call that
    has ended the process, and a line for each failure.
    """
    warnings.simplefilter("error")
    rank = dist.get_rank()
    with (Path(folder) / f"rank{rank}").open("a", buffering=1) as notes:
        all_numbers = json.loads(numbers)
        for number in all_numbers:
            if _is_over(float(end)):
                break
            notes.write(json.dumps({"number": number}) + "\n")
            try:
                check_call(int(seed), number, rank)
            except Exception as error:
                lines = "".join(traceback.format_exception(error)).strip().splitlines()
                shown = lines if len(all_numbers) == 1 else lines[-8:]
                notes.write(json.dumps({"failed": number, "text": "\n".join(shown)}) + "\n")
        notes.write(json.dumps({"ended": True}) + "\n")


def _is_over(end: float) -> bool:
    """Return the same on each rank: a rank that stopped alone would leave the others waiting."""
    over = [time.time() > end]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(over, 0)
    return over[0]
