"""The machine code of the sparse layers, and the tables that it needs."""
