"""A callback for the Trainer of ``pytorch_lightning``; `integrations.lightning` says why there are two."""

from __future__ import annotations

from feather_param.integrations.lightning_hooks import FeatherHooks
from feather_param.utils.extras import imports

with imports("pytorch-lightning"):
    from pytorch_lightning.callbacks import Callback

__all__ = ["FeatherCallback"]


class FeatherCallback(FeatherHooks, Callback):
    """Train a LightningModule to an exact sparsity, as ``feather_param.integrations.lightning.FeatherCallback``.

    Example:
        >>> from feather_param.integrations.pytorch_lightning import FeatherCallback
        >>> callback = FeatherCallback(0.9, exclude="head")
    """
