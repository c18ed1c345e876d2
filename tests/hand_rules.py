"""The rules of Chefer, Gur and Wolf (ICCV 2021) for one example, written out with whole matrices: what the streams
found in a graph are held against."""

import torch


def eager_maps(model, run):
    """``run()`` and every attention map ``(1, H, N, N')`` that an attention module of the model returned on the way, by
    module path."""
    found, handles = {}, []

    def watch(path):
        def hook(module, args, output):
            for o in output if isinstance(output, tuple) else ():
                if (
                    isinstance(o, torch.Tensor)
                    and o.ndim == 4
                    and torch.allclose(o.sum(-1), torch.ones((), dtype=o.dtype))
                ):
                    found[path] = o

        return hook

    for path, module in model.named_modules():
        if "attention" in type(module).__name__.lower():
            handles.append(module.register_forward_hook(watch(path)))
    try:
        return run(), found
    finally:
        for handle in handles:
            handle.remove()


def averaged(score, maps):
    """Eq. 5 for every map: E_h[(∇A ⊙ A)⁺], ``(N, N')``."""
    gradients = torch.autograd.grad(score, list(maps.values()))
    return {
        path: (g * a)[0].clamp(min=0).mean(0).detach() for (path, a), g in zip(maps.items(), gradients, strict=True)
    }


class Relations:
    """R[s][p] for streams s and p, identities included."""

    def __init__(self, **sizes):
        self.sizes = sizes
        zeros = {s: {p: torch.zeros(n, m, dtype=torch.float64) for p, m in sizes.items()} for s, n in sizes.items()}
        self.R = {
            s: {p: zeros[s][p] + (torch.eye(n, dtype=torch.float64) if s == p else 0) for p in sizes}
            for s, n in sizes.items()
        }

    def own(self, s, a):
        """Eq. 6 and 7."""
        self.R[s] = {p: r + a @ r for p, r in self.R[s].items()}

    def normalised(self, x):
        """Eq. 8 and 9."""
        hat = self.R[x][x] - torch.eye(self.sizes[x], dtype=torch.float64)
        rows = hat.sum(-1, keepdim=True)
        return torch.where(rows == 0, 0, hat / rows) + torch.eye(self.sizes[x], dtype=torch.float64)

    def ask(self, s, q, a):
        """Eq. 10, and 11 for everything else that q had heard of."""
        new = {p: self.R[s][p] + a @ self.R[q][p] for p in self.sizes if p != q}
        new[q] = self.R[s][q] + self.normalised(s).T @ a @ self.normalised(q)
        self.R[s] = new

    def row(self, s, i, p):
        """The read-out row, its identity taken out."""
        row = self.R[s][p][i].clone()
        if s == p:
            row[i] -= 1
        return row
