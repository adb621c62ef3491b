"""Install a wheel as a user does, and check it there.

    python tests/wheel_check.py dist/fused_xent-*.whl python3.10:2.10.0 python3.13:

Each argument after the wheel is PYTHON:TORCH, and makes an environment of that Python and that
version of torch, from PyPI; without a version, the newest. There is no compiler on its PATH. Run by
`make wheel-check`, which keeps the environments in build/wheel-check: several GB each.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build/wheel-check"
COMPILERS = ("c++", "g++", "cc", "gcc", "clang", "nvcc")
NUMBERS = """
import torch
import fused_xent

def results(function, logits, target, **options):
    leaf = logits.clone().requires_grad_()
    loss = function(leaf, target, **options)
    loss.backward()
    return loss.detach(), leaf.grad

assert fused_xent.cpu_capability() is not None
print("torch", torch.__version__)
for options in ({}, {"label_smoothing": 0.1, "weight": torch.rand(5003), "ignore_index": 3}):
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        logits, target = torch.randn(33, 5003).to(dtype), torch.randint(5003, (33,))
        given = {n: x.to(dtype) if torch.is_tensor(x) else x for n, x in options.items()}
        found = results(fused_xent.cross_entropy, logits, target, **given)
        double = {n: x.double() if torch.is_tensor(x) else x for n, x in given.items()}
        exact = results(torch.nn.functional.cross_entropy, logits.double(), target, **double)
        for name, actual, wanted in zip(("loss", "gradient"), found, exact):
            error = ((actual - wanted).abs().max() / wanted.abs().max()).item()
            print(f"{dtype}, {len(options)} options, {name}: error {error:.1e}")
            assert error < limit, (name, error)
"""


def run(*command: object, **options: object) -> str:
    """Run a command and return what it printed; stop with that if it fails."""
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True, **options)
    if result.returncode != 0:
        sys.exit(f"{' '.join(words[:4])} failed\n{result.stdout}{result.stderr}")
    return result.stdout


def first_example() -> str:
    """Return the first Python block of the README."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]


def make_environment(python: str, torch: str) -> Path:
    """Return a virtual environment with torch, which is made if it is not there."""
    if shutil.which(python) is None:
        sys.exit(f"each environment must be PYTHON:TORCH with an installed Python, got {python}")
    version = run(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    folder = FOLDER / f"{version}-{torch or 'newest'}"
    if not (folder / "ready").exists():
        run(python, "-m", "venv", "--clear", folder)
        wanted = f"torch=={torch}" if torch else "torch"
        run(folder / "bin/python", "-m", "pip", "install", "--quiet", wanted)
        (folder / "ready").touch()
    return folder


def check(wheel: Path, python: str, torch: str) -> None:
    """Install the wheel beside torch, and run its self-check and an example without a compiler."""
    folder = make_environment(python, torch)
    command = folder / "bin/python"
    pip = (command, "-m", "pip", "--quiet")
    run(*pip, "install", "--no-deps", "--no-index", "--force-reinstall", wheel)
    run(*pip, "check")
    path = str(folder / "bin")
    if found := [name for name in COMPILERS if shutil.which(name, path=path)]:
        sys.exit(f"the environment must have no compiler, {path} has {found[0]}")
    with tempfile.TemporaryDirectory() as empty:
        outside = {"cwd": empty, "env": {"PATH": path, "HOME": empty}}
        report = run(command, "-m", "fused_xent", **outside)
        print(report.split("\n\n")[0])
        if "CPU: native kernels" not in report:
            sys.exit("the native kernels have not loaded")
        print(run(command, "-c", NUMBERS, **outside), end="")
        run(command, "-c", first_example(), **outside)
        if run(command, "-c", "import torch; print(torch.version.cuda)", **outside) != "None\n":
            print(run(command, ROOT / "tests/cuda_check.py", **outside).splitlines()[-1])


if __name__ == "__main__":
    for environment in sys.argv[2:]:
        print(f"---- {environment}", flush=True)
        check(Path(sys.argv[1]).resolve(), *environment.split(":"))
    print(f"the wheel works in {len(sys.argv) - 2} environments")
