"""All measurements of one GPU, within a number of minutes: `python -m benchmarks.gpu`."""
