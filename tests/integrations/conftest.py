"""Lets the frameworks be imported beside a torch without CUDA."""

import importlib.util
import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# The torchvision on PyPI is built for a torch with CUDA. Beside a torch without, its library does
# not load, and the import fails because two operators have no schema. No test uses them.
if torch.version.cuda is None and importlib.util.find_spec("torchvision"):
    LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
