"""Inputs and weights of the tiny transformers models that ``coverage.py`` and the tests run the engine on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
Case = tuple[str, str, Callable[[], nn.Module], Callable[[], Inputs], Any]

VOCABULARY, LONG, SHORT = 64, 9, 6  # ids 4 … 63 are words; lengths of the two texts of a batch
EOS = 3


def redrawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 and evaluation mode with every parameter drawn anew.

    Matrices by their fan-in, norms around 1, biases around 0.
    """
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim <= 1:
                centre = 0.0 if name.endswith("bias") else parameter.mean()
                parameter.copy_(centre + 0.2 * noise)
            elif "embed" in name or "token" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model


def texts(seed: int = 0, pad: int = 0) -> Inputs:
    """Two texts of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY - 4, (2, LONG), generator=generator)
    mask = torch.ones(2, LONG, dtype=torch.long)
    ids[1, SHORT:], mask[1, SHORT:] = pad, 0
    return {"input_ids": ids, "attention_mask": mask}


def pixels(size: int = 16, frames: int | None = None, name: str = "pixel_values") -> Inputs:
    """Two images (or clips)."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, size, size) if frames is None else (2, frames, 3, size, size)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64)}


def waves(length: int = 400) -> Inputs:
    """Two recordings, the second one shorter."""
    generator = torch.Generator().manual_seed(2)
    return {"input_values": torch.randn((2, length), generator=generator, dtype=torch.float64)}


def spectra(bins: int, frames: int, name: str = "input_features") -> Inputs:
    """Two spectrograms."""
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn((2, bins, frames), generator=generator, dtype=torch.float64)}


def masked_pixels() -> Inputs:
    """Images, and the noise that decides which patches an autoencoder hides."""
    generator = torch.Generator().manual_seed(4)
    return {**pixels(), "noise": torch.rand((2, 16), generator=generator, dtype=torch.float64)}


def padded_waves() -> Inputs:
    """Two recordings of different lengths."""
    mask = torch.ones(2, 400, dtype=torch.long)
    mask[1, 300:] = 0
    return {"input_values": waves()["input_values"] * mask, "attention_mask": mask}


def long_waves() -> Inputs:
    """Two recordings and what is said in them."""
    return {"input_values": waves(4000)["input_values"], "decoder_input_ids": texts(5)["input_ids"][:, :5]}


def spectrograms() -> Inputs:
    """Two spectrograms as images of one channel."""
    return {"input_features": spectra(32, 8)["input_features"][:, None]}


def speech() -> Inputs:
    """Two spectrograms (bins, frames) and what is said in them."""
    return {**spectra(8, 12), "decoder_input_ids": texts(5)["input_ids"][:, :5]}


def speech_rows() -> Inputs:
    """Two spectrograms (frames, bins) and what is said in them."""
    return {**spectra(24, 8), "decoder_input_ids": texts(5)["input_ids"][:, :5]}


def dialogues() -> Inputs:
    """Two sources and two targets for an encoder-decoder."""
    decoder = texts(5)
    return {**texts(), "decoder_input_ids": decoder["input_ids"][:, :5]}
