"""PTX types and operands as C++ expressions."""

import re

from .ptx_parser import PtxError

C_TYPES = {
    **{f"{kind}{bits}": f"uint{bits}_t" for kind in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
    **{"f32": "float", "f64": "double", "pred": "bool", "b128": "u128"},
    **{"f16": "uint16_t", "bf16": "uint16_t", "f16x2": "uint32_t", "bf16x2": "uint32_t"},
}
REGISTER_TYPES = {1: "bool", 8: "uint16_t", 16: "uint16_t", 32: "uint32_t", 64: "uint64_t"}
REGISTER_TYPES[128] = "u128"
FLOATS = ("f32", "f64")

SPECIAL_REGISTERS = {
    f"%{ptx}.{axis}": f"current->{member}.{axis}"
    for ptx, member in {
        "tid": "thread_index",
        "ctaid": "block_index",
        "ntid": "block_size",
        "nctaid": "grid_size",
    }.items()
    for axis in "xyz"
}
SPECIAL_REGISTERS |= {
    "%laneid": "current->lane",
    "%warpid": "current->warp_index",
    "WARP_SZ": "32u",
    "%lanemask_lt": "((1u << current->lane) - 1)",
    "%lanemask_eq": "(1u << current->lane)",
    "%cluster_ctarank": "current->cluster_rank",
    "%cluster_nctarank": "current->cluster_size",
    "%cluster_ctaid.x": "current->cluster_rank",
    "%cluster_nctaid.x": "current->cluster_size",
    "%clusterid.x": "(current->block_index.x / current->cluster_size)",
    "%nclusterid.x": "(current->grid_size.x / current->cluster_size)",
}
SPECIAL_REGISTERS |= {f"%cluster_ctaid.{axis}": "0u" for axis in "yz"}
SPECIAL_REGISTERS |= {f"%cluster_nctaid.{axis}": "1u" for axis in "yz"}


def bits(type_):
    if type_ == "pred":
        return 1
    return 32 if type_.endswith("x2") else int(re.sub(r"\D", "", type_))


def identifier(name):
    return re.sub(r"[%$.]", "_", name)


class Operands:
    """Knows the names that are in scope in one kernel."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.registers = {}  # name -> bits
        self.shared = set()
        self.addresses = set()  # names of local arrays and module variables
        self.line = 0

    def read(self, operand, type_):
        operand = operand.strip()
        c_type = C_TYPES[type_]
        if operand.startswith("!"):
            return "!" + self.read(operand[1:], type_)
        if operand in SPECIAL_REGISTERS:
            return f"({c_type})({SPECIAL_REGISTERS[operand]})"
        if match := re.fullmatch(r"0[fFdD]([0-9a-fA-F]{8}|[0-9a-fA-F]{16})", operand):
            width = 4 * len(match[1])
            return f"bit_cast<{c_type}>((uint{width}_t)0x{match[1]}ull)"
        if re.fullmatch(r"-?\d+U?|0x[0-9a-fA-F]+U?", operand):
            return self._integer(operand.rstrip("U"), type_)
        if operand in self.registers:
            name = identifier(operand)
            return f"bit_cast<{c_type}>({name})" if type_ in FLOATS else f"({c_type}){name}"
        return f"({c_type})({self._symbol(operand)})"

    def _integer(self, literal, type_):
        suffix = "ull" if literal.startswith("0x") else "ll"
        if literal == "-9223372036854775808":
            literal, suffix = "0x8000000000000000", "ull"
        if type_ in FLOATS:  # a bit pattern
            return f"bit_cast<{C_TYPES[type_]}>((uint{bits(type_)}_t){literal}{suffix})"
        return f"({C_TYPES[type_]})({literal}{suffix})"

    def _symbol(self, name):
        if name in self.shared:
            return f"shared_{identifier(name)}"
        if name in self.addresses:
            return f"(uintptr_t){identifier(name)}"
        if name in self.parameters:
            return f"(uintptr_t)parameters[{self.parameters.index(name)}]"
        raise PtxError(self.line, f"unknown operand {name!r}")

    def write(self, destination, type_, expression):
        if destination == "_":
            return f"(void)({expression});"
        if destination not in self.registers:
            raise PtxError(self.line, f"unknown destination {destination!r}")
        name, c_type = identifier(destination), C_TYPES[type_]
        if type_ == "pred":
            return f"{name} = {expression};"
        if type_ in FLOATS:
            return f"{name} = bit_cast<uint{bits(type_)}_t>(({c_type})({expression}));"
        return f"{name} = ({REGISTER_TYPES[self.registers[destination]]})({c_type})({expression});"

    def address(self, operand, space):
        """The host address of a [base+offset] operand."""
        match = re.fullmatch(r"\[\s*([^\]+]+?)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if not match:
            raise PtxError(self.line, f"cannot read the address {operand!r}")
        base, offset = match[1], match[2] or "0"
        if space == "shared::cluster":
            return f"cluster_address((uint32_t)({self.read(base, 'u32')} + {offset}), HERE)"
        if space.startswith("shared"):
            return f"(arena + (uint32_t)({self.read(base, 'u32')} + {offset}))"
        return f"((char*)({self.read(base, 'u64')}) + ({offset}))"
