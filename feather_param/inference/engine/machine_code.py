"""Compile a module for this processor."""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import binding, ir


class MachineCode:
    """A module that was compiled. Its functions can be called by their addresses while this object lives.

    Args:
        module: in LLVM's intermediate representation.
        optimized: whether LLVM's passes run over it. They take as long as the rest, and loops become 4 % faster.
    """

    def __init__(self, module: ir.Module, optimized: bool = False) -> None:
        machine = machine_for(binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten())
        module.triple = machine.triple
        compiled = binding.parse_assembly(str(module))
        compiled.verify()
        if optimized:
            options = binding.create_pipeline_tuning_options(speed_level=1)
            options.loop_unrolling = False
            passes = binding.create_pass_builder(machine, options)
            passes.getModulePassManager().run(compiled, passes)
        self._engine = binding.create_mcjit_compiler(compiled, machine)
        self._engine.finalize_object()

    def address(self, name: str) -> int:
        """Return the address of a function."""
        return self._engine.get_function_address(name)


def machine_for(cpu: str, features: str) -> Any:
    """Return what generates the code.

    Args:
        cpu: LLVM's name of a processor.
        features: LLVM's names of what the processor can do.
    """
    _initialize()
    target = binding.Target.from_default_triple()
    return target.create_target_machine(cpu=cpu, features=features, opt=2, jit=True)


@functools.cache
def _initialize() -> None:
    """Load the code generator of this processor."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
