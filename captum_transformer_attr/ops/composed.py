"""Functions that torch computes in one call, written as the operations they are made of."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_transformer_attr.recording.recorder import Recorder
from captum_transformer_attr.recording.registry import handles


@handles("mv")
def matrix_vector(recorder: Recorder, input: Tensor, vec: Tensor) -> Any:
    with recorder:
        return input @ vec


@handles("addmv")
def add_matrix_vector(
    recorder: Recorder, input: Tensor, mat: Tensor, vec: Tensor, *, beta: float = 1, alpha: float = 1
) -> Any:
    with recorder:
        product = mat @ vec if alpha == 1 else (mat @ vec) * alpha
        return product if beta == 0 else product + (input if beta == 1 else input * beta)


@handles("inner")
def inner(recorder: Recorder, input: Tensor, other: Tensor) -> Any:
    """Products of the last axes."""
    with recorder:
        if input.ndim == 0 or other.ndim == 0:
            return input * other
        if other.ndim <= 2:
            return input @ (other if other.ndim == 1 else other.T)
        return torch.tensordot(input, other, dims=([-1], [-1]))


@handles("linalg_multi_dot", "chain_matmul")
def chain(recorder: Recorder, *matrices: Any) -> Any:
    """A product of several matrices, from left to right."""
    with recorder:
        return functools.reduce(torch.matmul, matrices[0] if isinstance(matrices[0], (list, tuple)) else matrices)


@handles("bilinear")
def bilinear(recorder: Recorder, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    with recorder:
        y = torch.einsum("...i,oij,...j->...o", input1, weight, input2)
        return y if bias is None else y + bias


@handles("cosine_similarity")
def cosine_similarity(recorder: Recorder, x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Any:
    """The product of two vectors of length 1."""
    with recorder:
        return (F.normalize(x1, dim=dim, eps=eps) * F.normalize(x2, dim=dim, eps=eps)).sum(dim)


@handles("diff")
def differences(
    recorder: Recorder, input: Tensor, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None
) -> Any:
    """Every entry less the one before it."""
    with recorder:
        pieces = [t for t in (prepend, input, append) if t is not None]
        x = torch.cat(pieces, dim) if len(pieces) > 1 else input
        for _ in range(n):
            x = x.narrow(dim, 1, x.shape[dim] - 1) - x.narrow(dim, 0, x.shape[dim] - 1)
        return x
