"""Builds of the CUDA kernels for the emulator: a Python module with the operators, and programs.

Both need nvcc and g++ but no GPU. Callers pass the build folder, a cache shared by a test run.
"""

import functools
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from emulator.build import CUDA, Harness
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
KERNELS = (
    *("forward", "backward", "forward_backward", "columns", "per_class_options"),
    *("sums", "sparse_labels"),
)
MISSING = next(
    (
        f"{name} is not installed"
        for name, found in (
            ("nvcc", (CUDA / "bin" / "nvcc").exists()),
            ("g++", shutil.which("g++")),
            ("objcopy", shutil.which("objcopy")),
        )
        if not found
    ),
    None,
)


def program(folder: Path, arch: str, sanitizer: str = "", kernels=KERNELS, defines=()) -> Path:
    """Build tests/native/cuda_check.cpp with these kernel files; return the program's path."""
    native = ROOT / "tests" / "native"
    return Harness(
        [CSRC / "cuda" / f"{name}.cu" for name in kernels],
        host_sources=[
            CSRC / "cuda" / "launch.cpp",
            CSRC / "cuda" / "plan.cpp",
            native / "cuda_check.cpp",
            native / "absent_kernels.cpp",
        ],
        arch=arch,
        sanitizer=sanitizer,
        include=[CSRC],  # as for module(): both share what nvcc makes
        defines=list(defines),
        standard="c++20",
        optimize="-O0",
        host_flags=["-Wno-psabi"],
    ).program(folder)


@functools.cache
def module(folder: Path, arch: str):
    """Build and import the operators of csrc/binding/cuda.cpp for CPU tensors, in the emulator."""
    import pybind11  # imported here: not needed, and maybe not installed, for runs on a GPU

    library = Path(torch.__file__).parent / "lib"
    includes = [*include_paths(), pybind11.get_include(), sysconfig.get_path("include")]
    path = Harness(
        [CSRC / "cuda" / f"{name}.cu" for name in (*KERNELS, "shards")],
        host_sources=[
            CSRC / "cuda" / "launch.cpp",
            CSRC / "cuda" / "plan.cpp",
            CSRC / "binding" / "cuda.cpp",
            CSRC / "binding" / "layout.cpp",
            CSRC / "binding" / "tensors.cpp",
            ROOT / "tests" / "native" / "cuda_module.cpp",
        ],
        include=[CSRC],
        arch=arch,
        standard="c++20",
        optimize="-O0",
        host_flags=[
            "-fPIC",
            "-fvisibility=hidden",
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            *(f"-isystem{path}" for path in includes),
        ],
        link_flags=[
            f"-L{library}",
            "-ltorch_cpu",
            "-lc10",
            f"-Wl,-rpath,{library}",
            "-Wl,-z,undefs",
        ],
    ).library(folder)
    loader = importlib.machinery.ExtensionFileLoader("emulated_cuda", str(path))
    spec = importlib.util.spec_from_file_location("emulated_cuda", path, loader=loader)
    imported = importlib.util.module_from_spec(spec)
    loader.exec_module(imported)
    return imported


class Launch(NamedTuple):
    """A launch of a kernel."""

    kernel: str
    blocks: int
    cluster_size: int
    shared_limit: int  # of dynamic shared memory, as set before the launch


def launches(module) -> list[Launch]:
    """Return the launches of the module's kernels since the previous call."""
    lines = [line.split() for line in module.launches().splitlines()]
    names = subprocess.run(
        ["c++filt"], input="\n".join(x[0] for x in lines), capture_output=True, text=True
    ).stdout.splitlines()
    return [
        Launch(re.search(r"(\w+)(<.*>)?\(", name)[1], *map(int, numbers))
        for name, (_, *numbers) in zip(names, lines, strict=True)
    ]


def operators() -> dict:
    """Return the emulated operators, keyed by their names in fused_xent._ops.

    Pairs hold the operator for CPU tensors, then the one for CUDA tensors.
    """
    emulated = torch.ops.fused_xent_emulated

    def pair(*names: str) -> tuple:
        return tuple(getattr(emulated, name).default for name in names)

    return {
        "_of_loss": pair("forward", "forward_with_statistics"),
        "_fused": pair("forward_backward_", "forward_backward_with_statistics_"),
        "_backward": emulated.backward.default,
        "_backward_": emulated.backward_.default,
        "_plain_loss": pair("loss", "loss"),
        "_plain_forward": pair("forward", "forward"),
        "_plain_backward": pair("backward", "backward"),
        "scale_gradient_": emulated.scale_gradient_.default,
        "multiply_": emulated.multiply_.default,
    }


def environment(**settings) -> dict[str, str]:
    """Return environment variables with these emulator settings, for a subprocess."""
    named = {f"EMULATOR_{name.upper()}": str(value) for name, value in settings.items()}
    return {**os.environ, "EMULATOR_SM_COUNT": "3", **named}
