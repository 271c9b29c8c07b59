"""A tiny BERT on scikit-learn's digits, and its Trainer."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import feather_param
from tests.training import same_state

transformers = pytest.importorskip("transformers", reason="transformers needs feather_param[integrations]")
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments  # noqa: E402

from feather_param.integrations.transformers import FeatherCallback  # noqa: E402

transformers.logging.disable_progress_bar()
gc.freeze()  # each training collects garbage, which takes half a second among all that these libraries have imported

_PIXELS, _DIGITS = load_digits(return_X_y=True)
_TOKENS = torch.as_tensor(_PIXELS.reshape(-1, 8, 8).mean(axis=2)).long()  # the mean of each row, from 0 to 16
DATA = [{"input_ids": row, "labels": int(digit)} for row, digit in zip(_TOKENS[:144], _DIGITS[:144], strict=True)]


def configuration(**more: Any) -> BertConfig:
    return BertConfig(
        vocab_size=17,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        **more,
    )


def build() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(configuration(num_labels=10))


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 144,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return TrainingArguments(str(folder), **(defaults | options))


def sparsified(steps: int = 4, model: nn.Module | None = None, **settings: Any) -> feather_param.Controller:
    """Return the controller of a model."""
    return feather_param.sparsify(build() if model is None else model, final_rate=0.8, total_steps=steps, **settings)


def trainer_of(controller: feather_param.Controller, folder: Path, /, *more: Any, **options: Any) -> Trainer:
    """Return a Trainer with the callback and more callbacks. Options of the callback are taken out of the others."""
    own = {key: options.pop(key) for key in ("save_sparse", "desparsify") if key in options}
    trainer = Trainer(
        controller.model,
        arguments(folder, **options),
        train_dataset=DATA,
        eval_dataset=DATA,
        callbacks=[FeatherCallback(controller, **own), *more],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=_TOKENS[:144]).logits


def same(first: nn.Module, second: nn.Module) -> bool:
    """Return whether two models have the same state_dict, bit for bit."""
    return same_state(first.state_dict(), second.state_dict())


def zeros(model: nn.Module) -> int:
    """Return the number of zeros in the weights of the plain Linear layers."""
    return sum(int((layer.weight == 0).sum()) for layer in model.modules() if type(layer) is nn.Linear)


TOTAL = sum(layer.weight.numel() for layer in build().modules() if type(layer) is nn.Linear)
ZEROS = round(0.8 * TOTAL)
