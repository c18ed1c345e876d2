"""Tiny transformers for the tests, written out so that nothing of them hides in a library."""

import torch
from torch import nn


def randomise(model, seed=0, scale=0.3):
    """Weights far from any symmetric or zero initialisation, so that every check can fail."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.dtype) * scale
            p.copy_(1 + noise if p.ndim == 1 and name.endswith("weight") else noise)
    return model.eval()


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        x = x + self.proj(y)
        return x + self.mlp(self.norm2(x))


class WatchedAttention(nn.Module):
    """Two heads written out, with a norm in front; ``maps`` keeps the average over heads of every call."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.maps = []

    def forward(self, x, source=None):
        q = self.qkv(self.norm(x)).chunk(3, -1)[0].unflatten(-1, (2, -1)).transpose(1, 2)
        k, v = (
            t.unflatten(-1, (2, -1)).transpose(1, 2)
            for t in self.qkv(self.norm(x if source is None else source)).chunk(3, -1)[1:]
        )
        a = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        self.maps.append(a.detach().mean(1))
        return self.proj((a @ v).transpose(1, 2).flatten(2))


class TinyViT(nn.Module):
    """Class token, positional embedding, two blocks; ``extra`` scales the logits (an additional forward argument)."""

    def __init__(self, width=16, heads=2, depth=2, classes=4, image=8, patch=4):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x, extra=None):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        x = self.head(self.norm(self.blocks(x))[:, 0])
        return x if extra is None else x * extra


class TinyText(nn.Module):
    """Token ids to ``(N, T, V)`` scores, with a mask."""

    def __init__(self, vocabulary=20, width=16, depth=2):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width, 2) for _ in range(depth)))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids):
        return self.head(self.blocks(self.embed(ids)))


class TwoInputs(nn.Module):
    """Two feature sequences that become one joint sequence."""

    def __init__(self, width=16, classes=3):
        super().__init__()
        self.left, self.right = nn.Linear(5, width), nn.Linear(7, width)
        self.blocks = nn.Sequential(Block(width, 2), Block(width, 2))
        self.head = nn.Linear(width, classes)

    def forward(self, a, b, scale=1.0):
        x = torch.cat([self.left(a), self.right(b)], 1)
        return self.head(self.blocks(x).mean(1)) * scale
