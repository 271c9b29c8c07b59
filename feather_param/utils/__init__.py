"""Helpers that know no tensors: checks of arguments, numbers by name, optional libraries, tables of text, warnings."""
