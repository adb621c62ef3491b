"""Builds fused_xent._C of a copy of the project; objects that a fault did not change are cached."""

import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from emulator.build import CXX, Cache, digest_of_files, included_files, run
from torch.utils.cpp_extension import include_paths

import fused_xent

INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16")  # one file of csrc/cpu each
UNUSED = [name for name in INSTRUCTION_SETS if name != fused_xent.cpu_capability()]
FLAGS = ["-Og", "-g0", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
FLAGS += [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
FLAGS += [f"-DFUSED_XENT_WITHOUT_{name.upper()}" for name in UNUSED]
BINDING = ("cpu", "layout", "schemas", "tensors")


def build_library(project: Path, builds: Path) -> Path:
    """Build the library of this copy of the project; return its path in the build folder.

    It has the kernels of the instruction set in use alone.
    """
    cache = Cache(builds)

    def compiled(source: Path) -> Path:
        path = project / source
        contents = digest_of_files(included_files(path)).replace(str(project), "")
        command = [CXX, *FLAGS, "-c", path, "-o"]
        return cache.make(
            "x.o", [*FLAGS, source, contents], lambda out: run([*command, out / "x.o"])
        )

    sources = sorted(path.relative_to(project) for path in project.glob("csrc/cpu/*.cpp"))
    sources = [source for source in sources if source.stem not in UNUSED]
    sources += [Path("csrc/binding") / f"{name}.cpp" for name in BINDING]
    with ThreadPoolExecutor(len(sources)) as pool:
        objects = list(pool.map(compiled, sources))
    libraries = Path(torch.__file__).parent / "lib"
    link = [CXX, "-shared", *objects, f"-L{libraries}", "-ltorch_cpu", "-lc10"]
    name = "_C.abi3.so"
    return cache.make(name, objects, lambda out: run([*link, "-o", out / name]))
