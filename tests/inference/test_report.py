"""The report of sparse inference is a table."""

from __future__ import annotations

from feather_param.inference import InferenceReport, InferenceRow


def test_the_report_reads_like_a_table():
    rows = (
        InferenceRow("conv", (8, 4, 3, 3), 0.9912, "kernel", 2.0, 0.1, 1.16, 0.02),
        InferenceRow("fc1", (8, 4), 0.95, "dense", 0.01, 0.02, 0.13, 0.013),
        InferenceRow("fc2", (8, 4), 0.2, "dense", None, None, 0.13, None, "fewer than half of its weights are zero"),
    )
    report = InferenceReport(rows, 4.0, 2.0, 1.5, 0.3, threads=2, notes=("a note",))
    assert str(report).splitlines() == [
        "layer  shape    zeros  method  dense ms  sparse ms     gain  dense MB  sparse MB",
        "conv   8x4x3x3  99.1%  kernel     2.000      0.100    20.0x      1.16       0.02",
        "fc1    8x4      95.0%   dense     0.010      0.020  no gain      0.13       0.01",
        "fc2    8x4      20.0%   dense         -          -  no gain      0.13          -",
        "all                               4.000      2.000     2.0x      1.50       0.30",
        "dense: fc2 (fewer than half of its weights are zero)",
        "float32, CPU threads: 2",
        "a note",
    ]
    assert report.swapped == ("conv",)


def test_a_layer_that_is_the_model_has_a_name_in_the_table():
    row = InferenceRow("", (8, 4), 0.2, "dense", None, None, 0.13, None, "too few zeros")
    lines = str(InferenceReport((row,), 1.0, 1.0, 0.2, 0.2, threads=1)).splitlines()
    assert lines[1].startswith("(the model)  8x4")
    assert "dense: (the model) (too few zeros)" in lines
