"""Image maps and word scores for every pair of some images and some texts, from a contrastive model (CLIP, SigLIP)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.methods.token_level import TokenAttribution
from captum_transformer_attr.recording.outputs import unwrap


@dataclass(frozen=True)
class PairScores:
    """What links every image with every text.

    Attributes:
        logits: ``(images, texts)``, the model's similarities.
        image: ``(images, texts, h, w)``, the patches of an image that speak for a text.
        text: ``(images, texts, T)``, the tokens of a text that speak for an image.
    """

    logits: Tensor
    image: Tensor
    text: Tensor


def explain_pairs(method: TokenAttribution, inputs: Mapping[str, Any], image: str = "pixel_values") -> PairScores:
    """Explain the similarity of every image with every text.

    One recorded forward serves all pairs; every backward pass explains as many of them as there are images or texts.

    Args:
        method: a token-level method around the model, such as ``AttentionRelevance(clip)``. ``start_layer=-1`` often
            gives the clearest CLIP maps, 0 is the paper's rule.
        inputs: the model's arguments; the images' entry has one row per image, the others one per text.
        image: name of the images' entry.

    Raises:
        InputError: if there are no images or texts, or the model does not return one number per image and text.
    """
    pixels, ids = inputs.get(image), inputs.get("input_ids")
    if not isinstance(pixels, Tensor) or not isinstance(ids, Tensor):
        raise InputError(f"inputs: explain_pairs needs '{image}' and 'input_ids'")
    images, texts = len(pixels), len(ids)
    if not images or not texts:
        raise InputError(f"inputs: {images} images and {texts} texts make no pair")
    # Repeated until both are equally many, row r can meet column r - k without any example being in two pairs at once.
    fewer = min(images, texts)
    rows = fewer * math.ceil(max(images, texts) / fewer)
    index = torch.arange(rows, device=pixels.device)
    given = {
        name: (value[index % images] if name == image else value[index % texts]) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    with torch.no_grad():
        logits = unwrap(method.forward_func(**given), method.output)
    if logits.shape != (rows, rows):
        raise InputError(
            f"the model returns shape {tuple(logits.shape)} for {rows} images and texts, not one number per pair"
        )
    columns = [(index - k) % rows for k in range(fewer)]
    found = method.attribute_tokens_each(given, [column.tolist() for column in columns])
    maps, words = found[0][image], found[0]["input_ids"]
    by_pair = torch.zeros(images, texts, *maps.shape[1:], dtype=maps.dtype, device=maps.device)
    by_word = torch.zeros(images, texts, *words.shape[1:], dtype=words.dtype, device=words.device)
    for column, scores in zip(columns, found, strict=True):
        pair = (index % images, column % texts)
        by_pair[pair] = scores[image]
        by_word[pair] = scores["input_ids"][column]
    return PairScores(logits[:images, :texts], by_pair, by_word)
