"""The choice of the weights to prune: names, globs, tied tensors, and other libraries' parametrizations."""
