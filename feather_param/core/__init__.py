"""The core: registration on a model, the shared state with its thresholds, copies, freezing and baking."""
