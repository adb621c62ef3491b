"""Lets the tests of a framework be collected where it is installed, and be left out elsewhere."""

import importlib.util
import os
import warnings

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

PACKAGES = {
    "test_lightning.py": ["lightning"],
    "test_segmentation_models.py": ["segmentation_models_pytorch"],
    "test_timm.py": ["timm"],
    "test_torchtitan.py": ["torchtitan", "triton"],
    "test_trl.py": ["trl", "peft"],
    "test_trl_example.py": ["trl"],
    "test_trl_gkd.py": ["trl"],
}
collect_ignore = [
    file
    for file, packages in PACKAGES.items()
    if not all(importlib.util.find_spec(package) for package in packages)
]

if importlib.util.find_spec("transformers") is None:
    collect_ignore_glob = ["test_transformers*.py"]

# The torchvision on PyPI is built for a torch with CUDA. Beside a torch without, its library does
# not load, and the import fails because two operators have no schema. No test uses them.
if torch.version.cuda is None and importlib.util.find_spec("torchvision"):
    LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def two_threads(threads):
    """Tiny models are faster with few threads."""
    threads(2)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Ignore warnings of the imports of frameworks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (yield)
