"""The callback for the Trainer of transformers: training, resuming, the best model, and optimizers."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import feather_param
from tests.integrations.bert import (
    DATA,
    TOTAL,
    ZEROS,
    Trainer,
    arguments,
    build,
    logits,
    same,
    sparsified,
    trainer_of,
    transformers,
    zeros,
)


class Recorder(transformers.TrainerCallback):
    """Records the step of the Trainer, the step of the controller and the rate after each update."""

    def __init__(self, controller: feather_param.Controller) -> None:
        self.controller, self.rates = controller, []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.rates.append((state.global_step, self.controller.step_count, self.controller.rate))


@pytest.mark.parametrize("accumulated", [1, 4])
def test_the_controller_makes_one_step_per_update(tmp_path, accumulated):
    controller = sparsified()
    recorder = Recorder(controller)
    trainer = trainer_of(controller, tmp_path, recorder, gradient_accumulation_steps=accumulated)
    trainer.train()
    assert [(step, seen) for step, seen, _ in recorder.rates] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert zeros(controller.model) == ZEROS


def test_the_steps_of_epochs_are_computed_from_the_trainer(tmp_path):
    """As docs/trainers/transformers.md shows it: the last updates of the epochs have fewer batches."""
    model = build()
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2)
    trainer = Trainer(model, args, train_dataset=DATA)
    scope = {"trainer": trainer, "args": args, "model": model, "feather_param": feather_param}
    page = (Path(__file__).parents[2] / "docs/trainers/transformers.md").read_text(encoding="utf-8")
    exec(compile(block(page, "add_callback"), "transformers.md", "exec"), scope)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()  # warns if the number is wrong
    assert scope["controller"].step_count == trainer.state.max_steps == 2 * 5


def block(page: str, text: str) -> str:
    """Return the only block of code of a page that holds a text."""
    (found,) = [part.split("```")[0] for part in page.split("```python\n")[1:] if text in part.split("```")[0]]
    return found


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning:torch.utils.data.dataloader")
def test_the_lines_of_the_page_train_a_sparse_model(tmp_path):
    page = (Path(__file__).parents[2] / "docs/trainers/transformers.md").read_text(encoding="utf-8")
    scope = {"model": build(), "train": DATA, "folder": str(tmp_path), "feather_param": feather_param, "updates": 4}
    exec(compile(block(page, "max_steps"), "transformers.md", "exec"), scope)
    loaded = type(scope["model"]).from_pretrained(tmp_path / "checkpoint-4/sparse")
    assert same(loaded, scope["model"])


def test_the_logs_of_the_training_loss_hold_rate_and_threshold(tmp_path):
    controller = sparsified()
    trainer = trainer_of(controller, tmp_path, logging_steps=1, eval_strategy="steps", eval_steps=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["feather/rate"] for entry in logs] == pytest.approx([0.7, 0.8, 0.8, 0.8])
    assert all(entry["feather/threshold"] > 0 for entry in logs)
    assert not [entry for entry in trainer.state.log_history if "eval_loss" in entry and "feather/rate" in entry]


def test_a_reporter_that_comes_after_the_callback_gets_the_rate(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    controller = sparsified()
    board = transformers.integrations.TensorBoardCallback(SummaryWriter(str(tmp_path / "tb")))
    trainer_of(controller, tmp_path, board, logging_steps=1).train()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/feather/rate")] == pytest.approx([0.7, 0.8, 0.8, 0.8])


@pytest.mark.parametrize(
    "options", [{}, {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "bf16": True}]
)
def test_a_resumed_training_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path, options):
    if "optim" in options:
        pytest.importorskip("schedulefree", reason="schedulefree needs feather_param[integrations]")
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, **options}

    def run(folder: Path, *more: Any, resume: bool = False) -> feather_param.Controller:
        controller = sparsified(6)
        trainer_of(controller, folder, *more, **options).train(resume_from_checkpoint=resume)
        return controller

    whole = run(tmp_path / "whole")
    assert zeros(whole.model) == ZEROS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # desparsified early
        run(tmp_path / "parts", StopAt(2))
    assert not (tmp_path / "parts/checkpoint-4").exists()
    resumed = run(tmp_path / "parts", resume=True)
    assert resumed.step_count == 6
    assert same(resumed.model, whole.model)


class StopAt(transformers.TrainerCallback):
    """Stops a training after a step, as an interruption would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


def metric_of(*values: float) -> Any:
    """Return a `compute_metrics` whose metric has the next of these values at each evaluation."""
    rest = iter(values)
    return lambda _: {"quality": next(rest)}


def trainer_for_best(folder: Path, values: tuple[float, ...], *more: Any, **options: Any) -> Trainer:
    controller = sparsified(6)
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "quality"}
    trainer = trainer_of(controller, folder, *more, max_steps=6, **every_step, **best, **options)
    trainer.compute_metrics = metric_of(*values)
    return trainer


@pytest.mark.parametrize("options", [{"save_total_limit": 1}, {"optim": "schedule_free_adamw"}])
def test_the_best_model_is_that_of_the_full_rate(tmp_path, options):
    if "optim" in options:
        pytest.importorskip("schedulefree", reason="schedulefree needs feather_param[integrations]")
    trainer = trainer_for_best(tmp_path, (0.9, 0.8, 0.5, 0.7, 0.6, 0.6), **options)
    trainer.train()
    assert trainer.state.best_global_step == 4
    assert trainer.state.best_metric == 0.7
    assert zeros(trainer.model) == ZEROS
    assert same(type(trainer.model).from_pretrained(tmp_path / "checkpoint-4/sparse"), trainer.model)
    folders = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    limited = ["checkpoint-4"] if options.get("save_total_limit") else [f"checkpoint-{i}" for i in range(1, 7)]
    assert folders == limited


def test_a_best_model_from_before_the_full_rate_is_named(tmp_path):
    trainer = trainer_for_best(tmp_path, (0.9, 0.8), StopAt(2))
    message = f"{tmp_path / 'checkpoint-1'}, is from step 1, before the full rate: it has a rate of 56.3%"
    with pytest.warns(UserWarning, match=re.escape(message)), pytest.warns(UserWarning, match="of final_rate"):
        trainer.train()
    assert zeros(trainer.model) == round((1 - (2 / 3) ** 3) * 0.8 * TOTAL)


def test_without_desparsify_the_model_stays_sparsified(tmp_path):
    controller = sparsified()
    trainer_of(controller, tmp_path, desparsify=False).train()
    assert controller.report().zeros == ZEROS
    feather_param.desparsify(controller.model)
    assert zeros(controller.model) == ZEROS


def test_a_second_training_starts_the_schedule_again(tmp_path):
    controller = sparsified()
    trainer = trainer_of(controller, tmp_path, desparsify=False)
    trainer.train()
    recorder = Recorder(controller)
    trainer.add_callback(recorder)
    trainer.train()
    assert recorder.rates[0] == (1, 1, pytest.approx(0.7))


def test_a_frozen_model_stays_frozen(tmp_path):
    controller = sparsified(6)

    class Freeze(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 4:
                controller.freeze()

    trainer = trainer_of(controller, tmp_path, Freeze(), max_steps=6, desparsify=False)
    trainer.train()
    assert "frozen" in repr(controller)
    trainer.train()
    assert "frozen" in repr(controller)
    assert controller.report().zeros == ZEROS


def test_a_schedule_free_optimizer_ends_with_the_averaged_weights(tmp_path):
    pytest.importorskip("schedulefree", reason="schedulefree needs feather_param[integrations]")
    controller = sparsified(5)
    options = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "max_steps": 5}
    saving = {"save_strategy": "steps", "save_steps": 5}
    trainer = trainer_of(controller, tmp_path, desparsify=False, **options, **saving)
    trainer.train()
    last = logits(controller.model)
    trainer.evaluate()  # puts the optimizer into its evaluation mode
    assert torch.equal(logits(controller.model), last)
    saved = type(controller.model).from_pretrained(tmp_path / "checkpoint-5/sparse")
    feather_param.desparsify(controller.model)
    assert same(saved, controller.model)
    assert zeros(saved) == ZEROS


def test_a_batch_that_does_not_fit_starts_again_with_a_smaller_one(tmp_path):
    pytest.importorskip("accelerate")
    controller = sparsified(4)
    full = []

    class OutOfMemory(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not full and state.global_step == 2:
                full.append(controller.step_count)
                raise RuntimeError("CUDA out of memory.")

    trainer = trainer_of(controller, tmp_path, OutOfMemory(), auto_find_batch_size=True)
    recorder = Recorder(controller)
    trainer.add_callback(recorder)
    trainer.train()
    assert full == [2]
    assert [seen for _, seen, _ in recorder.rates] == [1, 1, 2, 3, 4]
    assert zeros(controller.model) == ZEROS


@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.filterwarnings("ignore:the best model:UserWarning", "ignore:expected desparsify:UserWarning")
def test_early_stopping_before_the_full_rate_is_avoided_by_a_delay(tmp_path, delay):
    early = transformers.EarlyStoppingCallback(early_stopping_patience=1)
    trainer = trainer_for_best(tmp_path, (0.9, 0.8, 0.9, 0.8, 0.7), early, eval_delay=delay)
    trainer.train()
    assert trainer.state.global_step == (4 if delay else 2)
    assert (zeros(trainer.model) == ZEROS) == bool(delay)
