"""Vectorised drawing: rotated tiles, pasting tiles on canvases, line segments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rotated_tiles(fields: Tensor, sizes: Tensor, degrees: Tensor, tile: int) -> Tensor:
    """Upscale and rotate small images about their centres.

    Args:
        fields: ``(M, h, w)`` opacities in [0, 1].
        sizes: ``(M,)`` edge in pixels that each field gets.
        degrees: ``(M,)`` rotation, counter-clockwise.
        tile: edge of the result in pixels.

    Returns:
        ``(M, tile, tile)`` float32 opacities in [0, 1], zero outside the field.
    """
    angle = torch.deg2rad(degrees)
    zoom = tile / sizes
    cosine, sine, zero = zoom * angle.cos(), zoom * angle.sin(), torch.zeros_like(zoom)
    rows = torch.stack([torch.stack([cosine, -sine, zero], -1), torch.stack([sine, cosine, zero], -1)], dim=1)
    grid = F.affine_grid(rows.float(), [len(fields), 1, tile, tile], align_corners=False)
    tiles = F.grid_sample(fields[:, None].float(), grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return tiles[:, 0].clamp(0, 1)


def paste(tiles: Tensor, centres: Tensor, canvas_size: int) -> Tensor:
    """Put each tile on an empty canvas of its own.

    Args:
        tiles: ``(N, K, t, t)``, t even.
        centres: ``(N, K, 2)`` int64 (x, y): the canvas pixel corner where the tile's centre goes.
        canvas_size: edge S of the canvas in pixels; what reaches beyond it is cut off.

    Returns:
        ``(N, K, S, S)``.
    """
    tile = tiles.shape[-1]
    padded = canvas_size + 2 * tile  # room for tiles that reach over the edge
    offsets = torch.arange(tile) + tile - tile // 2
    columns = (centres[..., 0, None] + offsets)[..., None, :]
    rows = (centres[..., 1, None] + offsets)[..., :, None]
    canvas = torch.zeros(*tiles.shape[:2], padded * padded)
    canvas.scatter_(2, (rows * padded + columns).flatten(2), tiles.flatten(2))
    return canvas.view(*tiles.shape[:2], padded, padded)[..., tile:-tile, tile:-tile]


def segments(starts: Tensor, ends: Tensor, widths: Tensor, canvas_size: int) -> Tensor:
    """Anti-aliased straight strokes.

    Args:
        starts, ends: ``(M, 2)`` (x, y) in pixels, not the same point.
        widths: ``(M,)`` in pixels.
        canvas_size: edge S of the canvas in pixels.

    Returns:
        ``(M, S, S)`` opacities in [0, 1].
    """
    pixel = torch.arange(canvas_size) + 0.5
    direction = ends - starts
    length = direction.norm(dim=-1, keepdim=True)
    unit_x, unit_y = (direction / length).T[..., None]
    x, y = (pixel - starts[:, :1]), (pixel - starts[:, 1:])
    along = (unit_x * x)[:, None, :] + (unit_y * y)[:, :, None]
    across = (unit_x * y)[:, :, None] - (unit_y * x)[:, None, :]
    beyond = along - along.clamp(min=0).minimum(length[..., None])
    return (widths[:, None, None] / 2 + 0.5 - torch.hypot(across, beyond)).clamp_(0, 1)
