"""The report of sparse inference is a table."""

from __future__ import annotations

from feather_param.inference import Choices, InferenceReport, InferenceRow

CHOICES = Choices("x86_64 znver3, torch 2.6", 2, "sparse", ("conv",))


def test_the_report_reads_like_a_table():
    rows = (
        InferenceRow("conv", (8, 4, 3, 3), 0.9912, "sparse", 2.0, 0.1, 1.16, 0.02),
        InferenceRow("fc1", (8, 4), 0.95, "dense", 0.01, 0.02, 0.13, 0.013, "the dense layer is as fast"),
        InferenceRow("fc2", (8, 4), 0.2, "dense", None, None, 0.13, None, "its forward was not called"),
    )
    report = InferenceReport(rows, 4.0, 2.0, 1.5, 0.3, CHOICES, ("a note",))
    assert str(report).splitlines() == [
        "layer  shape    zeros  method  dense ms  sparse ms     gain  dense MB  sparse MB",
        "conv   8x4x3x3  99.1%  sparse     2.000      0.100    20.0x      1.16       0.02",
        "fc1    8x4      95.0%   dense     0.010      0.020  no gain      0.13       0.01",
        "fc2    8x4      20.0%   dense         -          -        -      0.13          -",
        "all                               4.000      2.000     2.0x      1.50       0.30",
        "dense: fc1 (the dense layer is as fast)",
        "dense: fc2 (its forward was not called)",
        "float32, CPU threads: 2",
        "a note",
    ]
    assert report.swapped == ("conv",)
    assert report.threads == 2


def test_without_times_the_report_has_sizes():
    row = InferenceRow("conv", (8, 4), 0.99, "sparse", None, None, 1.16, 0.02)
    lines = str(InferenceReport((row,), None, None, 1.5, 0.3, CHOICES)).splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ["conv", "8x4", "99.0%", "sparse", "-", "-", "-", "1.16", "0.02"],
        ["all", "-", "-", "-", "1.50", "0.30"],
    ]


def test_a_fused_network_without_sparse_layers_may_gain():
    row = InferenceRow("conv", (8, 4), 0.0, "dense", 1.0, 1.0, 1.16, 0.02, "the dense layer is as fast")
    choices = Choices("x86_64 znver3, torch 2.6", 1, "fused", ())
    lines = str(InferenceReport((row,), 3.0, 2.0, 1.5, 1.4, choices)).splitlines()
    assert lines[2].split() == ["all", "3.000", "2.000", "1.5x", "1.50", "1.40"]


def test_a_layer_that_is_the_model_has_a_name_in_the_table():
    row = InferenceRow("", (8, 4), 0.2, "dense", None, None, 0.13, None, "too few zeros")
    lines = str(InferenceReport((row,), 1.0, 1.0, 0.2, 0.2, CHOICES)).splitlines()
    assert lines[1].startswith("(the model)  8x4")
    assert "dense: (the model) (too few zeros)" in lines
