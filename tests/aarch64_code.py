"""Check that the CPU's row kernels use vector instructions of 64-bit Arm in their loops.

The loops over classes that hold no branch are looked at. Those of the plain loss with class
indices compute exponentials with at least 40 vector instructions; no loop may compute with scalars
or call a function of libm.

    python tests/aarch64_code.py kernel_check

Run by `make aarch64-check`, on a program with the kernels. Reads what objdump disassembles.
"""

import re
import subprocess
import sys
from typing import NamedTuple

OBJDUMP = ("aarch64-linux-gnu-objdump", "--disassemble", "--demangle", "--no-show-raw-insn")
KERNELS = ("segment_stats", "segment_gradient", "row_stats_saving", "row_gradient_of_saved")
PLAIN = re.compile(r"segment_(stats|gradient)<\w+, void>")
VECTOR = re.compile(r"f\w+\s+v\d+\.(4s|2d)")  # arithmetic with floating-point vectors
SCALAR = re.compile(r"f(add|sub|mul|div|n?madd|n?msub|max\w*|min\w*)\s+[sd]\d")
JUMP = re.compile(r"(?:b|b\.\w+|cbn?z|tbn?z)\s.*?\b([0-9a-f]+) <")
LIBM = re.compile(r"bl\s+[0-9a-f]+ <(_*_*(exp|log|pow|tanh)\w*)[>@+]")


class Instruction(NamedTuple):
    """One line of the listing."""

    address: int
    text: str


def functions(listing: str) -> dict[str, list[Instruction]]:
    """Return the instructions of each function, by its name without arguments."""
    found: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in listing.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            name = re.sub(r"fused_xent::cpu::|\(anonymous namespace\)::", "", head[1])
            body = found.setdefault(name.partition("(")[0].split(" ", 1)[-1], [])
        elif code := re.match(r" *([0-9a-f]+):\s+(.*)", line):
            body.append(Instruction(int(code[1], 16), code[2]))
    return found


def tight_loops(body: list[Instruction]) -> list[list[str]]:
    """Return the loops whose only jump is the last instruction, back to the first one."""
    places = {instruction.address: i for i, instruction in enumerate(body)}
    loops, after_jump = [], 0
    for end, (_, text) in enumerate(body):
        if jump := JUMP.match(text):
            begin = places.get(int(jump[1], 16), end + 1)
            if after_jump <= begin <= end:
                loops.append([instruction.text for instruction in body[begin : end + 1]])
            after_jump = end + 1
    return loops


def faults(name: str, body: list[Instruction]) -> list[str]:
    """Return what is wrong with the loops over classes of a kernel."""
    found, is_vectorized = [], not PLAIN.match(name)
    for loop in tight_loops(body):
        n_vector, n_scalar = (sum(bool(p.match(x)) for x in loop) for p in (VECTOR, SCALAR))
        calls = [x for x in loop if x.startswith("bl")]
        is_vectorized = is_vectorized or (n_vector >= 40 and not calls)
        if n_scalar:
            found.append(f"a loop with {n_scalar} scalar instructions")
        if any(LIBM.match(x) for x in calls):
            found.append("a loop calls a function of libm")
    return found if is_vectorized else [*found, "no loop computes exponentials of vectors"]


def main(program: str) -> int:
    """Print the faults of all kernels; return 1 if there are any."""
    listing = subprocess.run([*OBJDUMP, program], check=True, capture_output=True, text=True).stdout
    kernels = {
        name: body
        for name, body in functions(listing).items()
        if name.split("<")[0] in KERNELS and "<" in name
    }
    wrong = [f"{name}: {fault}" for name, body in kernels.items() for fault in faults(name, body)]
    if sum(bool(PLAIN.match(name)) for name in kernels) < 2 * 4:
        wrong.append("there are fewer kernels than dtypes: was the program stripped?")
    print("\n".join(wrong or [f"{len(kernels)} row kernels: their loops use vector instructions"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
