"""Machine code for sparse layers, written in LLVM's intermediate representation. Its modules need llvmlite."""
