"""Compile a module for this processor."""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import binding, ir


class MachineCode:
    """A module that was compiled. Its functions can be called by their addresses while this object lives.

    Args:
        module: in LLVM's intermediate representation.
        cpu: LLVM's name of a processor, or None for this one.
        features: LLVM's names of what the processor can do, or None for those of this one.
    """

    def __init__(self, module: ir.Module, cpu: str | None = None, features: str | None = None) -> None:
        machine = _machine(cpu, features)
        module.triple = machine.triple
        compiled = binding.parse_assembly(str(module))
        compiled.verify()
        self._engine = binding.create_mcjit_compiler(compiled, machine)
        self._engine.finalize_object()

    def address(self, name: str) -> int:
        """Return the address of a function."""
        return self._engine.get_function_address(name)


def _machine(cpu: str | None, features: str | None) -> Any:
    """Return what generates the code."""
    _initialize()
    cpu = binding.get_host_cpu_name() if cpu is None else cpu
    features = binding.get_host_cpu_features().flatten() if features is None else features
    target = binding.Target.from_default_triple()
    return target.create_target_machine(cpu=cpu, features=features, opt=2, jit=True)


@functools.cache
def _initialize() -> None:
    """Load the code generator of this processor."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
