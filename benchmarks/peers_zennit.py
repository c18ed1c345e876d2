"""ε, γ, z⁺ and z^B against ``zennit`` on plain convolutional and linear networks in float64 (``pip install zennit``).

python -m benchmarks.peers_zennit [--out docs/results/peers_zennit.md]
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from captum_transformer_attr import Composite, TransformerLRP
from captum_transformer_attr.output_files import write_texts
from captum_transformer_attr.rules.linear_rules import Epsilon, Gamma, ZBox, ZPlus

LOW, HIGH = -3.0, 3.0
EPSILON = 1e-6


@dataclass(frozen=True)
class Case:
    """One comparison. rules and composite: ours. peer: builds zennit's composite. model: which network."""

    name: str
    rules: str
    composite: Composite
    peer: Callable[[], Any]
    model: str


def cases() -> list[Case]:
    """Single rules everywhere, and the composites zennit is known for."""
    from zennit.composites import EpsilonGammaBox, LayerMapComposite
    from zennit.rules import Epsilon as PeerEpsilon
    from zennit.rules import Gamma as PeerGamma
    from zennit.rules import Pass
    from zennit.rules import ZPlus as PeerZPlus
    from zennit.types import Activation, Convolution, Linear

    def everywhere(rule: Any) -> Callable[[], Any]:
        return lambda: LayerMapComposite([(Activation, Pass()), (Linear, rule)])

    # zennit's own default lets a bias into z⁺; the paper's rule ignores it.
    peer_z_plus = PeerZPlus(stabilizer=1e-12, zero_params=["bias"])
    epsilon_plus = LayerMapComposite(
        [(Activation, Pass()), (Convolution, peer_z_plus), (nn.Linear, PeerEpsilon(EPSILON))]
    )
    found = []
    for model in ("linear", "convolutional"):
        for table in ("deep_taylor", "libra"):
            found += [
                Case("ε = 0.1", table, Composite(Epsilon(0.1), Epsilon(0.1)), everywhere(PeerEpsilon(0.1)), model),
                Case(
                    "γ = 0.25",
                    table,
                    Composite(Gamma(0.25, EPSILON), Gamma(0.25, EPSILON)),
                    everywhere(PeerGamma(0.25, EPSILON)),
                    model,
                ),
            ]
        z_plus = Composite(ZPlus(), ZPlus())
        found.append(Case("z⁺", "deep_taylor", z_plus, everywhere(peer_z_plus), model))
    box = Composite(linear=Epsilon(EPSILON), convolution=Gamma(0.25, EPSILON), pixels=ZBox(LOW, HIGH))
    plus = Composite(linear=Epsilon(EPSILON), convolution=ZPlus())
    found += [
        Case(
            "EpsilonGammaBox", "deep_taylor", box, lambda: EpsilonGammaBox(LOW, HIGH, zero_params=None), "convolutional"
        ),
        Case("EpsilonPlus, z⁺ without bias", "deep_taylor", plus, lambda: epsilon_plus, "convolutional"),
    ]
    return found


def build(kind: str) -> tuple[nn.Module, Tensor]:
    """A seeded network and its inputs."""
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Sequential(
            nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 5)
        ).double().eval(), torch.randn(4, 20).double()
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(72, 5),
    ]
    return nn.Sequential(*layers).double().eval(), torch.randn(4, 3, 14, 14).double().clamp(LOW, HIGH)


def difference(case: Case) -> float:
    """Largest difference relative to the largest relevance."""
    from zennit.attribution import Gradient

    model, inputs = build(case.model)
    target = torch.tensor([0, 1, 4, 2])
    one_hot = torch.eye(5, dtype=torch.float64)[target]
    # Ours starts with relevance 1 (deep_taylor) or with the logit's value (the tables of modified gradients).
    start = one_hot if case.rules == "deep_taylor" else one_hot * model(inputs).detach()
    with Gradient(model=model, composite=case.peer()) as attributor:
        _, theirs = attributor(inputs, start)
    ours = TransformerLRP(model, case.rules, case.composite).attribute(inputs, target)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def table() -> str:
    """The results as Markdown."""
    lines = [
        f"# Agreement with zennit {importlib.metadata.version('zennit')}",
        "",
        "Random networks in float64. Difference: largest over all inputs, relative to the largest relevance. "
        "Where it is not 0 the stabilisers differ. Made by `benchmarks/peers_zennit.py`.",
        "",
        "| network | rule or composite | our table | difference |",
        "|---|---|---|---|",
    ]
    lines += [f"| {case.model} | {case.name} | `{case.rules}` | {difference(case):.1e} |" for case in cases()]
    return "\n".join(lines) + "\n"


def main(out: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None) -> None:
    """Compare, print, and write the table."""
    torch.set_num_threads(1)
    text = table()
    print(text)
    if out:
        write_texts({out: text})


if __name__ == "__main__":
    typer.run(main)
