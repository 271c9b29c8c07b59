"""The activations of the kernel."""

from __future__ import annotations

import math

from llvmlite import ir

from feather_param.inference.engine.job import LANES, Activation
from feather_param.inference.engine.writer import I32, VECTOR, Value, Writer, vector

_LARGEST, _SMALLEST = 88.72284, -103.97208  # exp is infinite above, and 0 below


def activated(w: Writer, x: Value, activation: Activation) -> Value:
    """Write code that applies an activation to a vector. NaN stays NaN."""
    if activation == Activation.IDENTITY:
        return x
    if activation == Activation.RELU:
        return w.select(w.fcmp_ordered("<", x, vector(0.0)), vector(0.0), x)
    if activation == Activation.RELU6:
        return w.limited(x, vector(0.0), vector(6.0))
    name = activation.name.lower()
    known = w.function_.module.globals.get(name) or _write(w.function_.module, name, activation)
    return w.call(known, [x])


def _write(module: ir.Module, name: str, activation: Activation) -> ir.Function:
    """Write a function for an activation whose code is too long for each place that calls it."""
    w = Writer(module, name, [VECTOR], VECTOR)
    w.function_.attributes.add("noinline")
    w.function_.linkage = "internal"
    (x,) = w.arguments
    if activation == Activation.HARDSWISH:
        w.ret(w.fmul(x, w.fdiv(w.limited(w.fadd(x, vector(3.0)), vector(0.0), vector(6.0)), vector(6.0))))
    else:
        w.ret(w.fdiv(x, w.fadd(vector(1.0), exponential(w, w.fneg(x)))))
    return w.function_


def exponential(w: Writer, x: Value) -> Value:
    """Write code that returns exp of a vector, to about one rounding.

    x = n log(2) + r with an integer n and |r| <= log(2) / 2. exp(r) is a polynomial, and 2**n a float of these bits.
    """
    wide = ir.VectorType(I32, LANES)

    def number(value: int) -> Value:
        return ir.Constant(wide, [value] * LANES)

    low, high = w.fcmp_ordered("<", x, vector(_SMALLEST)), w.fcmp_ordered(">", x, vector(_LARGEST))
    nan = w.fcmp_unordered("uno", x, x)
    bounded = w.select(low, vector(_SMALLEST), w.select(high, vector(_LARGEST), w.select(nan, vector(0.0), x)))
    n = w.intrinsic("llvm.rint", w.fmul(bounded, vector(1.4426950408889634)))
    r = w.multiply_add(n, vector(-0.693359375), bounded)
    r = w.multiply_add(n, vector(2.12194440e-4), r)  # the rest of log(2), so that r is exact
    sum_ = vector(1 / 5040)
    for term in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        sum_ = w.multiply_add(sum_, r, vector(term))
    power = w.fptosi(n, wide)
    half = w.ashr(power, number(1))
    for part in (half, w.sub(power, half)):  # 2**n in two steps: n may be 128, or less than -126
        sum_ = w.fmul(sum_, w.bitcast(w.shl(w.add(part, number(127)), number(23)), VECTOR))
    sum_ = w.select(low, vector(0.0), w.select(high, vector(math.inf), sum_))
    return w.select(nan, x, sum_)
