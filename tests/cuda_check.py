"""Check that the CUDA library loads in a CUDA build of torch, even without a GPU.

Run by ``make cuda-check``.
"""

import sys

import torch

import fused_xent
from fused_xent import _ops

has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
operators = [name for name in torch._C._dispatch_get_all_op_names() if "fused_xent::" in name]
on_cpu = sorted(name for name in operators if has_kernel(name, "CPU"))
print(f"{fused_xent.__file__} under torch {torch.__version__}")
if _ops.CUDA_LOAD_ERROR is not None:
    sys.exit(f"the CUDA library has not loaded: {_ops.CUDA_LOAD_ERROR}")
for name in on_cpu:
    print(f"{name:32}{'CUDA' if has_kernel(name, 'CUDA') else 'no CUDA kernel'}")
if not on_cpu or not all(has_kernel(name, "CUDA") for name in on_cpu):
    sys.exit("there are operators without a CUDA kernel")
print("the CUDA library has loaded, with a kernel for each operator")
