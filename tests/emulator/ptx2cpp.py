"""Translates the PTX that nvcc emits into C++ for the emulator."""

import re

from . import ptx_arithmetic, ptx_parallel  # noqa: F401  (they register instruction handlers)
from .ptx_instructions import translate
from .ptx_operands import REGISTER_TYPES, Operands, bits, identifier
from .ptx_parser import PtxError, parse_module, parse_variable

LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)")
INLINED_AT = re.compile(r"inlined_at\s+(\d+)\s+(\d+)\s+(\d+)")


class KernelTranslator:
    """Translates one kernel's body, statement by statement."""

    def __init__(self, kernel, module):
        self.kernel, self.module = kernel, module
        self.operands = Operands(kernel.parameters)
        self.shared = []  # in the order of the machine's offset table
        self.output = []
        self.call_sites = {}  # inlined position -> where it was inlined
        body = "\n".join(item.text for item in kernel.items)
        for variable in module.variables:
            if not re.search(rf"(?<![\w$]){re.escape(variable.name)}(?![\w$])", body):
                continue
            if variable.space == "shared":
                self.declare_shared(variable.name, variable)
            else:
                self.operands.addresses.add(variable.name)

    def translate(self):
        for position, item in enumerate(self.kernel.items):
            self.operands.line = item.line
            if item.kind == "loc":
                self.source_line(item.text)
            elif item.kind == "label":
                self.output.append(f"{identifier(item.text)}:;")
            elif item.kind == "open":
                self.output.append("{" + self.local_labels(position))
            elif item.kind == "close":
                self.output.append("}")
            else:
                self.statement(item.text)
        return self

    def source_line(self, text):
        """Reports should name the user's line, not the toolkit header that was inlined there."""
        place, call_site = (LOCATION.search(text), INLINED_AT.search(text))
        position = place.groups()
        self.call_sites[position] = call_site and call_site.groups()
        while self.is_toolkit(position[0]) and self.call_sites.get(position):
            position = self.call_sites[position]
        file, line, _ = position
        if line != "0" and file in self.module.files:
            self.output.append(f'#line {line} "{self.module.files[file]}"')

    def is_toolkit(self, file):
        return re.search(r"/cuda[^/]*/.*include/", self.module.files.get(file, ""))

    def local_labels(self, position):
        """Inline PTX reuses label names; GNU C's __label__ gives them the scope PTX does."""
        depth, names = 0, []
        for item in self.kernel.items[position:]:
            depth += {"open": 1, "close": -1}.get(item.kind, 0)
            if depth == 0:
                break
            if item.kind == "label" and depth == 1:
                names.append(identifier(item.text))
        return f" __label__ {', '.join(names)};" if names else ""

    def statement(self, text):
        if text.startswith(".reg"):
            self.declare_registers(text)
        elif text.startswith(".shared"):
            self.declare_shared_in_body(text)
        elif text.startswith(".local"):
            self.declare_local(text)
        elif text.startswith("."):
            raise PtxError(self.operands.line, f"unsupported directive: {text}")
        else:
            self.guarded_instruction(text)

    def declare_registers(self, text):
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text)
        names = []
        for declared in match[2].split(","):
            numbered = re.fullmatch(r"\s*(.*)<(\d+)>", declared)
            count = int(numbered[2]) if numbered else 0
            names += [f"{numbered[1]}{n}" for n in range(count)] if numbered else [declared.strip()]
        width = bits(match[1])
        self.operands.registers |= dict.fromkeys(names, width)
        self.output.append(f"{REGISTER_TYPES[width]} {', '.join(map(identifier, names))};")

    def declare_shared_in_body(self, text):
        variable = parse_variable(text, self.operands.line)
        self.declare_shared(variable.name, variable)

    def declare_shared(self, name, variable):
        self.operands.shared.add(name)
        if variable.count is None:  # dynamic shared memory starts the arena
            offset = "0"
        else:
            offset = f"current->shared_offsets[{len(self.shared)}]"
            self.shared.append((variable.count * bits(variable.type) // 8, variable.alignment))
        self.output.append(f"const uint32_t shared_{identifier(name)} = {offset};")

    def declare_local(self, text):
        match = re.match(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", text)
        self.operands.addresses.add(match[2])
        self.output.append(f"alignas({match[1]}) char {identifier(match[2])}[{match[3]}];")

    def guarded_instruction(self, text):
        guard = ""
        if text.startswith("@"):
            predicate, text = text[1:].split(None, 1)
            guard = f"if ({self.operands.read(predicate, 'pred')}) "
        self.output.append(f"{guard}{{ {translate(text, self.operands)} }}")

    def registration(self):
        kernel = self.kernel
        shared = ", ".join(f"{{{size}, {alignment}}}" for size, alignment in self.shared)
        return (
            f'register_kernel({{"{kernel.name}", kernel_{identifier(kernel.name)}, {{{shared}}}, '
            f"{kernel.max_threads}, {{{kernel.cluster}, 1, 1}}, {self.module.target}}});"
        )


def define_variable(variable):
    """A __device__ or __constant__ variable becomes an ordinary array."""
    width = bits(variable.type)
    values = re.sub(r"0[fd]([0-9a-fA-F]{8,16})", r"0x\1", variable.initializer.strip("{} "))
    if re.search(r"[g-wyzG-WYZ$(]", values):
        raise PtxError(variable.line, f"unsupported initializer of {variable.name}")
    return (
        f"alignas({variable.alignment}) uint{width}_t {identifier(variable.name)}"
        f"[{variable.count}] = {{{values}}};"
    )


def translate_module(text):
    module = parse_module(text)
    stored = [v for v in module.variables if v.space != "shared"]
    kernels = [KernelTranslator(kernel, module).translate() for kernel in module.kernels]
    output = ['#include "ptx_prelude.h"', "namespace emulator {", "namespace {"]
    output += [define_variable(v) for v in stored]
    for k in kernels:
        output.append(f"void kernel_{identifier(k.kernel.name)}(void** parameters) {{")
        output += ["(void)parameters;", "char* const arena = current->shared;"]
        output += [*k.output, "}"]
    output.append("const bool registered = [] {")
    for v in stored:
        name = identifier(v.name)
        output.append(f'register_variable("{v.name}", {name}, sizeof {name});')
    output += [k.registration() for k in kernels]
    output += ["return true;", "}();", "}  // namespace", "}  // namespace emulator"]
    return "\n".join(output) + "\n"
