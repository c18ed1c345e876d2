"""TransformerRelevance (Chefer, Gur and Wolf, CVPR 2021) of one example, in plain formulas and whole matrices.

A model is a list of ``Layer``: what home-made and library encoders are held against.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class Layer:
    """Weights ``(W, b)`` of one encoder layer; ``norm_first`` tells pre-norm from post-norm."""

    qkv: tuple
    proj: tuple
    norm1: tuple
    norm2: tuple
    up: tuple
    down: tuple
    heads: int
    norm_first: bool = True
    activation: object = F.gelu


def linear_rule(x, weight, r):
    """z⁺ with one denominator, eq. 3-4."""
    xp, xn, wp, wn = x.clamp(min=0), x.clamp(max=0), weight.clamp(min=0), weight.clamp(max=0)
    s = r / (xp @ wp.T + xn @ wn.T)
    return xp * (s @ wp) + xn * (s @ wn)


def product_rule(u, v, r):
    """Half to each operand, eq. 7-8."""
    s = r / (u @ v) / 2
    return u * (s @ v.mT), v * (u.mT @ s)


def sum_rule(u, v, r):
    """Proportional, then rescaled to the totals, eq. 9-10."""
    a, b = u * r / (u + v), v * r / (u + v)
    sa, sb = a.sum(), b.sum()
    return (
        a * (sa.abs() / (sa.abs() + sb.abs()) * r.sum() / sa),
        b * (sb.abs() / (sa.abs() + sb.abs()) * r.sum() / sb),
    )


def norm(x, weights):
    return F.layer_norm(x, x.shape[-1:], *weights)


def split(x, heads):
    return x.reshape(len(x), heads, -1).transpose(0, 1)


def forward(layer, x):
    """Output ``(N, C)`` of one layer and everything that its relevance needs."""
    k = {"x": x}
    k["into"] = norm(x, layer.norm1) if layer.norm_first else x
    q, key, v = (split(t, layer.heads) for t in F.linear(k["into"], *layer.qkv).chunk(3, -1))
    k["map"] = (q @ key.mT * q.shape[-1] ** -0.5).softmax(-1)
    k["q"], k["key"], k["v"] = q, key, v
    k["mixed"] = (k["map"] @ v).transpose(0, 1).reshape(x.shape)
    k["attended"] = F.linear(k["mixed"], *layer.proj)
    k["middle"] = x + k["attended"] if layer.norm_first else norm(x + k["attended"], layer.norm1)
    k["inner"] = norm(k["middle"], layer.norm2) if layer.norm_first else k["middle"]
    k["hidden"] = F.linear(k["inner"], *layer.up)
    k["active"] = layer.activation(k["hidden"])
    k["out"] = F.linear(k["active"], *layer.down)
    y = k["middle"] + k["out"]
    return (y if layer.norm_first else norm(y, layer.norm2)), k


def backward(layer, k, r):
    """Relevance of the layer's input and of its attention map. Norms and activations pass it on."""
    r, r_out = sum_rule(k["middle"], k["out"], r)
    r = r + linear_rule(k["inner"], layer.up[0], linear_rule(k["active"], layer.down[0], r_out))
    r, r_att = sum_rule(k["x"], k["attended"], r)
    r_mixed = split(linear_rule(k["mixed"], layer.proj[0], r_att), layer.heads)
    r_map, r_v = product_rule(k["map"], k["v"], r_mixed)
    r_q, r_key = product_rule(k["q"], k["key"].mT, r_map)
    r_qkv = torch.cat([t.transpose(0, 1).reshape(len(r), -1) for t in (r_q, r_key.mT, r_v)], -1)
    return r + linear_rule(k["into"], layer.qkv[0], r_qkv), r_map


def transformer_relevance(layers, x, read, head, target, final=None):
    """The read-out row(s) of (Ā_L + I) ··· (Ā_1 + I) − I, and the relevance that reached the tokens.

    read: a row, or ``"mean"``. head: ``(W, b)`` of the classifier. final: weights of a last norm over every token.
    """
    kept = []
    x = x.detach().requires_grad_()
    y = x
    for layer in layers:
        y, k = forward(layer, y)
        kept.append(k)
    z = y if final is None else norm(y, final)
    tokens = torch.eye(len(x)).to(x)
    weights = tokens.mean(0) if read == "mean" else tokens[read]
    pooled = weights @ z
    logit = F.linear(pooled, *head)[target]
    maps = [k["map"] for k in kept]
    gradients = torch.autograd.grad(logit, maps)
    with torch.no_grad():
        r = linear_rule(pooled[None], head[0], F.one_hot(torch.tensor(target), len(head[0])).to(x)[None])[0]
        # LRP-0 of the mean; a single row gets all.
        r = weights[:, None] * z * (r / pooled)
        row_by_layer = []
        for layer, k in zip(layers[::-1], kept[::-1], strict=True):
            r, r_map = backward(layer, k, r)
            row_by_layer.append(r_map)
        row = weights.clone()
        for gradient, r_map in zip(gradients[::-1], row_by_layer, strict=True):
            row = row + row @ (gradient * r_map).clamp(min=0).mean(0)
        return row - weights, r
