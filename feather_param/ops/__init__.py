"""The numerics of the method, as functions of tensors: the operator, the k-th magnitude, counts, checks for NaN.

Nothing here knows models, schedules or allocations.
"""
