"""timm's architectures: what ``coverage.py`` runs of ``timm.list_models()``.

Every model is first built without memory (meta device) at its published size: that tells its parameters, whether it computes a softmax at all, and
which operations it is made of. All architectures with softmax attention over tokens and up to 100 million parameters are run. A larger one is
stood for by the smallest one of the same file whose modules and operations are the same set (it differs in width, depth or input size only); where
there is no such one up to 100 million, the smallest larger one runs, with two blocks if its constructor takes a depth. Of an encoder without a
head the average of its tokens is explained.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import _registry as registry
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LIMIT = 100.0  # million parameters
CLASSES = 10
SIZES = (64, 56, 80, 96, 112, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)

# Softmax that mixes no tokens, or mixes them without a map of queries and keys.
NOT_ATTENTION: tuple[tuple[str, str], ...] = (
    ("resnest", "convolutions; softmax over the splits of a channel"),
    ("sknet", "convolutions; softmax over two kernels"),
    ("efficientvim", "state-space mixer"),
    ("mobilevitv2", "separable linear attention: one softmax pooling per block, no queries times keys"),
    ("gcresne", "convolutions; global-context gates"),
    ("gc_efficientnet", "convolutions; global-context gates"),
    ("gcresnext", "convolutions; global-context gates"),
    ("lambda_", "lambda layers: softmax over keys only, no queries times keys"),
)


@dataclass(frozen=True)
class Facts:
    """What a model without memory tells: ``parameters`` in millions, ``softmax`` calls, ``structure``: digest of its modules and operations."""

    name: str
    family: str
    parameters: float
    softmax: int
    structure: str


class Spy(TorchFunctionMode):
    """Collects which operations run, and how many of them are softmax attention."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax = 0
        self.operations: set[str] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", str(function))
        self.softmax += name in ("softmax", "scaled_dot_product_attention")
        self.operations.add(name)
        return function(*args, **(kwargs or {}))


def facts_of(name: str) -> Facts:
    """Build and run a model on the meta device at its published input size."""
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(name, num_classes=CLASSES).eval()
        with Spy() as spy:
            model(torch.zeros(1, *model.pretrained_cfg.get("input_size", (3, 224, 224))))
    parts = sorted(spy.operations | {kind(m) for m in model.modules()})
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return Facts(
        name,
        registry._model_to_module[name],
        parameters,
        spy.softmax,
        hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12],
    )


def kind(module: nn.Module) -> str:
    """A module's class with what is not its width."""
    if isinstance(module, nn.Conv2d):
        patches = module.stride == module.kernel_size and module.stride[0] > 4
        return f"Conv2d {'patches' if patches else (module.kernel_size, module.stride)} {module.groups > 1} {module.bias is None}"
    return f"{type(module).__name__} {getattr(module, 'bias', 1) is None}"


@functools.cache
def all_facts() -> dict[str, Facts]:
    """Facts of every listed model, kept beside the results of ``coverage.py``."""
    file = Path.home() / ".cache" / "captum_transformer_attr" / f"timm-{timm.__version__}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    known = (
        {f.name: f for f in (Facts(**json.loads(line)) for line in file.read_text().splitlines())}
        if file.exists()
        else {}
    )
    with file.open("a") as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in timm.list_models():
            if name not in known:
                known[name] = facts_of(name)
                out.write(json.dumps(asdict(known[name])) + "\n")
                out.flush()
    return known


def out_of_scope(facts: Facts) -> str:
    """Why an architecture does not count as softmax attention over tokens; empty if it does."""
    if not facts.softmax:
        return "no softmax in the model"
    return next(
        (reason for prefix, reason in NOT_ATTENTION if facts.name.startswith(prefix) or facts.family == prefix), ""
    )


# ---------------------------------------------------------------------- building
@dataclass(frozen=True)
class Smallest:
    """Constructor arguments and input shape of the smallest image a model accepts; ``axes`` of the output's tokens, which are averaged."""

    arguments: dict[str, Any]
    shape: tuple[int, ...]
    axes: tuple[int, ...]


@functools.cache
def smallest(name: str, depth: int | None = None) -> Smallest:
    """The smallest image that ``name`` accepts."""
    extra = {} if depth is None else {"depth": depth}
    config = timm.get_pretrained_cfg(name)
    channels, published = (config.input_size[0], config.input_size[-1]) if config else (3, 224)
    patch = patch_size(name)
    sizes = [patch * 4] if patch and patch * 4 >= 56 else []
    for size in [*sizes, *(s for s in SIZES if s < published), published]:
        if patch and size % patch:
            continue
        for arguments in ({"img_size": size, **extra}, extra) if size != published else (extra,):
            axes = token_axes(name, arguments, (channels, size, size))
            if axes is not None:
                return Smallest(arguments, (channels, size, size), axes)
    raise ValueError(f"{name}: no input size works")


@functools.cache
def takes_depth(name: str, depth: int) -> bool:
    """Whether the constructor can be told how many blocks the model has."""
    try:
        with torch.device("meta"):
            timm.create_model(name, depth=depth)
    except (TypeError, AssertionError):
        return False
    return True


def patch_size(name: str) -> int:
    """Pixels per token of a plain vision transformer, behind its stem if it has one; 0 for hierarchical models."""
    with torch.device("meta"):
        embedding = getattr(timm.create_model(name), "patch_embed", None)
    ratio = getattr(embedding, "feat_ratio", None)
    size = int(ratio()) if ratio is not None else 0
    return size if size > 4 else 0


def token_axes(name: str, arguments: dict[str, Any], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Axes over which the output is averaged: none for class scores, the tokens of an encoder without a head; None if the input is not accepted."""
    try:
        with torch.device("meta"), torch.no_grad():
            model = timm.create_model(name, num_classes=CLASSES, **arguments).eval()
            output = model(torch.zeros(1, *shape))
    except Exception:  # noqa: BLE001  any failure means that this size is not accepted
        return None
    if output.ndim > 2:
        return (1,) if output.ndim == 3 else (2, 3)
    return () if output.shape[-1] == CLASSES else None


class Averaged(nn.Module):
    """An encoder without a head, its tokens averaged."""

    def __init__(self, encoder: nn.Module, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder, self.axes = encoder, axes

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.encoder(x)
        return features.mean(self.axes)


class Unfilled(TorchFunctionMode):
    """Leaves matrices as they were allocated where a constructor would draw them: ``redrawn`` draws all of them again."""

    DRAWN = frozenset(
        "normal_ uniform_ erfinv_ trunc_normal_ xavier_uniform_ xavier_normal_ kaiming_uniform_ kaiming_normal_".split()
    )

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            getattr(function, "__name__", "") in self.DRAWN
            and args
            and isinstance(args[0], nn.Parameter)
            and args[0].ndim > 1
        ):
            return args[0]
        return function(*args, **(kwargs or {}))


def redrawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 and evaluation mode, all weights away from initial values that would hide mistakes.

    Weights of linear maps and convolutions by their fan-in (timm's std of 0.02 makes branches vanish beside the trunk), LayerScale and gains
    around 1, everything that starts at a constant or near zero drawn anew, batch-norm statistics off 0 and 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator).double()

    model = model.double().eval()
    maps = {id(p) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)) for p in [m.weight]}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if id(p) in maps or (p.ndim >= 2 and name.endswith("proj_weight")):
                p.copy_(noise(p) / p[0].numel() ** 0.5)
            elif sum(size > 1 for size in p.shape) <= 1 and not name.endswith(("token", "pos_embed")):
                centre = p.mean() if p.numel() else p
                gain = name.endswith(("weight", "gamma", "gamma_1", "gamma_2", "gamma1", "gamma2", "gamma3", "scale"))
                p.copy_((1 if gain and abs(centre) < 1e-2 else centre) + 0.2 * noise(p))
            else:
                p.copy_(0.3 * noise(p))
        for m in model.modules():
            if (
                isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)
                and m.running_mean is not None
                and m.running_var is not None
            ):
                m.running_mean.copy_(0.2 * noise(m.running_mean))
                m.running_var.copy_(0.7 + 0.3 * noise(m.running_var).square())
    return model


def tamed(model: nn.Module, inputs: Tensor, limit: float = 1e6) -> nn.Module:
    """The model; if its activations explode (drawn statistics of many batch norms in a row), so that every branch vanishes beside the trunk, with
    every batch norm's variance the mean square of what it gets."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) and m.running_var is not None]
    with torch.no_grad():
        if not norms or float(model(inputs).abs().max()) < limit:
            return model
        generator = torch.Generator().manual_seed(2)

        def fit(norm: Any, args: tuple[Tensor]) -> None:
            axes = [i for i in range(args[0].ndim) if i != 1]
            size = args[0].square().mean(axes)
            shift = torch.randn(size.shape, generator=generator).double()
            norm.running_var.copy_(size)
            norm.running_mean.copy_(0.2 * shift * size.sqrt())

        handles = [norm.register_forward_pre_hook(fit) for norm in norms]
        model(inputs)
        for handle in handles:
            handle.remove()
    return model


def build(name: str, depth: int | None = None) -> nn.Module:
    """The model with its smallest input size, float64, redrawn."""
    torch.manual_seed(0)
    small = smallest(name, depth)
    with Unfilled():
        model = timm.create_model(name, num_classes=CLASSES, **small.arguments)
    model = tamed(redrawn(model), images(name, depth))
    return Averaged(model, small.axes) if small.axes else model


def images(name: str, depth: int | None = None) -> Tensor:
    """Two different images of the smallest accepted size."""
    shape = smallest(name, depth).shape
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# ---------------------------------------------------------------------- the source
def cases() -> Iterator[tuple[str, str, Callable[[], nn.Module], Callable[[], Tensor], Any, dict[str, str]]]:
    """Architectures to run, the representatives of every kind first."""
    groups: dict[tuple[str, str], list[Facts]] = {}
    for facts in sorted(all_facts().values(), key=lambda f: f.parameters):
        if facts.softmax:
            groups.setdefault((facts.family, facts.structure), []).append(facts)
    first, rest = [], []
    for members in groups.values():
        small = [f for f in members if f.parameters <= LIMIT]
        for position, facts in enumerate(small or members[:1]):
            details = {"scope": out_of_scope(facts)}
            if position == 0:
                details["for"] = ", ".join(f.name for f in members[len(small) or 1 :])
            depth = 2 if not small and takes_depth(facts.name, 2) else None
            if depth:
                details["depth"] = f"{depth} blocks"
            build_it, images_of = (
                functools.partial(build, facts.name, depth),
                functools.partial(images, facts.name, depth),
            )
            (first if position == 0 else rest).append((facts.name, facts.family, build_it, images_of, [3, 7], details))
    yield from first
    yield from rest


def outside() -> Iterator[tuple[str, str, str]]:
    """Architectures without any softmax."""
    for facts in all_facts().values():
        if not facts.softmax:
            yield facts.name, facts.family, out_of_scope(facts)
