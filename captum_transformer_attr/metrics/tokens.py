"""Removing tokens: truly, so that the sequence becomes shorter, or by a mask token in their place."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.metrics._inputs import Inputs, check_tensor, checked, whole_number
from captum_transformer_attr.metrics.removal import RemovableUnits, Removal

TOKEN_FRACTIONS = (0.0, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
"""Steps of Chefer et al., ICCV 2021, for the regions and the question tokens of VQA."""


class TokenRemoval(Removal):
    """Removes tokens of a sequence: word pieces, or the regions of an image.

    Args:
        mode: `"delete"` takes tokens out and closes the gap, as the ICCV 2021 protocol does: what remains keeps its
            order, is padded to the longest remainder, and the attention mask follows. `"mask"` puts `mask_token` there.
        tokens: the entry of `inputs` that holds the sequence, ids (N, T) or features (N, T, D). Inputs that are
            a plain tensor of ids are taken as this entry.
        mask_token: id of the mask token, needed by `mode="mask"`; feature sequences are masked by zeros.
        keep: ids that are never removed ([CLS], [SEP], ...). An entry `special_tokens_mask` (N, T), as tokenizers
            return it, protects its tokens too; it is not handed on to the model.
        attention_mask: the entry with 1 for real tokens. Padding is never counted nor removed. `None` for a model
            without one: every example must then keep the same number of tokens.
        along: further entries with one value per token, cut together with the sequence.
        pad_token: id put behind the remainder.
        padding_side: `"left"` for language models that read their last position.

    Note:
        What remains moves together, as in a sequence that never had the removed tokens; an entry `position_ids` is
        counted anew from 0. Where nothing at all remains, the model reads one pad token.
    """

    fractions = TOKEN_FRACTIONS

    def __init__(
        self,
        mode: Literal["delete", "mask"] = "delete",
        *,
        tokens: str = "input_ids",
        mask_token: int | None = None,
        keep: Collection[int] = (),
        attention_mask: str | None = "attention_mask",
        along: Collection[str] = ("token_type_ids",),
        pad_token: int = 0,
        padding_side: Literal["right", "left"] = "right",
    ) -> None:
        if mode not in ("delete", "mask"):
            raise InputError(f'mode must be "delete" or "mask", got "{mode}"')
        if padding_side not in ("right", "left"):
            raise InputError(f'padding_side must be "right" or "left", got "{padding_side}"')
        self.mode = mode
        self.tokens = tokens
        self.mask_token = None if mask_token is None else whole_number(mask_token, "mask_token (a token id)")
        if isinstance(keep, str) or not isinstance(keep, Iterable):
            raise InputError(f"keep must be a collection of token ids, got {keep!r}")
        self.keep = tuple(whole_number(token, "keep (token ids)") for token in keep)
        self.attention_mask = attention_mask
        if isinstance(along, str) or not isinstance(along, Iterable):
            raise InputError(f"along must be a collection of names of entries, got {along!r}")
        self.along = tuple(along)
        self.pad_token = whole_number(pad_token, "pad_token (a token id)")
        self.padding_side = padding_side

    def prepare(self, inputs: Inputs, attributions: object) -> RemovableTokens:
        if isinstance(inputs, tuple):
            raise InputError("give sequences as a tensor or a mapping, a tuple does not say which entry is the mask")
        if not isinstance(inputs, (Tensor, Mapping)):
            raise InputError(f"inputs must be a tensor or a mapping, got {type(inputs).__name__}")
        entries = {self.tokens: inputs} if isinstance(inputs, Tensor) else dict(inputs)
        special = entries.pop("special_tokens_mask", None)
        sequence = entries.get(self.tokens)
        if not isinstance(sequence, Tensor) or sequence.ndim < 2:
            raise InputError(f"inputs must hold a sequence (N, T) or (N, T, D) as {self.tokens!r}")
        if special is not None:
            _check_per_token(special, "special_tokens_mask", sequence, exactly=True)
        if self.attention_mask in entries:
            _check_per_token(entries[self.attention_mask], self.attention_mask, sequence, exactly=True)
        for name in self.along if self.mode == "delete" else ():
            if name in entries:
                _check_per_token(entries[name], name, sequence, exactly=False)
        if self.mode == "mask" and self.mask_token is None and not sequence.is_floating_point():
            raise InputError('mode="mask" needs mask_token, the id of the mask token')
        scores = attributions.get(self.tokens) if isinstance(attributions, Mapping) else attributions
        if not isinstance(scores, Tensor) or scores.shape[:2] != sequence.shape[:2]:
            raise InputError(f"attributions must be (N, T) = {tuple(sequence.shape[:2])} for the entry {self.tokens!r}")
        scores = checked(scores).to(sequence.device).flatten(2).sum(-1) if scores.ndim > 2 else checked(scores)
        attended = torch.ones(sequence.shape[:2], dtype=torch.bool, device=sequence.device)
        if self.attention_mask is not None and self.attention_mask in entries:
            attended = entries[self.attention_mask].bool()
        removable = attended if special is None else attended & ~special.to(sequence.device).bool()
        if self.keep and not sequence.is_floating_point():
            removable = removable & ~torch.isin(sequence, torch.tensor(self.keep, device=sequence.device))
        plain = isinstance(inputs, Tensor)
        return RemovableTokens(scores.to(sequence.device), removable, attended, entries, self, plain)


class RemovableTokens(RemovableUnits):
    """Sequences with one unit per token."""

    def __init__(
        self,
        scores: Tensor,
        removable: Tensor,
        attended: Tensor,
        entries: dict[str, Tensor],
        removal: TokenRemoval,
        plain: bool,
    ) -> None:
        super().__init__(scores, removable)
        self.attended = attended
        self.entries = entries
        self.removal = removal
        self.plain = plain

    def count(self, fraction: float) -> Tensor:
        # The published code keeps int((1 - fraction) * tokens); the tiny addition undoes the rounding of 1 - fraction.
        tokens = self.removable.sum(1)
        return tokens - ((1 - fraction) * tokens + 1e-9).long()

    def remove(self, removed: Tensor) -> Inputs:
        removed = removed & self.removable
        return self._masked(removed) if self.removal.mode == "mask" else self._deleted(removed)

    def _masked(self, removed: Tensor) -> Inputs:
        sequence = self.entries[self.removal.tokens]
        where = removed.view(*removed.shape, *[1] * (sequence.ndim - 2))
        changed = sequence.masked_fill(where, self.removal.mask_token or 0)
        return changed if self.plain else {**self.entries, self.removal.tokens: changed}

    def _deleted(self, removed: Tensor) -> Inputs:
        kept = self.attended & ~removed
        remaining = kept.sum(1)
        # A model cannot read an empty sequence: where nothing remains, one pad token is read instead.
        lengths = remaining.clamp(min=1)
        length = int(lengths.max())
        if (lengths < length).any() and (self.plain or self.removal.attention_mask is None):
            raise InputError(
                "examples of different lengths remain: give inputs as a mapping and the name of its attention_mask, "
                "or one example at a time"
            )
        # A stable sort by "is gone" moves what remains to the front in its own order.
        order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :length]
        place = torch.arange(length, device=kept.device).expand(len(kept), length)
        if self.removal.padding_side == "left":
            place = place - (length - lengths)[:, None]
            order = order.gather(1, place % length)
        present = (place >= 0) & (place < remaining[:, None])
        attended = (place >= 0) & (place < lengths[:, None])
        result = dict(self.entries)
        for name in (self.removal.tokens, *self.removal.along):
            if name in result:
                filler = self.removal.pad_token if name == self.removal.tokens else 0
                result[name] = _gathered(result[name], order, present, filler)
        if self.plain:
            return result[self.removal.tokens]
        if "position_ids" in result:
            check_tensor(result["position_ids"], "position_ids")
            result["position_ids"] = place.clamp(min=0).to(result["position_ids"])
        if self.removal.attention_mask is not None:
            mask = self.entries.get(self.removal.attention_mask)
            result[self.removal.attention_mask] = attended.to(torch.long if mask is None else mask.dtype)
        return result


def _check_per_token(values: object, name: object, sequence: Tensor, *, exactly: bool) -> None:
    """Refuses an entry that does not hold one value (or, unless `exactly`, several) for each token."""
    tokens = sequence.shape[:2]
    fits = isinstance(values, Tensor) and (values.shape if exactly else values.shape[:2]) == tokens
    if not fits:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"inputs must hold a value for each of the {tuple(tokens)} tokens as {name!r}, got {got}")


def _gathered(values: Tensor, order: Tensor, present: Tensor, filler: int) -> Tensor:
    trailing = [1] * (values.ndim - 2)
    index = order.view(*order.shape, *trailing).expand(*order.shape, *values.shape[2:])
    return values.gather(1, index).masked_fill(~present.view(*present.shape, *trailing), filler)
