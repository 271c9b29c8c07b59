"""A checkpoint that is compressed and expanded is the same as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

import feather_param
from tests.cli.commands import KINDS, TENSORS, done, fails


def identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    same = all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))
    return list(a) == list(b) and same


@pytest.mark.parametrize("zstd", [[], ["--zstd"]], ids=["plain", "zstd"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
def test_compressed_and_expanded_is_the_same(suffix, zstd, run):
    KINDS["torch"](Path("in.pt"))
    before = Path("in.pt").read_bytes()
    printed = done(run("compress", "in.pt", "small.safetensors", *zstd))
    assert f"small.safetensors: {Path('small.safetensors').stat().st_size:,} bytes" in printed
    out = Path(f"out{suffix}")
    done(run("expand", "small.safetensors", out))
    if suffix == ".safetensors":
        found = safetensors.torch.load_file(out)
        with safetensors.safe_open(out, "pt") as file:
            assert file.metadata() == {"format": "pt"}  # transformers asks for it
    else:
        found = torch.load(out, weights_only=True)
        assert found["fc.weight"].data_ptr() == found["tied.weight"].data_ptr()
        assert found["dense.weight"].untyped_storage().nbytes() == 64  # no tensor brings the others along
    assert identical({name: found[name] for name in TENSORS}, TENSORS)
    assert Path("in.pt").read_bytes() == before
    assert sorted(path.name for path in Path().iterdir()) == sorted(["in.pt", out.name, "small.safetensors"])


@pytest.mark.parametrize("kind", ["legacy", "model_state_dict", "safetensors"])
def test_compress_takes_what_holds_nothing_but_tensors(kind, run):
    KINDS[kind](Path("in"))
    done(run("compress", "in", "out.safetensors"))
    found = feather_param.load_sparse("out.safetensors")
    assert identical({name: found[name] for name in TENSORS}, TENSORS)


def test_compress_drops_nothing_that_it_was_not_told_to(run):
    torch.save({"model": TENSORS, "optimizer": {"state": {}}, "epoch": 3}, "run.pt")
    fails(
        run("compress", "run.pt", "out.safetensors"),
        1,
        "run.pt also holds optimizer, epoch, which a sparse file cannot; to store only the weights, pass --key",
    )
    done(run("compress", "run.pt", "out.safetensors", "--key", "model"))
    torch.save({**TENSORS, "epoch": 3}, "mixed.pt")
    fails(run("compress", "mixed.pt", "no.safetensors"), 1, "expected tensors alone, got int at epoch")
    torch.save({**TENSORS, "s": torch.eye(3).to_sparse()}, "layout.pt")
    fails(run("compress", "layout.pt", "no.safetensors"), 1, "expected tensors alone, got sparse_coo tensor at s")
    assert not Path("no.safetensors").exists()


def test_compress_refuses_weights_that_are_dense_and_pruned_in_one_file(run):
    """A checkpoint of the Trainer of transformers holds both. Its baked file can be compressed."""
    model = torch.nn.Linear(64, 64)
    feather_param.sparsify(model, final_rate=0.9, total_steps=1, end_step=0)
    plain = feather_param.baked_state_dict(model)
    torch.save(model.state_dict() | plain, "both.pt")
    fails(run("compress", "both.pt", "no.safetensors"), 1, "expected each weight once, got 1 of both.pt twice")
    assert not Path("no.safetensors").exists()
    done(run("bake", "both.pt", "baked.pt"))
    done(run("compress", "baked.pt", "out.safetensors"))
    assert torch.equal(feather_param.load_sparse("out.safetensors")["weight"], plain["weight"])


def test_what_needs_no_doing_is_told(run):
    KINDS["torch"](Path("in.pt"))
    KINDS["sparse"](Path("sparse.safetensors"))
    fails(run("compress", "sparse.safetensors", "out.safetensors"), 1, "is a sparse file already")
    fails(run("expand", "in.pt", "out.pt"), 1, "in.pt is no sparse file: its tensors are dense already")
    feather_param.save_sparse({"w": torch.zeros(3, dtype=torch.complex128)}, "complex")
    fails(
        run("expand", "complex", "out.safetensors"), 1, "safetensors cannot hold torch.complex128; expand to a .pt file"
    )
    done(run("expand", "complex", "out.pt"))
