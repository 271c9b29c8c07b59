"""A callback for the Trainer of Hugging Face's transformers.

The Trainer stores the sparsified model. Its state_dict holds the dense weights and the position in the schedule, so the
Trainer resumes by itself. `from_pretrained` needs plain weights, so the callback adds them to each checkpoint.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
from contextlib import suppress
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from feather_param import Controller, baked_state_dict
from feather_param.parametrizations import is_sparsified
from feather_param.utils.extras import imports
from feather_param.utils.warn import warn

with imports("transformers"):
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME

__all__ = ["FeatherCallback"]

_WEIGHTS, _SPARSE = "weights.unfinished", "sparse.unfinished"  # folders in a checkpoint, until they are complete

_CARD = """---
library_name: transformers
tags:
- feather_param
- sparse
---

{zeros:,} of the {total:,} prunable weights are exactly zero ({rate:.3%}), after {step:,} updates with feather_param.

```
{report}
```
"""


class FeatherCallback(TrainerCallback):
    """Move a sparsified model through its schedule while a ``transformers.Trainer`` trains it.

    * One step of the controller per update, with any ``gradient_accumulation_steps``.
    * The logs of the training loss get ``feather/rate`` and ``feather/threshold``.
    * A new training starts the schedule at its beginning. A resumed one goes on where it was.
    * When the full rate is reached, the best metric so far is forgotten, since it is that of a model with fewer zeros.
    * An optimizer with the methods ``train`` and ``eval`` (schedule-free) is in its evaluation mode while the model is
      saved, and at the end. So the network that is saved is the one that is evaluated.

    Args:
        controller: what `feather_param.sparsify` returned for the model of the Trainer. It follows no optimizer.
        save_sparse: whether ``from_pretrained`` shall load the checkpoints. Each ``checkpoint-N`` gets a folder
            ``sparse`` with the plain, pruned model and a model card. The pruned weights are also added to the weights
            of ``checkpoint-N`` itself, beside those that a resume needs.
        desparsify: whether to call `feather_param.desparsify` at the end of the training.

    Raises:
        TypeError: ``controller`` is no Controller.

    Note:
        The start of a training raises a ValueError if the model of the Trainer is not that of the controller, if it is
        sharded (FSDP, DeepSpeed), or if it has adapters of peft and ``save_sparse`` is True. It raises a RuntimeError
        if the model is plain already, and warns if ``total_steps`` of the controller is not the number of updates. The
        first update raises a RuntimeError if the controller follows an optimizer.

    Example:
        >>> import tempfile, transformers
        >>> from feather_param.integrations.transformers import FeatherCallback
        >>> class Net(nn.Linear):
        ...     def forward(self, x, labels):
        ...         return {"loss": nn.functional.cross_entropy(super().forward(x), labels)}
        >>> model = Net(4, 4)
        >>> controller = feather_param.sparsify(model, final_rate=0.75, total_steps=4)
        >>> args = transformers.TrainingArguments(
        ...     tempfile.mkdtemp(), max_steps=4, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
        ... )
        >>> data = [{"x": torch.ones(4), "labels": 1}] * 8
        >>> trainer = transformers.Trainer(model, args, train_dataset=data, callbacks=[FeatherCallback(controller)])
        >>> trainer.pop_callback(transformers.PrinterCallback) is None
        False
        >>> trainer.train().global_step, int((model.weight == 0).sum())
        (4, 12)
    """

    def __init__(self, controller: Controller, *, save_sparse: bool = True, desparsify: bool = True) -> None:
        if not isinstance(controller, Controller):
            raise TypeError(
                f"expected a feather_param Controller, got {type(controller).__name__}; "
                "pass what feather_param.sparsify(model, ...) returned"
            )
        self.controller, self._save_sparse, self._desparsify = controller, save_sparse, desparsify
        self._final_rate: float = controller.state_dict()["final_rate"]
        self._completed = -1  # step of the last checkpoint that got the pruned weights

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Refuse a model that the controller does not control."""
        self._require(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Check model and number of steps, and go to the step at which the training starts."""
        if args.fsdp or args.deepspeed:
            raise ValueError(
                "expected a model that is not sharded, got fsdp or deepspeed in the TrainingArguments; use DDP, or "
                "train with FSDP2 in your own loop"
            )
        if self._save_sparse and hasattr(model, "peft_config"):
            raise ValueError(
                "expected a model that is saved as a whole, got one with adapters of peft, of which the Trainer saves "
                "only these; pass save_sparse=False"
            )
        self._require(model)
        if not is_sparsified(model):
            raise RuntimeError(
                "expected a sparsified model, got a plain one: it was desparsified, as this callback does at the end "
                "of train(); to train again, call sparsify again, or pass desparsify=False"
            )
        settings = self.controller.state_dict()
        if settings["total_steps"] != state.max_steps:
            warn(
                f"expected sparsify(total_steps={state.max_steps}), the updates of this training, got total_steps="
                f"{settings['total_steps']}: the full rate is reached at step {settings['end_step']}"
            )
        if settings["step_count"] != state.global_step:
            self.controller.load_state_dict({**settings, "step_count": state.global_step})
        self._completed = -1
        if self._save_sparse and args.should_save:
            _remove_unfinished(args)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Advance the schedule. At the full rate, forget the best model before it."""
        before = self.controller.rate
        self.controller.step()
        if before < self._final_rate <= self.controller.rate:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, optimizer: Any, **_: Any
    ) -> None:
        """Save a schedule-free optimizer's averaged weights."""
        if control.should_save:
            _use_averages(optimizer)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, optimizer: Any, **_: Any
    ) -> None:
        """Save a schedule-free optimizer's averaged weights, and end with them. The last epoch ends here, too."""
        _use_averages(optimizer)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, logs: dict[str, Any], **_: Any
    ) -> None:
        """Add rate and threshold to the logs of the training loss.

        Those of an evaluation do not get them: each of their entries becomes a column of the Trainer's model card.
        """
        if "loss" in logs:
            found = {"feather/rate": self.controller.rate, "feather/threshold": float(self.controller.threshold)}
            logs.update(found)
            state.log_history[-1].update(found)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **kwargs: Any
    ) -> None:
        """Add the plain, pruned model to the checkpoint."""
        self._complete_checkpoint(args, state, model, kwargs.get("processing_class"))

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **kwargs: Any
    ) -> None:
        """Do the same before the Trainer pushes a checkpoint to the Hub, which is before `on_save`."""
        if args.push_to_hub and is_sparsified(model) and os.path.isdir(_checkpoint(args, state)):
            self._complete_checkpoint(args, state, model, kwargs.get("processing_class"))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Name a best model with fewer zeros, and make the model plain. The Trainer has loaded the best model."""
        if self.controller.step_count < state.global_step and self.controller.rate < self._final_rate:
            warn(
                f"the best model, {state.best_model_checkpoint}, is from step {self.controller.step_count}, before the "
                f"full rate: it has a rate of {self.controller.rate:.1%}, and final_rate is {self._final_rate:.1%}; "
                "train to the full rate and evaluate after it"
            )
        if self._desparsify:
            self.controller.desparsify()

    def _complete_checkpoint(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, processing_class: Any
    ) -> None:
        if not (self._save_sparse and args.should_save) or self._completed == state.global_step:
            return
        checkpoint, plain = _checkpoint(args, state), baked_state_dict(model)
        _add_weights(model, plain, checkpoint, args)
        new = os.path.join(checkpoint, _SPARSE)
        _save(model, plain, new, args)  # it empties the dict
        if processing_class is not None:
            processing_class.save_pretrained(new)
        report, step = self.controller.report(), self.controller.step_count
        card = _CARD.format(zeros=report.zeros, total=report.total, rate=report.rate, step=step, report=report)
        with open(os.path.join(new, "README.md"), "w", encoding="utf-8") as file:
            file.write(card)
        sparse = os.path.join(checkpoint, "sparse")
        shutil.rmtree(sparse, ignore_errors=True)
        os.replace(new, sparse)
        self._completed = state.global_step

    def _require(self, model: nn.Module) -> None:
        if not any(module is self.controller.model for module in model.modules()):
            raise ValueError(
                f"expected the model that the controller was made for, a {type(self.controller.model).__name__}, got "
                f"another {type(model).__name__}; pass the Trainer the model that sparsify got, with model= and not "
                "with model_init=, which makes a new one (hyperparameter_search needs it and is not supported)"
            )


def _checkpoint(args: TrainingArguments, state: TrainerState) -> str:
    return os.path.join(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _use_averages(optimizer: Any) -> None:
    """Put a schedule-free optimizer into its evaluation mode. The Trainer undoes this before each training step."""
    if callable(getattr(optimizer, "eval", None)):
        optimizer.eval()


def _remove_unfinished(args: TrainingArguments) -> None:
    """Remove the folders that a killed training left in its checkpoints."""
    checkpoints = os.path.join(glob.escape(str(args.output_dir)), f"{PREFIX_CHECKPOINT_DIR}-*")
    for name in (_WEIGHTS, _SPARSE):
        for folder in glob.glob(os.path.join(checkpoints, name)):
            shutil.rmtree(folder, ignore_errors=True)


def _add_weights(model: nn.Module, plain: dict[str, Tensor], checkpoint: str, args: TrainingArguments) -> None:
    """Add plain weights to those of a checkpoint. An interruption leaves the old weights or the new ones.

    The new weights are one file, since several could not be replaced at once. Where there is one file, transformers
    reads no others. So those of a checkpoint that was divided are removed last.
    """
    whole = os.path.join(checkpoint, _WEIGHTS)
    # Parameters of other parametrizations (weight norm) have one name in both. A resume needs the dense ones.
    _save(model, {**plain, **model.state_dict()}, whole, args, max_shard_size="1000000GB")
    for name in os.listdir(whole):
        os.replace(os.path.join(whole, name), os.path.join(checkpoint, name))
    os.rmdir(whole)
    for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        with suppress(FileNotFoundError):
            with open(index := os.path.join(checkpoint, name), encoding="utf-8") as file:
                parts = set(json.load(file)["weight_map"].values())
            for each in (index, *(os.path.join(checkpoint, part) for part in parts)):
                os.remove(each)


def _save(model: nn.Module, state: dict[str, Tensor], folder: str, args: TrainingArguments, **options: Any) -> None:
    """Write a state_dict of the model as the Trainer writes models."""
    save_pretrained = getattr(model, "save_pretrained", None)
    if save_pretrained is None:
        os.makedirs(folder, exist_ok=True)
        save_file(state, os.path.join(folder, SAFE_WEIGHTS_NAME), metadata={"format": "pt"})
        return
    if (safe := getattr(args, "save_safetensors", None)) is not None:  # an option of transformers 4
        options["safe_serialization"] = safe
    save_pretrained(folder, state_dict=state, **options)
