"""The report of a file has the zeros of its weights, whatever its format."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import feather_param
from tests.cli.commands import KINDS, TENSORS, ZEROS, done, fails
from tests.reports.pages import checked


@pytest.mark.parametrize("kind", KINDS)
def test_report_knows_every_kind_of_file_by_its_content(kind, run):
    KINDS[kind](Path("file"))
    report = json.loads(done(run("report", "file", "--json")))
    tensors = {tensor["name"]: tensor for tensor in report["tensors"]}
    assert {name: tensor["shape"] for name, tensor in tensors.items()} == {k: list(v.shape) for k, v in TENSORS.items()}
    assert tensors["half.weight"]["dtype"] == "bfloat16"
    zeros = {name: tensor["zeros"] for name, tensor in tensors.items() if tensor["zeros"] is not None}
    tied = {} if kind != "safetensors" else {"tied.weight": ZEROS["fc.weight"]}  # the format knows no ties
    assert zeros == {**ZEROS, **tied}
    assert report["zeros"] == sum(zeros.values())
    assert report["total"] == sum(TENSORS[name].numel() for name in zeros)
    assert report["kind"] == kind.split()[0] if kind.startswith("s") and kind != "state_dict" else "torch"
    assert report["bytes"] == Path("file").stat().st_size
    assert report["key"] == (kind if kind in ("state_dict", "model", "model_state_dict") else "")
    assert report["beside"] == {"state_dict": ["epoch"], "model": ["rng"]}.get(kind, [])
    text = done(run("report", "file", "--no-sizes"))
    assert f"{report['zeros']:,}" in text
    assert ("tied to one of these" in text) == (kind != "safetensors")


def test_sizes_are_those_of_the_files(run):
    KINDS["torch"](Path("file"))
    found = json.loads(done(run("report", "file", "--json")))["sizes"]
    once = [TENSORS[name] for name in TENSORS if name != "tied.weight"]
    raw = b"".join(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in once if tensor.numel())
    feather_param.save_sparse(TENSORS, "sparse")
    feather_param.save_sparse(TENSORS, "zstd", zstd=True)
    assert found == {
        "dense": len(raw),
        "dense_gzip": len(gzip.compress(raw, 6)),
        "sparse": Path("sparse").stat().st_size,
        "sparse_zstd": Path("zstd").stat().st_size,
    }
    assert json.loads(done(run("report", "file", "--json", "--no-sizes")))["sizes"] == {}


def test_sizes_without_zstandard_leave_it_out(run, monkeypatch):
    KINDS["torch"](Path("file"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert list(json.loads(done(run("report", "file", "--json")))["sizes"]) == ["dense", "dense_gzip", "sparse"]
    fails(run("compress", "--zstd", "file", "out.safetensors"), 1, "pip install 'feather_param[files]'")


def test_report_writes_a_page(run):
    KINDS["sparse"](Path("a <b> & c"))
    assert "fc.weight" in done(run("report", "a <b> & c", "--html", "page.html"))
    found = checked(Path("page.html").read_text(encoding="utf-8"))
    assert found.text.count("a <b> & c") == 2  # title and headline
    assert "fc.weight" in found.text
    assert "sparse + zstd" in found.text
    assert sorted(path.name for path in Path().iterdir()) == ["a <b> & c", "page.html"]


def test_report_of_eight_bit_floats(run):
    torch.save({"w": torch.tensor([[0.0, 1.0, 2.0]]).to(torch.float8_e4m3fn)}, "file")
    assert json.loads(done(run("report", "file", "--json")))["zeros"] == 1


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="torch has no four-bit floats")
def test_report_of_four_bit_floats_does_not_count_them(run):
    packed = torch.zeros(4, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    torch.save({"packed": packed, "w": torch.zeros(2, 3)}, "file")
    report = json.loads(done(run("report", "file", "--json")))
    assert (report["total"], [tensor["zeros"] for tensor in report["tensors"]]) == (6, [None, 6])


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_report_of_nested_tensors_does_not_count_them(run):
    torch.save({"n": torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)]), "w": torch.eye(2)}, "file")
    report = json.loads(run("report", "file", "--json").out)
    assert (report["total"], report["others"]) == (4, {"n": "nested tensor"})


def test_key_goes_down_into_a_file(run):
    torch.save({"a": {"b.c": {"d": TENSORS}, "e": 1}, "f": [1]}, "deep.pt")
    fails(run("report", "deep.pt"), 1, "got dict; choose one of these with --key: a.b.c.d (7 tensors)")
    report = json.loads(done(run("report", "deep.pt", "--json", "--key", "a.b.c.d")))
    assert (report["key"], report["beside"], report["zeros"]) == ("a.b.c.d", ["f", "a.e"], sum(ZEROS.values()))
    fails(run("report", "deep.pt", "--key", "a.x"), 1, "expected x in deep.pt, got b.c, e")
    fails(run("report", "deep.pt", "--key", "a"), 1, "expected a state_dict at a of deep.pt, got dict")
    fails(run("report", "deep.pt", "--key", "f"), 1, "expected a state_dict at f of deep.pt, got list")
    KINDS["sparse"](Path("sparse"))
    fails(run("report", "sparse", "--key", "a"), 1, "expected no key for sparse")


def test_notes_are_on_stderr_and_in_the_json(run):
    mask = torch.tensor([[0.0, 0.0, 1.0]])
    torch.save({"w": torch.tensor([[-1.0, 1.0, -2.0]]) * mask, "n": 3, "s": torch.eye(3).to_sparse()}, "file")
    result = run("report", "file", "--json")
    assert result.status == 0
    report = json.loads(result.out)
    assert report["zeros"] == 2
    assert report["others"] == {"n": "int", "s": "sparse_coo tensor"}
    assert result.err.splitlines() == [f"feather-param: note: {note}" for note in report["notes"]]
    assert "no dense tensors: n (int), s (sparse_coo tensor)" in report["notes"][0]
    assert report["notes"][1].startswith("1 zeros are -0.0")


def test_a_pruned_weight_counts_once_if_its_dense_weight_is_beside_it(run):
    """A checkpoint of the Trainer of transformers holds both."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(4, 4))
    feather_param.sparsify(model, final_rate=0.5, total_steps=1, end_step=0)
    plain = feather_param.baked_state_dict(model)
    torch.save(model.state_dict() | plain, "both.pt")
    torch.save(plain, "plain.pt")
    both, alone = run("report", "both.pt", "--json"), run("report", "plain.pt", "--json")
    found, expected = json.loads(both.out), json.loads(alone.out)
    assert (found["zeros"], found["total"]) == (expected["zeros"], expected["total"]) == (64, 144)
    position = next(tensor.nbytes for name, tensor in model.state_dict().items() if name.endswith("_extra_state"))
    assert found["sizes"]["dense"] == expected["sizes"]["dense"] + position
    assert [tensor["zeros"] for tensor in found["tensors"] if "original" in tensor["name"]] == [None, None]
    assert "not counted, and not in the sizes: the dense weights of a model in training" in both.err
    assert "0.parametrizations.weight.original" in both.err
    assert "its zeros are not in them yet" not in both.err
    text = run("report", "both.pt", "--no-sizes").out
    assert "original" not in text
    assert "and 3 other tensors" in text  # two biases and the position


def test_a_dense_weight_without_its_pruned_weight_counts(run):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    feather_param.sparsify(model, final_rate=0.5, total_steps=1, end_step=0)
    baked = feather_param.baked_state_dict(model)
    torch.save(model.state_dict() | {"0.weight": baked["0.weight"]}, "half.pt")
    result = run("report", "half.pt", "--json", "--no-sizes")
    assert json.loads(result.out)["total"] == 128
    assert "(0.parametrizations.weight.original)" in result.err
    assert "its zeros are not in them yet" in result.err


def test_a_model_in_training_has_its_zeros_not_yet(run):
    model = nn.Linear(8, 8)
    feather_param.sparsify(model, final_rate=0.5, total_steps=1, end_step=0)
    torch.save(model.state_dict(), "training.pt")
    result = run("report", "training.pt", "--no-sizes")
    assert result.status == 0
    assert (
        "its zeros are not in them yet; run feather-param bake, or save feather_param.baked_state_dict(model)"
        in result.err
    )
    torch.save(feather_param.baked_state_dict(model), "baked.pt")
    assert "64     32  50.000%" in done(run("report", "baked.pt", "--no-sizes"))
    bench = ["--arch", "torch.nn:Linear", "in_features=8", "out_features=8", "--input", "1x8"]
    fails(run("bench", "training.pt", *bench), 1, "its zeros are not in them yet")
