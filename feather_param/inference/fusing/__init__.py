"""The model as a graph of torch.fx, in which layers do what follows them as well."""
