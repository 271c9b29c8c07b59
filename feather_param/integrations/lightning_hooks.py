"""The hooks of the callbacks for ``lightning.pytorch`` and ``pytorch_lightning``, which hold the same code.

This module imports neither, so classes of Lightning are known by their names.

Note [The order of hooks in fit]

* ``setup`` of the callbacks, in their order. Here the module is sparsified, so that DDP, the optimizers and the copies
  of averaging callbacks are made of the sparsified module. Averaging callbacks before ours copy it again.
* ``setup`` of the LightningModule. Layers that are built there come too late, and a warning says so.
* ``configure_model``. We call it in our ``setup`` already. Lightning asks that a second call changes nothing.
* The checkpoint to resume is loaded into the module, then ``on_load_checkpoint``.
* DDP and the optimizers are made, then ``on_fit_start``. Here the controller starts to follow the optimizer.
* The states of the optimizers are loaded.
* After the training, WeightAveraging writes its average into the module in ``on_train_end``, and ModelCheckpoint may
  save. So the module is made plain in ``on_fit_end``, which comes after both.
"""

from __future__ import annotations

import difflib
import inspect
import math
from typing import Any

import torch
from torch import nn

import feather_param
from feather_param import Controller
from feather_param.integrations.lightning_checkpoints import KEY, Pruned, SparseCheckpoints
from feather_param.parametrizations import is_sparsified
from feather_param.utils.checks import integer
from feather_param.utils.text import listed
from feather_param.utils.warn import warn

_SHARDING = {"DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy", "XLAFSDPStrategy"}
_AVERAGING = {"StochasticWeightAveraging", "WeightAveraging"}
# Arguments of `sparsify` that the callback gives itself, with the reason.
_GIVEN = {
    "model": "the callback prunes the LightningModule; pass module= for a part of it",
    "optimizer": "the callback follows the optimizer of configure_optimizers",
}


class FeatherHooks:
    """The methods of ``feather_param.integrations.lightning.FeatherCallback``, which describes the arguments."""

    def __init__(
        self,
        final_rate: float,
        *,
        module: str | None = None,
        total_steps: int | None = None,
        desparsify: bool = True,
        log: bool = True,
        **sparsify: Any,
    ) -> None:
        super().__init__()
        if module is not None and not (isinstance(module, str) and module):
            raise TypeError(f"expected module to be the name of a submodule or None, got {module!r}")
        for name, value in (("desparsify", desparsify), ("log", log)):
            if not isinstance(value, bool):
                raise TypeError(f"expected {name} to be True or False, got {value!r}")
        _require_arguments_of_sparsify(sparsify)
        self._total_steps = None if total_steps is None else integer("total_steps", total_steps, 1)
        self._settings = {"final_rate": final_rate, **sparsify}
        self._name, self._desparsify, self._log = module or "", desparsify, log
        self.controller: Controller | None = None
        self._module: nn.Module | None = None  # the one that was sparsified last
        self._files: SparseCheckpoints | None = None
        self._parameters: set[int] = set()  # the ids of those in setup
        self._batches: float | None = None  # batches in an epoch, if the number of steps was computed from it

    # -- before the training ----------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Sparsify the module, and let checkpoints be plain and sparse."""
        if stage != "fit":
            if self._files is not None:  # the module may still be sparsified, and a checkpoint be loaded into it
                self._files_of(trainer)
            return
        _require_whole_weights(trainer)
        with trainer.init_module():
            pl_module.configure_model()
        module = self._find(pl_module)
        self._files_of(trainer)  # also if an earlier Trainer, which was interrupted, has sparsified the module
        if self.controller is None or module is not self._module:
            self._sparsify(trainer, module)
        self._parameters = {id(parameter) for parameter in module.parameters()}
        position = trainer.callbacks.index(self)
        for callback in _averaging(trainer.callbacks[:position]):
            callback.setup(trainer, pl_module, stage)  # it copied the plain module

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint to resume has the settings of this callback, and go to its step."""
        if self.controller is None or trainer.state.fn != "fit":
            return
        entries = checkpoint.get(KEY, {})
        if self._name not in entries:
            found = f"one of module {listed([repr(name or None) for name in entries])}" if entries else "a dense one"
            raise ValueError(
                f"expected a checkpoint that FeatherCallback(module={self._name or None!r}) saved, got {found}; to "
                "start from its weights, pass the path to load_from_checkpoint of the LightningModule, and call fit "
                "without ckpt_path"
            )
        entry = entries[self._name]
        try:
            self.controller.load_state_dict(entry["controller"])
        except ValueError as error:
            total = entry["controller"].get("total_steps")
            hint = (
                f": FeatherCallback(..., total_steps={total})"
                if total != self.controller.state_dict()["total_steps"]
                else ""
            )
            raise ValueError(f"{error}{hint}") from error
        self._files_of(trainer).rates.update(entry["rates"])
        if checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader"):
            # The Trainer loads the state of a resumable loader when it makes the loader. `_estimate` was too early.
            trainer.fit_loop._combined_loader = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Follow the last optimizer that holds a pruned weight."""
        assert self.controller is not None
        assert self._module is not None
        self._warn_of_new_layers(self._module)
        refused: Exception = ValueError("expected configure_optimizers to return an optimizer, got none")
        for optimizer in reversed(trainer.optimizers):
            try:
                self.controller.follow(optimizer)
                return
            except ValueError as error:
                refused = error
        raise refused

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse another number of batches than in setup."""
        if self._batches is not None and trainer.num_training_batches != self._batches:
            raise RuntimeError(
                f"expected {self._batches:g} batches in an epoch as in setup, got {trainer.num_training_batches:g}: "
                "another callback (BatchSizeFinder) has changed the batch size since; pass total_steps= to "
                "FeatherCallback, or call Tuner(trainer).scale_batch_size(module) before fit"
            )

    # -- during the training ----------------------------------------------------------------------------------------

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Compute the thresholds of the weights that are validated.

        WeightAveraging swaps the weights, which a compiled module does not notice.
        """
        if self.controller is not None and not batch_idx and not dataloader_idx and trainer.state.fn == "fit":
            self.controller.refresh()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log rate and threshold. Tensors are logged, since a number would be moved to the GPU, which waits for it."""
        if self.controller is None or not self._log or trainer.barebones:
            return
        values = {"rate": torch.tensor(self.controller.rate), "threshold": self.controller.threshold}
        prefix = f"feather/{self._name}/" if self._name else "feather/"
        scalars = {prefix + key: value for key, value in values.items()}
        pl_module.log_dict(scalars, on_step=True, on_epoch=False, logger=bool(trainer.loggers))

    # -- after the training -----------------------------------------------------------------------------------------

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Make the module plain and sparse."""
        if self.controller is None:
            return
        if trainer.is_global_zero and not trainer.fast_dev_run:
            self._warn_of_fewer_zeros(trainer)
        if not self._desparsify:
            self.controller.refresh()  # an average may have been written into the module
            return
        copies = [value for callback in _averaging(trainer.callbacks) for value in vars(callback).values()]
        for copy in copies:
            if isinstance(copy, nn.Module) and is_sparsified(copy) and copy is not pl_module:
                feather_param.desparsify(copy)
        self._make_plain(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Undo `sparsify` if no step was made: a Tuner ends ``fit`` before it begins to train."""
        if self.controller is not None and stage == "fit" and not self.controller.step_count:
            self.controller.detach()
            self._forget(trainer, None)

    # -- helpers ----------------------------------------------------------------------------------------------------

    def _find(self, pl_module: nn.Module) -> nn.Module:
        """Return the module to prune."""
        modules = dict(pl_module.named_modules())
        if self._name not in modules:
            close = difflib.get_close_matches(self._name, list(filter(None, modules)), 3, 0.0)
            raise ValueError(
                f"expected module= to name a submodule of {type(pl_module).__name__}, got {self._name!r}; "
                f"the closest names are {listed(close) or 'none, it has no submodules'}"
            )
        return modules[self._name]

    def _sparsify(self, trainer: Any, module: nn.Module) -> None:
        """Sparsify a module. If the Trainer has trained it before, go on at the step where that ended."""
        files = self._files_of(trainer)
        again = files.finished if module is self._module and trainer.global_step else None
        self._batches = None
        total = self._total_steps or (again["total_steps"] if again else self._estimate(trainer))
        self.controller = feather_param.sparsify(module, total_steps=total, **self._settings)
        if again:
            self.controller.load_state_dict(again)
        self._module = module
        files.pruned, files.finished = Pruned(self._name, module, self.controller), None

    def _estimate(self, trainer: Any) -> int:
        """Return the number of steps that the Trainer will do."""
        try:
            steps = trainer.estimated_stepping_batches
        except Exception as error:
            raise RuntimeError(
                f"expected the Trainer to know its number of steps when fit begins, got {type(error).__name__}: {error}"
                "; pass total_steps= to FeatherCallback, or build the data before LightningModule.setup: in __init__, "
                "prepare_data or a LightningDataModule"
            ) from error
        if not 1 <= steps < math.inf:
            raise ValueError(
                f"expected the Trainer to know its number of steps, got {steps} (max_epochs=-1, or a loader without "
                "a length); pass total_steps= to FeatherCallback, or max_steps= to the Trainer"
            )
        batches = trainer.num_training_batches
        self._batches = batches if batches < math.inf else None
        return int(steps)

    def _files_of(self, trainer: Any) -> SparseCheckpoints:
        """Return our reader and writer of the Trainer's checkpoints. Put it before the one in use, if it is new."""
        inner = trainer.strategy.checkpoint_io
        while isinstance(inner, SparseCheckpoints):
            if inner is self._files:
                return inner
            inner = inner.inner
        new, old = SparseCheckpoints(trainer.strategy.checkpoint_io, self._name), self._files
        if old is not None:
            new.pruned, new.finished = old.pruned, old.finished
        self._files = trainer.strategy.checkpoint_io = new
        return new

    def _warn_of_new_layers(self, module: nn.Module) -> None:
        named = [*module.named_parameters()]
        new = [name for name, each in named if id(each) not in self._parameters and each.dim() > 1]
        if new:
            warn(
                f"expected all layers when FeatherCallback was set up, got {listed(new)} later: they stay dense; build "
                "layers in __init__ or configure_model, not in LightningModule.setup"
            )

    def _warn_of_fewer_zeros(self, trainer: Any) -> None:
        """Warn if the training, or the best checkpoint, ended before the full rate."""
        assert self.controller is not None
        assert self._files is not None
        state, rate = self.controller.state_dict(), self.controller.rate
        final = state["final_rate"]
        if rate < final and state["frozen_step"] is None:
            warn(
                f"expected the training to reach step {state['end_step']}, where the rate is {final}, got step "
                f"{state['step_count']} with rate {rate:.4f}: pass total_steps= to FeatherCallback, the number of "
                "steps before the training stops (EarlyStopping, max_time), or a smaller end_step="
            )
            return
        for callback in trainer.checkpoint_callbacks:
            best = str(getattr(callback, "best_model_path", ""))
            found = self._files.rates.get(best, rate)
            if getattr(callback, "monitor", None) is not None and found < rate:
                warn(
                    f"expected the best checkpoint to have the rate {rate}, got {best}, saved at rate {found:.4f}: "
                    "it has fewer zeros than the last one; reach the full rate earlier, with a smaller end_step=, or "
                    "use the last checkpoint"
                )

    def _make_plain(self, trainer: Any) -> None:
        """Bake the exact zeros, also if the training has stopped early."""
        assert self.controller is not None
        assert self._module is not None
        state = self.controller.state_dict()
        if not self.controller.rate:
            self.controller.detach()
        else:
            if state["frozen_step"] is None and self.controller.rate < state["final_rate"]:
                self.controller.freeze()  # `_warn_of_fewer_zeros` has said it
            feather_param.desparsify(self._module)
        self._forget(trainer, state)

    def _forget(self, trainer: Any, finished: dict[str, Any] | None) -> None:
        files = self._files_of(trainer)
        self.controller, files.pruned, files.finished = None, None, finished


def _require_arguments_of_sparsify(arguments: dict[str, Any]) -> None:
    known = [name for name in inspect.signature(feather_param.sparsify).parameters if name not in _GIVEN]
    for name in arguments:
        if name in _GIVEN:
            raise TypeError(f"expected no {name}=: {_GIVEN[name]}")
        if name not in known:
            close = difflib.get_close_matches(name, [*known, "module", "desparsify", "log"], 1, 0.0)
            raise TypeError(f"expected an argument of feather_param.sparsify, got {name}=; the closest is {close[0]}=")


def _require_whole_weights(trainer: Any) -> None:
    if found := _SHARDING & _class_names(trainer.strategy):
        raise ValueError(
            f"expected a strategy that keeps the weights whole (one device, DDP), got {min(found)}, which shards them; "
            "with FSDP2, leave this callback out, and call feather_param.sparsify in configure_model before "
            "fully_shard and controller.follow(optimizer) in configure_optimizers"
        )


def _averaging(callbacks: list[Any]) -> list[Any]:
    """Return the callbacks that hold an average of the module."""
    return [callback for callback in callbacks if _AVERAGING & _class_names(callback)]


def _class_names(value: Any) -> set[str]:
    return {cls.__name__ for cls in type(value).__mro__}
