"""Python imports this file at the start of each process that the integration tests start.

The torchvision on PyPI is built for a torch with CUDA. Beside a torch without, its library does not
load, and the import fails because two operators have no schema. No test uses them.
"""

import importlib.util

import torch

if torch.version.cuda is None and importlib.util.find_spec("torchvision"):
    LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
