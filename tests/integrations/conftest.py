"""Lets the tests of a framework be collected where it is installed, and be left out elsewhere.

`make integrations` installs all of them. `make test` has transformers alone, for the tests of its
losses, which take seconds.
"""

import importlib.util
import os
import runpy
import warnings
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

PACKAGES = {
    "test_lightning.py": ["lightning"],
    "test_segmentation_models.py": ["segmentation_models_pytorch"],
    "test_timm.py": ["timm"],
    "test_torchtitan.py": ["torchtitan", "triton"],
    "test_transformers_apply.py": ["transformers", "peft"],
    "test_transformers_bench.py": ["transformers", "peft"],
    "test_transformers_distributed.py": ["transformers", "peft"],
    "test_transformers_example.py": ["transformers", "peft"],
    "test_transformers_losses.py": ["transformers"],
    "test_transformers_trainer.py": ["transformers", "peft"],
    "test_trl.py": ["trl", "peft"],
    "test_trl_example.py": ["trl"],
    "test_trl_gkd.py": ["trl"],
}
collect_ignore = [
    file
    for file, packages in PACKAGES.items()
    if not all(importlib.util.find_spec(package) for package in packages)
]

HERE = Path(__file__).parent
CUSTOMIZATION = runpy.run_path(str(HERE / "site/sitecustomize.py"))  # keeps its library alive


@pytest.fixture(autouse=True)
def _python_path(monkeypatch):
    """Processes that a test starts find its module, and run sitecustomize.py."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE / "site"), str(HERE)]))


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
