"""The core: what `sparsify` registers on a model, how its thresholds are kept valid, and how it is baked and removed."""
