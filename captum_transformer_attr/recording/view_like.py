"""Operations that only move values: their ordinary autograd backward is right for every signal."""

from __future__ import annotations

# Autograd nodes (without their number) whose backward moves values, sums them at forks, or picks a winner.
VIEW_LIKE = frozenset(
    """View UnsafeView Reshape ReshapeAlias Transpose Permute T Squeeze Unsqueeze Expand Slice Select Split
    SplitWithSizes Unbind Narrow Clone ToCopy Alias AsStrided Index IndexSelect Gather Cat Stack Roll Flip Repeat
    RepeatInterleave Chunk Contiguous Unfold UnfoldBackward Im2Col Diagonal MaskedFill MaskedSelect MaskedScatter Where
    IndexPut IndexPutImpl IndexCopy IndexFill Scatter ConstantPadNd ReflectionPad1D ReflectionPad2D ReplicationPad1D
    ReplicationPad2D MaxPool2DWithIndices MaxPool1D MaxPool3DWithIndices AdaptiveMaxPool2D AdaptiveMaxPool3D
    FractionalMaxPool2D FractionalMaxPool3D Max Min Amax Amin Maximum Minimum Topk Sort CopySlices Copy AccumulateGrad
    SwapAxes Movedim PixelShuffle PixelUnshuffle Detach SelectScatter SliceScatter Tril Triu UnsafeSplit
    UnsafeSplitWithSizes Take Fill Zero ChannelShuffle ExpandCopy ViewCopy Kthvalue Msort PadSequence Rot90 Flatten
    ViewAsComplex ViewAsReal""".split()
)


def is_view_like(name: str) -> bool:
    """Whether an autograd node of this name (``ViewBackward0``) needs no rule."""
    head = name.removeprefix("torch::autograd::").partition("Backward")[0]
    return head.lstrip("_") in VIEW_LIKE
