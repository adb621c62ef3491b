"""Builds CUDA sources for the emulator: nvcc, translation, g++; all results cached by content.

library = Harness(sources=[Path("rows.cu")], arch="sm_90").library(build_directory)
ctypes.CDLL(library)
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from .ptx2cpp import translate_module

EMULATOR = Path(__file__).resolve().parent
ROOT = EMULATOR.parents[1]  # of the project; copies of it share their builds
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
NVCC = str(CUDA / "bin" / "nvcc")
CXX = os.environ.get("CXX", "g++")
CXX_FLAGS = ("-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
SANITIZERS = {
    "": (),
    "address": ("-fsanitize=address", "-fno-omit-frame-pointer"),
    "thread": ("-fsanitize=thread",),
}
SOURCE_SUFFIXES = {".h", ".hpp", ".cuh", ".cu", ".cpp"}
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*["<]([^">]+)[">]', re.MULTILINE)
REGISTRATIONS = ("__cudaRegisterFunction", "__cudaRegisterVar")
processes = threading.Semaphore(os.cpu_count() or 1)


@dataclass
class Harness:
    """What to build: CUDA and host sources, linked with the emulator as the CUDA runtime."""

    sources: list[Path]  # CUDA: kernels and launchers
    host_sources: list[Path] = field(default_factory=list)  # plain C++: a main(), bindings
    arch: str = "sm_90"
    sanitizer: str = ""  # "", "address" or "thread"
    include: list[Path] = field(default_factory=list)  # folders of the project's own headers
    defines: list[str] = field(default_factory=list)  # NAME or NAME=VALUE, for all sources
    standard: str = "c++17"
    optimize: str = "-Og"  # of the translated kernels: ptx is optimized already
    nvcc_flags: list[str] = field(default_factory=list)
    host_flags: list[str] = field(default_factory=list)
    link_flags: list[str] = field(default_factory=list)
    machine_flags: list[str] = field(default_factory=list)  # -DEMULATOR_UCONTEXT, for example

    def library(self, build_directory, name="library.so"):
        return self._link(build_directory, ("-shared", "-Wl,-z,defs"), name)

    def program(self, build_directory):
        return self._link(build_directory, ("-pie",), "program")

    def _link(self, build_directory, flags, name):
        cache = Cache(Path(build_directory))
        flags = [*flags, *SANITIZERS[self.sanitizer], *self.link_flags, "-pthread"]
        with ThreadPoolExecutor(
            64
        ) as pool:  # most threads wait; `processes` limits the running ones
            jobs = [pool.submit(self._cuda, cache, source, pool) for source in self.sources]
            jobs += [pool.submit(self._host, cache, source) for source in self.host_sources]
            jobs.append(pool.submit(self._machine, cache))
            objects = [path for job in jobs for path in job.result()]
        return cache.make(
            name,
            [*objects, *flags],
            lambda out: run([CXX, *objects, *flags, "-o", out / name]),
        )

    def _project_flags(self):
        includes = (f"-I{Path(path).resolve()}" for path in self.include)
        return [f"-std={self.standard}", *includes, *(f"-D{name}" for name in self.defines)]

    def _source_key(self, source):
        return digest_of_files(included_files(source, [*self.include, EMULATOR]))

    def _cuda(self, cache, source, pool):
        """Run nvcc once, for the host object and the PTX that it embeds."""
        source = Path(source).resolve()
        number = self.arch.removeprefix("sm_")
        flags = ["-lineinfo", "-Xcompiler", "-fPIC", *self._project_flags()]
        flags += ["-gencode", f"arch=compute_{number},code=compute_{number}", *self.nvcc_flags]
        key = [
            NVCC,
            source,
            *flags,
            self._source_key(source),
            digest_of_folders([EMULATOR], {".py"}),
        ]
        name = re.sub(r"\W", "_", source.stem)

        def compile_cuda(out):
            with tempfile.TemporaryDirectory() as keep:
                command = [NVCC, *flags, "-c", source, "-o", out / "host.o"]
                run([*command, "--keep", "--keep-dir", keep])
                ptx = (Path(keep) / f"{source.stem}.ptx").read_text()
            own = [f"--redefine-sym={function}={function}_{name}" for function in REGISTRATIONS]
            run(["objcopy", *own, out / "host.o"])
            for number, part in enumerate(translate_module(ptx, name)):
                (out / f"{number}.cpp").write_text(part)

        host = cache.make("host.o", key, compile_cuda)
        parts = sorted(host.parent.glob("*.cpp"))
        return [host, *pool.map(lambda part: self._kernel(cache, part), parts)]

    def _kernel(self, cache, part):
        """Compile a file of translate_module(). Equal ones are shared: no path is in the key."""
        flags = [*CXX_FLAGS, "-std=c++17", self.optimize, "-g1", "-ffp-contract=off"]
        flags += ["-fno-math-errno", "-Wno-unused-parameter", f"-I{EMULATOR}"]
        flags += [*SANITIZERS[self.sanitizer], *cpu_flags()]
        return cache.make(
            "kernels.o",
            [part.read_text(), *flags, digest_of_folders([EMULATOR], {".h"})],
            lambda out: run([CXX, *flags, "-c", part, "-o", out / "kernels.o"]),
        )

    def _machine(self, cache):
        """Compile the machine as one file: it is faster. Never sanitized: see sanitizer_hooks.h."""
        flags = [*CXX_FLAGS, "-std=c++17", "-O2", "-g1", f"-I{CUDA}/include", *self.machine_flags]
        flags.append(f"-I{EMULATOR}")

        def compile_machine(out):
            sources = sorted(EMULATOR.glob("*.cpp"))
            (out / "all.cpp").write_text("".join(f'#include "{s}"\n' for s in sources))
            run([CXX, *flags, "-c", out / "all.cpp", "-o", out / "machine.o"])

        key = [*flags, digest_of_folders([EMULATOR], {".h", ".cpp"})]
        return [cache.make("machine.o", key, compile_machine)]

    def _host(self, cache, source):
        flags = [*CXX_FLAGS, "-O1", "-g1", f"-I{CUDA}/include", f"-I{EMULATOR}"]
        flags += [*self._project_flags(), *SANITIZERS[self.sanitizer], *self.host_flags]
        key = [source, *flags, self._source_key(source)]
        command = [CXX, *flags, "-c", source, "-o"]
        return [cache.make("host.o", key, lambda out: run([*command, out / "host.o"]))]


def missing_tools():
    """Return the required build tools that are not installed."""
    return [tool for tool in (NVCC, CXX, "objcopy") if shutil.which(tool) is None]


class Cache:
    """A cache of build results, in folders named by the hash of all their inputs."""

    def __init__(self, root):
        self.root = root

    def make(self, name, key, build):
        """Return the path of a result, which `build` writes to the folder that it is given."""
        folder = self.root / digest_of([name, *key])
        if not folder.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            with open(f"{folder}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # others that want the same result wait for it
                if not folder.exists():
                    work = Path(tempfile.mkdtemp(dir=self.root))
                    build(work)
                    work.rename(folder)  # atomic: a folder that exists is complete
        return folder / name


def digest_of(key):
    text = "\0".join(map(str, key)).replace(str(ROOT), "")
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def digest_of_folders(folders, suffixes=frozenset(SOURCE_SUFFIXES)):
    """Return the digest of all source files below the folders."""
    paths = {path for folder in folders for path in Path(folder).rglob("*")}
    return digest_of_files(path for path in paths if path.suffix in suffixes)


def digest_of_files(paths):
    contents = ((path, hashlib.sha256(path.read_bytes()).hexdigest()) for path in sorted(paths))
    return digest_of([part for pair in contents for part in pair])


def included_files(source, folders=()):
    """Return the source and the project files that it includes; #if directives are ignored.

    Project files are those found beside the including file or in one of the folders.
    """
    found, to_read = set(), [Path(source).resolve()]
    while to_read:
        path = to_read.pop()
        if path in found:
            continue
        found.add(path)
        for name in INCLUDE.findall(path.read_text()):
            places = [(Path(folder) / name).resolve() for folder in (path.parent, *folders)]
            to_read += [place for place in places if place.is_file()][:1]
    return found


def cpu_flags():
    """Return flags that make fused multiply-adds and fp16 conversions instructions, not calls."""
    cpuinfo = Path("/proc/cpuinfo")
    have = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return ["-march=x86-64-v3"] if {"avx2", "fma", "f16c", "bmi2", "movbe"} <= set(have) else []


def run(command):
    with processes:
        result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    if result.stderr.strip():
        print(result.stderr, file=sys.stderr)


def preload_environment(sanitizer="address"):
    """Return environment variables with which Python can load a library built with ASan."""
    libraries = ["libasan.so", "libstdc++.so"] if sanitizer == "address" else ["libtsan.so"]
    find = [subprocess.check_output([CXX, f"-print-file-name={n}"], text=True) for n in libraries]
    return {"LD_PRELOAD": " ".join(f.strip() for f in find), "ASAN_OPTIONS": "detect_leaks=0"}
