"""The two recipes of torchvision's reference script for ResNet-50, `references/classification/train.py`.

Each field has the name of the reference script's option. v1 trained the weights ``IMAGENET1K_V1`` (76.13 % top-1), and
v2 the weights ``IMAGENET1K_V2`` (80.86 %, https://github.com/pytorch/vision/issues/3995). The weights of v2 were also
trained with repeated augmentation (`--ra-sampler`), which is left out here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torchvision.transforms import InterpolationMode, v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)  # batch norm and instance norm are the first


@dataclass(frozen=True)
class Recipe:
    """Everything that a recipe sets. Learning rate and batch size belong together: both are for 8 processes."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    train_crop_size: int
    val_resize_size: int
    val_crop_size: int
    lr_scheduler: str = "steplr"
    lr_warmup_epochs: int = 0
    lr_warmup_decay: float = 0.01
    momentum: float = 0.9
    norm_weight_decay: float | None = None
    label_smoothing: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    trivial_augment: bool = False
    random_erase: float = 0.0
    model_ema: bool = False
    model_ema_decay: float = 0.99998
    model_ema_steps: int = 32

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.SGD:
        """Return the optimizer of a model. Build it after ``fully_shard``, which replaces the parameters."""
        found = {id(each) for module in model.modules() if isinstance(module, NORMS) for each in module.parameters()}
        norms = [parameter for parameter in model.parameters() if id(parameter) in found]
        others = [parameter for parameter in model.parameters() if id(parameter) not in found]
        decay = self.weight_decay if self.norm_weight_decay is None else self.norm_weight_decay
        groups = [{"params": others, "weight_decay": self.weight_decay}, {"params": norms, "weight_decay": decay}]
        return torch.optim.SGD(groups, lr=lr, momentum=self.momentum)

    def warmup_epochs(self, epochs: int) -> int:
        """Return the number of epochs with a growing learning rate: at most half of a short training."""
        return min(self.lr_warmup_epochs, epochs // 2)

    def lr_factor(self, epoch: int, epochs: int) -> float:
        """Return the factor of the learning rate in an epoch.

        ``steplr`` divides by 10 after each third of the training, which is every 30 of 90 epochs.
        ``cosineannealinglr`` grows linearly in the warm-up, and then follows a cosine to 0.
        """
        if self.lr_scheduler == "steplr":
            return 0.1 ** (3 * epoch // epochs)
        warmup = self.warmup_epochs(epochs)
        if epoch < warmup:
            return self.lr_warmup_decay + (1 - self.lr_warmup_decay) * epoch / warmup
        return (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup))) / 2

    def average(self, model: nn.Module, images_per_step: int, epochs: int) -> AveragedModel | None:
        """Return a moving average of a model and its batch norm statistics, or None if the recipe has none.

        The decay of an update is ``1 - (1 - model_ema_decay) * images_per_step * model_ema_steps / epochs``, as in the
        reference script. Call this after `sparsify` and before ``fully_shard``, which refuses to be copied.
        """
        if not self.model_ema:
            return None
        alpha = min(1.0, (1 - self.model_ema_decay) * images_per_step * self.model_ema_steps / epochs)
        # A `multi_avg_fn` would mix sharded parameters and whole buffers in one operation, which torch refuses.
        return AveragedModel(model, avg_fn=get_ema_avg_fn(1 - alpha), use_buffers=True)

    def update_average(self, average: AveragedModel, model: nn.Module, left: int, epoch: int, epochs: int) -> None:
        """Update the average at every `model_ema_steps`-th step of an epoch. In the warm-up, it is a plain copy.

        Steps are counted from the end of the epoch, so that the average then has the zeros of the model. The reference
        script counts them from the start, with as many updates.

        Args:
            average: what `average` returned.
            model: the model in training.
            left: number of steps that are left in this epoch.
            epoch: number of finished epochs.
            epochs: number of epochs.
        """
        if left % self.model_ema_steps == 0:
            average.update_parameters(model)
            if epoch < self.warmup_epochs(epochs):
                average.n_averaged.fill_(0)

    def train_transform(self, size: int) -> v2.Compose:
        """Return the augmentation of a training image, up to a normalised float tensor [3, size, size]."""
        bilinear = InterpolationMode.BILINEAR
        augment = [v2.TrivialAugmentWide(interpolation=bilinear)] if self.trivial_augment else []
        erase = [v2.RandomErasing(p=self.random_erase)] if self.random_erase else []
        crop = [v2.RandomResizedCrop(size, interpolation=bilinear), v2.RandomHorizontalFlip()]
        return v2.Compose([*crop, *augment, *_normalised(), *erase])

    def val_sizes(self, size: int) -> tuple[int, int]:
        """Return the sizes of a validation image, resized and cropped, for a training crop of this size."""
        scale = size / self.train_crop_size
        return round(scale * self.val_resize_size), round(scale * self.val_crop_size)

    def val_transform(self, size: int) -> v2.Compose:
        """Return the preparation of a validation image, for a training crop of this size."""
        resize, crop = self.val_sizes(size)
        return v2.Compose([v2.Resize(resize), v2.CenterCrop(crop), *_normalised()])

    def mix(self, images: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Mix the images of a batch and their labels, with mixup or cutmix at random.

        Returns:
            The images, and the probabilities of the classes [batch, classes]. If the recipe mixes nothing, the images
            and labels themselves.
        """
        kinds = ((v2.MixUp, self.mixup_alpha), (v2.CutMix, self.cutmix_alpha))
        mixers = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha]
        return v2.RandomChoice(mixers)(images, labels) if mixers else (images, labels)


def _normalised() -> list[v2.Transform]:
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]


RECIPES = {
    "v1": Recipe(
        epochs=90,
        batch_size=32,
        lr=0.1,
        weight_decay=1e-4,
        train_crop_size=224,
        val_resize_size=256,
        val_crop_size=224,
    ),
    "v2": Recipe(
        epochs=600,
        batch_size=128,
        lr=0.5,
        weight_decay=2e-5,
        train_crop_size=176,
        val_resize_size=232,
        val_crop_size=224,
        lr_scheduler="cosineannealinglr",
        lr_warmup_epochs=5,
        norm_weight_decay=0.0,
        label_smoothing=0.1,
        mixup_alpha=0.2,
        cutmix_alpha=1.0,
        trivial_augment=True,
        random_erase=0.1,
        model_ema=True,
    ),
}
