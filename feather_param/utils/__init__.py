"""Helpers that know nothing of sparsity: checks of arguments, optional libraries, tables of text, warnings."""
