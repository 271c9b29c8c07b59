"""The sizes of formats are measured without dense copies of all tensors."""

from __future__ import annotations

import torch

from feather_param.files import sizes


def test_gzip_needs_the_copy_of_one_expanded_tensor_at_a_time(monkeypatch):
    events = []
    elements_of = sizes.elements_of
    monkeypatch.setattr(sizes, "elements_of", lambda tensor: events.append("copy") or elements_of(tensor))
    views = {name: torch.zeros(100).expand(50, 100) for name in ("first", "second")}
    measured = sizes.file_sizes(views, lambda name, fraction: events.append(name))
    assert events[:4] == ["copy", "gzip", "copy", "gzip"]
    assert measured["dense"] == 2 * 50 * 100 * 4
