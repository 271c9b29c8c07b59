"""The modules of integrations without the packages that they need."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "package", "name"),
    [
        ("lightning", "lightning.pytorch.callbacks", "lightning"),
        ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch-lightning"),
        ("peft", "peft", "peft"),
        ("transformers", "transformers", "transformers"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_installs_it(monkeypatch, module, package, name):
    monkeypatch.delitem(sys.modules, f"feather_param.integrations.{module}", raising=False)
    for part in (package.partition(".")[0], package):
        monkeypatch.setitem(sys.modules, part, None)
    message = rf"expected {name} to be installed: pip install 'feather_param\[integrations\]'"
    with pytest.raises(ImportError, match=message):
        importlib.import_module(f"feather_param.integrations.{module}")
