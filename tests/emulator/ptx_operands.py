"""Translates PTX types and operands to C++ expressions."""

import math
import re
import struct

from .ptx_parser import PtxError

C_TYPES = {
    **{f"{kind}{bits}": f"uint{bits}_t" for kind in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
    **{"f32": "float", "f64": "double", "pred": "bool", "b128": "u128"},
    **{"f16": "uint16_t", "bf16": "uint16_t", "f16x2": "uint32_t", "bf16x2": "uint32_t"},
}
FLOATS = ("f32", "f64")
INTEGER = re.compile(r"-?\d+U?|0x[0-9a-fA-F]+U?")
FLOAT = re.compile(r"0[fFdD]([0-9a-fA-F]{8}|[0-9a-fA-F]{16})")

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


def register_type(type_):
    """Return the unsigned integer of this width, or a float type: faster to compile."""
    if type_ in FLOATS or type_ == "pred":
        return C_TYPES[type_]
    return C_TYPES[f"b{max(bits(type_), 16)}"]  # 8-bit values live in 16-bit registers


IDENTIFIER = str.maketrans("%$.", "___")
UNNAMED = re.compile(r"_GLOBAL__N__[0-9a-f]{8}_\d+(_\w+?_cu)_[0-9a-f]{8}")


def identifier(name):
    """Return a name for C++, without the numbers that nvcc gives to unnamed namespaces."""
    return UNNAMED.sub(r"_GLOBAL__N_\1", name).translate(IDENTIFIER)


def float_literal(pattern, type_):
    """Return the C++ literal of a bit pattern."""
    form, suffix = ("If", "f") if type_ == "f32" else ("Qd", "")
    value = struct.unpack(f"={form[1]}", struct.pack(f"={form[0]}", pattern))[0]
    if math.isfinite(value):
        return (
            f"{value.hex()}{suffix}" if math.copysign(1, value) > 0 else f"({value.hex()}{suffix})"
        )
    return bit_cast(type_, f"(uint{bits(type_)}_t){pattern:#x}ull")


def bit_cast(type_, value):
    """Return a cast; not a template call, since those took a third of the compile time."""
    return f"__builtin_bit_cast({C_TYPES[type_]}, {value})"


class Operands:
    """The names in scope in one kernel."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.registers = {}  # name -> C++ type
        self.shared = set()
        self.addresses = set()  # names of local arrays and module variables
        self.line = 0

    def read(self, operand, type_):
        operand = operand.strip()
        c_type = C_TYPES[type_]
        if operand in self.registers:
            return self._register(operand, type_)
        if operand.startswith("!"):
            return "!" + self.read(operand[1:], type_)
        if operand in SPECIAL_REGISTERS:
            return f"({c_type})({SPECIAL_REGISTERS[operand]})"
        if match := FLOAT.fullmatch(operand):
            return self._literal(int(match[1], 16), type_)
        if INTEGER.fullmatch(operand):
            return self._literal(int(operand.rstrip("U"), 0), type_)
        return f"({c_type})({self._symbol(operand)})"

    def _register(self, operand, type_):
        name, declared, c_type = identifier(operand), self.registers[operand], C_TYPES[type_]
        if declared == c_type:
            return name
        if type_ in FLOATS:
            return bit_cast(type_, name)
        if declared in ("float", "double"):
            return f"({c_type}){bit_cast('b32' if declared == 'float' else 'b64', name)}"
        return f"({c_type}){name}"

    @staticmethod
    def _literal(value, type_):
        value &= (1 << 64) - 1
        if type_ in FLOATS:
            return float_literal(value & (1 << bits(type_)) - 1, type_)
        return f"({C_TYPES[type_]}){value:#x}ull" if value >> 31 else f"({C_TYPES[type_]}){value}"

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
        name, c_type, declared = (
            identifier(destination),
            C_TYPES[type_],
            self.registers[destination],
        )
        if declared == c_type:  # converts: every instruction yields the type that it names
            return f"{name} = {expression};"
        if type_ in FLOATS or declared in ("float", "double"):
            return f"{name} = __builtin_bit_cast({declared}, ({c_type})({expression}));"
        return f"{name} = ({c_type})({expression});"

    def address(self, operand, space):
        """Return the host address of a [base+offset] operand."""
        match = re.fullmatch(r"\[\s*([^\]+]+?)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if not match:
            raise PtxError(self.line, f"cannot read the address {operand!r}")
        base, offset = match[1], match[2] or "0"
        if space == "shared::cluster":
            return f"cluster_address((uint32_t)({self.read(base, 'u32')} + {offset}), HERE)"
        if space.startswith("shared"):
            return f"(arena + (uint32_t)({self.read(base, 'u32')} + {offset}))"
        return f"((char*)({self.read(base, 'u64')}) + ({offset}))"
