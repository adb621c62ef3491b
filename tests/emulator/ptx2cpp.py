"""Translates the PTX that nvcc emits into C++ for the emulator."""

import re

from . import ptx_arithmetic, ptx_parallel  # noqa: F401  (they register instruction handlers)
from .ptx_instructions import translate
from .ptx_operands import Operands, bits, identifier, register_type
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
        self.call_sites = {}  # inlined position -> position of the call
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
        """Return the user's line, not that of a toolkit header that was inlined there."""
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
        """Declare the labels of a scope: inline PTX reuses names, __label__ makes them local."""
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
        c_type = register_type(match[1])
        self.operands.registers |= dict.fromkeys(names, c_type)
        self.output.append(f"{c_type} {', '.join(map(identifier, names))};")

    def declare_shared_in_body(self, text):
        variable = parse_variable(text, self.operands.line)
        self.declare_shared(variable.name, variable)

    def declare_shared(self, name, variable):
        self.operands.shared.add(name)
        if variable.count is None:  # dynamic shared memory is at the start of the arena
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

    def definition(self):
        return [
            f"void {self.function}(void** parameters) {{",
            "(void)parameters;",
            "char* const arena = current->shared;",
            *self.output,
            "}",
        ]

    @property
    def function(self):
        return f"kernel_{identifier(self.kernel.name)}"

    def table_entry(self):
        """Return the initializer of a Kernel: see registry.h."""
        kernel = self.kernel
        pairs = ", ".join(f"{{{size}, {alignment}}}" for size, alignment in self.shared)
        shared = f"shared_of_{self.function}" if pairs else "nullptr"
        table = f"constexpr SharedVariable {shared}[] = {{{pairs}}};" if pairs else ""
        limits = f"{kernel.max_threads}, {kernel.cluster}, {self.module.target}"
        entry = f'{{"{kernel.name}", {self.function}, {shared}, {len(self.shared)}, {limits}}},'
        return table, entry


def declare_variable(variable):
    """Declare a __device__ or __constant__ variable as an ordinary array."""
    declared = f"uint{bits(variable.type)}_t {identifier(variable.name)}[{variable.count}]"
    return f"alignas({variable.alignment}) extern {declared};"


def define_variable(variable):
    values = re.sub(r"0[fd]([0-9a-fA-F]{8,16})", r"0x\1", variable.initializer.strip("{} "))
    if re.search(r"[g-wyzG-WYZ$(]", values):
        raise PtxError(variable.line, f"unsupported initializer of {variable.name}")
    return f"decltype({identifier(variable.name)}) {identifier(variable.name)} = {{{values}}};"


REGISTRATION = """
}}  // namespace
using namespace emulator;
using namespace module_{name};
extern "C" void __cudaRegisterFunction_{name}(void**, const char* stub, char*, const char* name,
                                              int, void*, void*, void*, void*, int*) {{
  register_kernel(stub, name, kernels);
}}
extern "C" void __cudaRegisterVar_{name}(void**, char* variable, char*, const char* name, int,
                                         size_t, int, int) {{
  register_variable(variable, name, variables);
}}
"""


def tables(kernels, stored, name):
    """Return the tables of the module, and the registration functions that host stubs call."""
    shared, entries = zip(*(k.table_entry() for k in kernels), strict=True) if kernels else ((), ())
    names = [(v.name, identifier(v.name)) for v in stored]
    return [
        *map(define_variable, stored),
        *(f"void {k.function}(void**);" for k in kernels),
        *shared,
        "constexpr Kernel kernels[] = {",
        *entries,
        "{}};",
        "constexpr Variable variables[] = {",
        *(f'{{"{mangled}", {plain}, sizeof {plain}}},' for mangled, plain in names),
        "{}};",
        REGISTRATION.format(name=name),
    ]


def translate_module(text, name="module"):
    """Return C++ files to compile in parallel: the tables of the module, then one of each kernel.

    The files of equal kernels are equal, whatever architecture and whatever else the PTX is for.
    """
    module = parse_module(text)
    stored = [v for v in module.variables if v.space != "shared"]
    opening = ['#include "ptx_prelude.h"', f"namespace emulator::module_{name} {{"]
    opening += map(declare_variable, stored)
    kernels = [KernelTranslator(kernel, module).translate() for kernel in module.kernels]
    files = [
        [*opening, *tables(kernels, stored, name)],
        *([*opening, *kernel.definition(), "}  // namespace"] for kernel in kernels),
    ]
    return ["\n".join(lines) + "\n" for lines in files]
