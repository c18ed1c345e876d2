"""LeGrad: Bousselham et al., LeGrad: An Explainability Method for Vision Transformers via Feature Formation
Sensitivity, ICCV 2025."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from captum_transformer_attr.errors import InputError
from captum_transformer_attr.flow.maps import Maps
from captum_transformer_attr.flow.padding import real_queries
from captum_transformer_attr.flow.rollout import Passed
from captum_transformer_attr.methods.layer_relevance import attentions_of, innermost
from captum_transformer_attr.methods.layer_sum import LayerSumAttribution, TrunkFlow
from captum_transformer_attr.methods.records import block_outputs
from captum_transformer_attr.methods.token_level import TokenAttribution
from captum_transformer_attr.ops.attention import Attention
from captum_transformer_attr.recording.modules import modules_of
from captum_transformer_attr.recording.nested import replaced, tensors_in
from captum_transformer_attr.recording.outputs import OutputChoice, unwrap
from captum_transformer_attr.recording.session import Recording
from captum_transformer_attr.recording.signal import gradient_signal
from captum_transformer_attr.recording.targets import select


class LeGrad(LayerSumAttribution):
    """Σ over layers of the positive part of ∂s^l/∂A^l, averaged over heads and queries.

    s^l is what the model would answer if its last block returned the output of block l: the rest of the model (final
    norm, pooling, head) reads every layer. Costs one plain forward per layer. The published code scales the result to
    0..1.

    Args:
        model: any module built on blocks of one width with softmax attention; used as it is and left as found.
        output: name or function that chooses the explained tensor of a structured output.
    """

    needs_gradient = False

    def __init__(self, model: nn.Module | Callable[..., Any], output: OutputChoice = None) -> None:
        TokenAttribution.__init__(self, model, 0, False, output)

    def roll_out(self, recording: Recording, maps: Maps, leaves: list[Tensor], watched: Any) -> tuple[Passed, Passed]:
        scores = self.sensitivities(recording, maps)
        signal = TrunkFlow(scores)
        signal.watched = watched
        starts = [recording.recorder.captured[node] for node in scores]
        arrived = recording.relay(signal, starts, [start.zeros() for start in starts], leaves)
        zeros = [torch.zeros_like(leaf) for leaf in leaves]
        through = [z if r is None else r for r, z in zip(arrived, zeros, strict=True)]
        return Passed(through, signal.seen, signal.reached), Passed(zeros, {}, set())

    def sensitivities(self, recording: Recording, maps: Maps) -> dict[Attention, Tensor]:
        """E_h E_i (∂s^l/∂A^l)⁺ of every self-attention, ``(..., heads, keys)``, heads adding up to their mean."""
        outputs = innermost(block_outputs(recording))
        if len({t.value.shape for t in outputs.values()}) != 1:
            raise InputError(
                "LeGrad: the model's blocks do not all have tokens of one shape; its head cannot read every layer"
            )
        last = list(outputs)[-1].partition("#")[0]
        found: dict[Attention, Tensor] = {}
        for name, output in outputs.items():
            start = self.head_gradient(recording, last, output.value)
            calls = attentions_of(recording, name, outputs)
            edges = [recording.recorder.captured[node] for node in calls]
            gradients = recording.relay(gradient_signal(), [output], [start], edges)
            for node, g in zip(calls, gradients, strict=True):
                if g is not None:
                    maps.gradients[node] = g
                    found[node] = positive_mean(maps, node)
        return found

    def head_gradient(self, recording: Recording, last: str, tokens: Tensor) -> Tensor:
        """∂s/∂z where z stands in for the last block's output."""
        with torch.enable_grad(), standing_in(self.forward_func, last, tokens) as leaf:
            args, kwargs = recording.inputs.arguments(dict(recording.inputs.values))
            output = unwrap(self.forward_func(*args, **kwargs), self.output)
            selected = select(output, recording.target)
            (g,) = torch.autograd.grad(selected.sum(), leaf)
        return g.to(tokens.dtype)


@contextlib.contextmanager
def standing_in(function: Any, path: str, tokens: Tensor) -> Iterator[Tensor]:
    """A leaf with the values of ``tokens`` that replaces what the block at ``path`` returns, inside the context
    only."""
    module = next(m for root in modules_of(function) for p, m in root.named_modules() if p == path)
    leaf = tokens.clone().requires_grad_()

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        first = next(t for t in tensors_in((output,)) if t.is_floating_point())
        return replaced(output, {id(first): leaf.to(first.dtype)})

    handle = module.register_forward_hook(hook)
    try:
        yield leaf
    finally:
        handle.remove()


def positive_mean(maps: Maps, node: Attention) -> Tensor:
    """Positive part of ∇A averaged over queries and divided by the number of heads, ``(..., heads, keys)``; masked
    pairs and padded queries take no part."""
    total = node.value.new_zeros(())
    for rows in node.blocks():
        visible = node.probabilities(rows) > 0
        total = total + torch.where(visible, maps.gradient(node, rows).clamp(min=0), 0).sum(-2)
    shape = node.map_shape
    heads = shape[-3] if len(shape) > 3 else math.prod(shape[:-2]) // maps.recording.inputs.batch  # (B · H, N, N')
    queries = real_queries(node, maps.recording.attentions).sum(-1, keepdim=True)
    return total / (queries * heads)
