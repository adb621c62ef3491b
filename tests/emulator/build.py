"""Builds CUDA sources for the emulator: nvcc, translation, g++; everything cached by content.

    library = Harness(sources=[Path("rows.cu")], arch="sm_90").library(build_directory)
    ctypes.CDLL(library)
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from .ptx2cpp import translate_module

EMULATOR = Path(__file__).resolve().parent
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
NVCC = str(CUDA / "bin" / "nvcc")
CXX = os.environ.get("CXX", "g++")
CXX_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address", "-fno-omit-frame-pointer"],
    "thread": ["-fsanitize=thread"],
}
SOURCE_SUFFIXES = {".h", ".hpp", ".cuh", ".cu", ".cpp"}


@dataclass
class Harness:
    """What to build: the sources' host objects, with the emulator as their CUDA runtime."""

    sources: list[Path]  # CUDA: kernels and launchers
    host_sources: list[Path] = field(default_factory=list)  # plain C++: a main(), bindings
    arch: str = "sm_90"
    sanitizer: str = ""  # "", "address" or "thread"
    include: list[Path] = field(default_factory=list)
    nvcc_flags: list[str] = field(default_factory=list)
    host_flags: list[str] = field(default_factory=list)
    link_flags: list[str] = field(default_factory=list)
    machine_flags: list[str] = field(default_factory=list)  # -DEMULATOR_UCONTEXT, for example
    depends: list[Path] = field(default_factory=list)  # more folders whose headers matter

    def library(self, build_directory):
        return self._link(build_directory, ["-shared", "-Wl,-z,defs"], "library.so")

    def program(self, build_directory):
        return self._link(build_directory, ["-pie"], "program")

    def _link(self, build_directory, flags, name):
        cache = Cache(Path(build_directory))
        flags = [*flags, *SANITIZERS[self.sanitizer], *self.link_flags, "-pthread"]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [pool.submit(job, cache) for job in self._jobs()]
            objects = [path for job in jobs for path in job.result()]
        return cache.make(
            name,
            [*objects, *flags],
            lambda out: run([CXX, *map(str, objects), *flags, "-o", out / name]),
        )

    def _jobs(self):
        yield from (lambda cache, s=s: self._cuda(cache, s) for s in self.sources)
        yield from (lambda cache, s=s: [self._host(cache, s)] for s in self.host_sources)
        yield from (
            lambda cache, s=s: [self._machine(cache, s)]
            for s in sorted(EMULATOR.glob("*.cpp"))
        )

    def _includes(self):
        return [f"-I{path}" for path in self.include]

    def _source_key(self):
        folders = {Path(s).resolve().parent for s in [*self.sources, *self.host_sources]}
        folders |= {Path(p).resolve() for p in self.depends}
        return digest_of_folders(folders)

    def _cuda(self, cache, source):
        """One nvcc run gives the host object and the very PTX that it embeds."""
        source = Path(source).resolve()
        number = self.arch.removeprefix("sm_")
        flags = ["-std=c++17", "-lineinfo", "-Xcompiler", "-fPIC"]
        flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
        flags += [*self._includes(), *self.nvcc_flags]

        def compile_cuda(out):
            command = [NVCC, *flags, "-c", source, "-o", out / "host.o"]
            with tempfile.TemporaryDirectory() as keep:
                run([*command, "--keep", "--keep-dir", keep])
                shutil.copy(Path(keep) / f"{source.stem}.ptx", out / "kernels.ptx")

        host = cache.make("host.o", [source, *flags, self._source_key()], compile_cuda)
        return [host, self._kernels(cache, host.parent / "kernels.ptx")]

    def _kernels(self, cache, ptx):
        flags = [*CXX_FLAGS, "-O1", "-g1", "-ffp-contract=off", f"-I{EMULATOR}"]
        flags += [*SANITIZERS[self.sanitizer], *(["-mfma"] if cpu_has_fma() else [])]

        def compile_translation(out):
            (out / "kernels.cpp").write_text(translate_module(ptx.read_text()))
            run([CXX, *flags, "-c", out / "kernels.cpp", "-o", out / "kernels.o"])

        key = [ptx, *flags, digest_of_folders([EMULATOR], {".py", ".h"})]
        return cache.make("kernels.o", key, compile_translation)

    def _machine(self, cache, source):
        """Compiled without sanitizers, whatever the harness: see sanitizer_hooks.h."""
        flags = [*CXX_FLAGS, "-O2", "-g", f"-I{CUDA}/include", *self.machine_flags]
        if source.name == "settings.cpp":
            flags.append(f'-DEMULATOR_DEFAULT_DEVICE="{self.arch.rstrip("af")}"')
        return cache.make(
            "machine.o",
            [source, *flags, digest_of_folders([EMULATOR], {".h", ".cpp"})],
            lambda out: run([CXX, *flags, "-c", source, "-o", out / "machine.o"]),
        )

    def _host(self, cache, source):
        flags = [*CXX_FLAGS, "-O1", "-g", f"-I{CUDA}/include", f"-I{EMULATOR}"]
        flags += [*self._includes(), *SANITIZERS[self.sanitizer], *self.host_flags]
        return cache.make(
            "host.o",
            [source, *flags, self._source_key()],
            lambda out: run([CXX, *flags, "-c", source, "-o", out / "host.o"]),
        )


class Cache:
    """Results in folders named by the hash of everything that they depend on."""

    def __init__(self, root):
        self.root = root

    def make(self, name, key, build):
        digest = hashlib.sha256("\0".join(map(str, [name, *key])).encode()).hexdigest()[:24]
        folder = self.root / digest
        if not folder.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(dir=self.root))
            build(work)
            try:
                work.rename(folder)  # atomic: processes may build the same thing at once
            except OSError:
                shutil.rmtree(work)
        return folder / name


def digest_of_folders(folders, suffixes=frozenset(SOURCE_SUFFIXES)):
    digest = hashlib.sha256()
    for folder in sorted(map(str, folders)):
        for path in sorted(Path(folder).iterdir()):
            if path.suffix in suffixes:
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def cpu_has_fma():
    """Without -mfma every fused multiply-add is a library call."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and " fma " in cpuinfo.read_text()


def run(command):
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    if result.stderr.strip():
        print(result.stderr, file=sys.stderr)


def preload_environment(sanitizer="address"):
    """For python itself: environment variables under which it can load an ASan library."""
    libraries = ["libasan.so", "libstdc++.so"] if sanitizer == "address" else ["libtsan.so"]
    find = [subprocess.check_output([CXX, f"-print-file-name={n}"], text=True) for n in libraries]
    return {"LD_PRELOAD": " ".join(f.strip() for f in find), "ASAN_OPTIONS": "detect_leaks=0"}
