"""LoRA adapters of peft that keep the zeros of the weights that they are added to."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from feather_param.utils.extras import imports

with imports("peft"):
    from peft import LoraConfig
    from peft.tuners.lora import Linear

__all__ = ["SparseLora", "keep_zeros"]

_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")  # the others of peft write to the base weights


class SparseLora(Linear):
    """An adapter of a sparse Linear layer, which computes ``W + M * (B A)`` with the mask ``M`` of ``W``.

    The change of the weight is masked in each forward pass, so a merge changes neither the outputs nor the zeros. This
    is SparsePEFT of SQFT (https://arxiv.org/abs/2410.03750). A forward pass computes the product ``B A``, which has the
    size of the weight. Made by peft for a configuration that `keep_zeros` returned.
    """

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, as peft does.

        Raises:
            TypeError: the layer is not Linear, or is quantised.
            ValueError: the adapter is no plain LoRA (DoRA, for example).
        """
        layer = self.get_base_layer()
        if not isinstance(layer, nn.Linear) or not layer.weight.dtype.is_floating_point:
            raise TypeError(
                f"expected target_modules to name Linear layers with floating point weights, got {type(layer).__name__}"
                "; leave it out, or use a LoraConfig without keep_zeros and never merge it"
            )
        super().update_layer(adapter_name, *args, **kwargs)
        if found := self.lora_variant.get(adapter_name):
            raise ValueError(f"expected plain LoRA, got {type(found).__name__}, which cannot be masked")

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the change of the weight by an adapter. It is zero where the weight is."""
        return super().get_delta_weight(adapter) * (self.weight.detach() != 0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the layer with its active adapters.

        Raises:
            ValueError: ``adapter_names`` asks for another adapter for each example.
        """
        if kwargs.get("adapter_names") is not None:
            raise ValueError("expected one adapter for the batch, got adapter_names; run one batch for each adapter")
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        output = self.base_layer(x, *args, **kwargs)
        total = output
        for name in self.active_adapters:
            if name in self.lora_A:
                change, bias = self.get_delta_weight(name), self.lora_B[name].bias
                inputs = self.lora_dropout[name](self._cast_input_dtype(x, change.dtype))
                total = total + F.linear(inputs, change, None if bias is None else bias * self.scaling[name])
        return total.to(output.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weight, as peft does. The zeros stay.

        Raises:
            RuntimeError: the layer is sparsified. A merge would write to a temporary tensor, and be lost.
        """
        if parametrize.is_parametrized(self.get_base_layer(), "weight"):
            raise RuntimeError(
                "expected a plain layer to merge adapters into, got a sparsified one; "
                "call feather_param.desparsify(model) first"
            )
        super().merge(safe_merge, adapter_names)


def keep_zeros(config: LoraConfig) -> LoraConfig:
    """Let the adapters of a configuration keep the zeros of the weights, in training and after a merge.

    An adapter of peft is dense, so a merge fills the zeros. With this function each adapter is a `SparseLora`.
    peft does not save this in a file: call the function again for a configuration that was loaded.

    Args:
        config: the configuration. It is changed.

    Returns:
        The same configuration.

    Raises:
        ValueError: the configuration would change the base weights, or names Parameters instead of layers.

    Example:
        >>> from peft import get_peft_model
        >>> base = nn.Sequential(nn.Linear(8, 8))
        >>> controller = feather_param.sparsify(base, final_rate=0.75, total_steps=1, end_step=0)
        >>> feather_param.desparsify(base)
        >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> model = get_peft_model(base, keep_zeros(config)).merge_and_unload()
        >>> int((model[0].weight == 0).sum())
        48
    """
    if config.init_lora_weights not in _INITIALISATIONS:
        raise ValueError(
            f"expected init_lora_weights to be one of {_INITIALISATIONS}, got {config.init_lora_weights!r}, "
            "which may change the base weights and their zeros"
        )
    if getattr(config, "target_parameters", None):
        raise ValueError("expected target_modules, got target_parameters; name the Linear layers")
    config._register_custom_module({nn.Module: SparseLora})  # all modules, so that it refuses those it cannot mask
    return config
