"""The core: what `sparsify` puts on a model, how it is kept right, and how it is baked and taken off."""
