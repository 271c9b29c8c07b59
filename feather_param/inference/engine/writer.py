"""Write a function in LLVM's intermediate representation.

`Writer` adds what the kernel needs to llvmlite's `IRBuilder`: loops, loads and vectors of 16 floats. LLVM splits such a
vector into as many registers as the processor needs for it (one with AVX-512, two with AVX2, four with NEON).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llvmlite import ir

from feather_param.inference.engine.job import LANES, Slot

I1, I32, I64, F32 = ir.IntType(1), ir.IntType(32), ir.IntType(64), ir.FloatType()
VECTOR = ir.VectorType(F32, LANES)
MASK = ir.VectorType(I1, LANES)
POINTER = ir.PointerType()
VOID = ir.VoidType()
_LOOSE_ALIGNMENT = 4  # bytes: vectors are loaded from the address of any float

Value = Any  # of llvmlite.ir, which is not annotated


def integer(value: int) -> Value:
    """Return a constant of 64 bits."""
    return ir.Constant(I64, value)


def vector(value: float) -> Value:
    """Return a constant vector of 16 equal floats."""
    return ir.Constant(VECTOR, [ir.Constant(F32, value)] * LANES)


class Writer(ir.IRBuilder):
    """The body of a function that is being written, from the first statement to the last.

    Args:
        module: the function is added to it.
        name: of the function.
        parameters: their types.
        result: the type of the result.
    """

    def __init__(self, module: ir.Module, name: str, parameters: Sequence[Any], result: Any = VOID) -> None:
        self.function_ = ir.Function(module, ir.FunctionType(result, parameters), name)
        self.function_.attributes.add("nounwind")
        super().__init__(self.function_.append_basic_block("entry"))

    @property
    def arguments(self) -> Sequence[Value]:
        """The values of the parameters."""
        return self.function_.args

    def at(self, pointer: Value, index: Value, kind: Any = F32) -> Value:
        """Return the address of the element with an index."""
        return self.gep(pointer, [index], source_etype=kind)

    def floats(self, pointer: Value, index: Value) -> Value:
        """Load 16 floats from an index."""
        return self.load(self.at(pointer, index), align=_LOOSE_ALIGNMENT, typ=VECTOR)

    def float_(self, pointer: Value, index: Value) -> Value:
        """Load the float at an index."""
        return self.load(self.at(pointer, index), typ=F32)

    def index(self, pointer: Value, index: Value) -> Value:
        """Load the int32 at an index, as 64 bits."""
        return self.sext(self.load(self.at(pointer, index, I32), typ=I32), I64)

    def put(self, value: Value, pointer: Value, index: Value) -> None:
        """Store a float or 16 floats at an index."""
        self.store(value, self.at(pointer, index), align=_LOOSE_ALIGNMENT)

    def spread(self, value: Value, lanes: int = LANES) -> Value:
        """Return a vector of equal floats."""
        one = self.insert_element(ir.Constant(ir.VectorType(F32, lanes), ir.Undefined), value, ir.Constant(I32, 0))
        return self.shuffled(one, one, [0] * lanes)

    def shuffled(self, a: Value, b: Value, lanes: Sequence[int]) -> Value:
        """Return lanes of two vectors; those of the second are counted from the end of the first."""
        return self.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))

    def limited(self, x: Value, low: Value, high: Value) -> Value:
        """Return a vector with its elements limited. NaN stays NaN."""
        x = self.select(self.fcmp_ordered("<", x, low), low, x)
        return self.select(self.fcmp_ordered(">", x, high), high, x)

    def either(self, kind: Any, *values: tuple[Value, Any]) -> Value:
        """Return the value of the block that ran before this one, given as (value, block)."""
        phi = self.phi(kind)
        for value, block in values:
            phi.add_incoming(value, block)
        return phi

    def lanes(self, n: Value) -> Value:
        """Return an integer of 32 bits whose n lowest bits are 1, for n < 32."""
        one = ir.Constant(I32, 1)
        return self.sub(self.shl(one, self.trunc(n, I32)), one)

    def choose(
        self, value: Value, cases: Mapping[int, Callable[[], object]], otherwise: Callable[[], object] = lambda: None
    ) -> None:
        """Write code for each value of an integer, and for all others."""
        other, after = (self.append_basic_block(name) for name in ("otherwise", "after"))
        choice = self.switch(value, other)
        for number, write in cases.items():
            block = self.append_basic_block("case")
            choice.add_case(integer(number), block)
            self.position_at_end(block)
            write()
            self.branch(after)
        self.position_at_end(other)
        otherwise()
        self.branch(after)
        self.position_at_end(after)

    def mask(self, bits: Value) -> Value:
        """Return the low bits of an integer as a mask of lanes."""
        return self.bitcast(self.trunc(bits, ir.IntType(LANES)), MASK)

    def some_floats(self, pointer: Value, index: Value, mask: Value, others: Value) -> Value:
        """Load the floats of a mask from an index. The other lanes are those of a vector; their memory is not read."""
        arguments = [self.at(pointer, index), ir.Constant(I32, _LOOSE_ALIGNMENT), mask, others]
        return self.call_intrinsic(f"llvm.masked.load.v{LANES}f32.p0", arguments, VECTOR, [POINTER, I32, MASK, VECTOR])

    def put_some(self, value: Value, pointer: Value, index: Value, mask: Value) -> None:
        """Store the floats of a mask at an index."""
        arguments = [value, self.at(pointer, index), ir.Constant(I32, _LOOSE_ALIGNMENT), mask]
        self.call_intrinsic(f"llvm.masked.store.v{LANES}f32.p0", arguments, VOID, [VECTOR, POINTER, I32, MASK])

    def call_intrinsic(self, name: str, arguments: Sequence[Value], result: Any, kinds: Sequence[Any]) -> Value:
        """Call a function of LLVM."""
        module = self.function_.module
        known = module.globals.get(name)
        intrinsic = known or ir.Function(module, ir.FunctionType(result, list(kinds)), name)
        return self.call(intrinsic, arguments)

    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        """Return ``a * b + c``, rounded once where the processor can."""
        return self.intrinsic("llvm.fmuladd", a, b, c)

    def intrinsic(self, name: str, *arguments: Value) -> Value:
        """Call a function of LLVM whose arguments and result are of one type, floats or vectors."""
        kind = arguments[0].type
        suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
        return self.call_intrinsic(f"{name}.{suffix}", arguments, kind, [kind] * len(arguments))

    def smaller(self, a: Value, b: Value) -> Value:
        """Return the smaller integer."""
        return self.select(self.icmp_signed("<", a, b), a, b)

    def larger(self, a: Value, b: Value) -> Value:
        """Return the larger integer."""
        return self.select(self.icmp_signed("<", a, b), b, a)

    def loop(
        self,
        begin: Value,
        end: Value,
        body: Callable[..., Sequence[Value] | None],
        carried: Sequence[Value] = (),
        step: int = 1,
    ) -> list[Value]:
        """Write a loop over the indices from begin to end, and return the carried values after it.

        Args:
            begin: the first index.
            end: the indices are smaller.
            body: is called once with the index and the carried values. It writes the loop's body and returns the
                carried values for the next round.
            carried: the values before the first round.
            step: between two indices.
        """
        before = self.block
        inside, after = (self.append_basic_block(name) for name in ("body", "end"))
        self.cbranch(self.icmp_signed("<", begin, end), inside, after)
        self.position_at_end(inside)
        index, values = self.phi(I64), [self.phi(value.type) for value in carried]
        new = body(index, *values) or ()
        following, last = self.add(index, integer(step)), self.block
        self.cbranch(self.icmp_signed("<", following, end), inside, after)
        for phi, first, value in zip([index, *values], [begin, *carried], [following, *new], strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(value, last)
        self.position_at_end(after)
        return [self.either(a.type, (a, before), (b, last)) for a, b in zip(carried, new, strict=True)]


class Job:
    """Reads the fields of the job whose address is the first argument of a function."""

    def __init__(self, writer: Writer) -> None:
        self._writer, self.address = writer, writer.arguments[0]

    def __getattr__(self, name: str) -> Value:
        return self._writer.load(self._writer.at(self.address, integer(Slot[name]), I64), typ=I64)

    def pointer(self, name: str) -> Value:
        """Return a field that is an address."""
        return self._writer.inttoptr(getattr(self, name), POINTER)
