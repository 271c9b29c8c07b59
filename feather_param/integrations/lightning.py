"""A callback for the Trainer of ``lightning.pytorch``.

A Trainer of ``lightning`` refuses callbacks of ``pytorch_lightning`` and the reverse, although both packages hold the
same code. So there are two classes, in two modules with the names of the packages. Both have the same methods, those of
`integrations.lightning_hooks`, and neither module imports the other package.
"""

from __future__ import annotations

from feather_param.integrations.lightning_hooks import FeatherHooks
from feather_param.utils.extras import imports

with imports("lightning"):
    from lightning.pytorch.callbacks import Callback

__all__ = ["FeatherCallback"]


class FeatherCallback(FeatherHooks, Callback):
    """Train a LightningModule to an exact sparsity.

    The callback sparsifies the module when ``fit`` begins, follows its optimizer, and makes the module plain and sparse
    when ``fit`` ends.

    * The number of steps is the Trainer's ``estimated_stepping_batches``, unless ``total_steps`` is given.
    * ``state_dict`` of each checkpoint is plain and sparse, so ``load_from_checkpoint`` and ``ckpt_path="best"`` work.
      ``fit(ckpt_path=...)`` resumes bit for bit from the other entry, ``"feather_param"``.
    * The logger gets ``feather/rate`` and ``feather/threshold``, with ``module="generator"``
      ``feather/generator/rate``.
    * Of several optimizers, it follows the last one that holds a pruned weight.

    With `pytorch_lightning`, import the class of the same name from ``feather_param.integrations.pytorch_lightning``.

    Args:
        final_rate: fraction of zeros among all prunable weights together, in (0, 1).
        module: name of the submodule to prune (``"backbone"``). None: the whole LightningModule. Several callbacks may
            each prune another submodule.
        total_steps: number of optimizer steps of the training, for the schedule. None: as many as the Trainer will do.
        desparsify: whether to call `feather_param.desparsify` when ``fit`` ends.
        log: whether to log rate and threshold.
        **sparsify: further arguments of `feather_param.sparsify` (``exclude``, ``end_step``, ``allocation``).

    Attributes:
        controller: the controller during ``fit``, for example to call ``controller.freeze()``. None before, and after
            unless ``desparsify`` is False.

    Raises:
        TypeError: an argument is of the wrong type, or ``sparsify`` has no such argument.
        ValueError: ``total_steps`` is below 1.

    Note:
        ``fit`` raises a ValueError if the number of steps is unknown, if there is no such module, if it is sparsified
        already, if the strategy shards the weights, or if the checkpoint to resume was saved without this callback or
        with other settings.

    Example:
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> from feather_param.integrations.lightning import FeatherCallback
        >>> class Net(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(4, 4)
        ...     def training_step(self, batch, batch_idx):
        ...         return self.layer(batch).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> net = Net()
        >>> trainer = Trainer(max_epochs=2, accelerator="cpu", callbacks=FeatherCallback(0.75), barebones=True)
        >>> trainer.fit(net, torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=2))
        >>> int((net.layer.weight == 0).sum())
        12
    """
