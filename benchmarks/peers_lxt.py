"""AttnLRP and CP-LRP against the published implementation (``lxt``) on random Llama, GPT-2 and BERT models in float64.

lxt replaces methods of transformers process-wide, so it runs in another process and, as it needs an older transformers,
another environment:

    python -m venv /tmp/lxt && /tmp/lxt/bin/pip install lxt "transformers==4.51.3"
    python -m benchmarks.peers_lxt --peer-python /tmp/lxt/bin/python [--out docs/results/peers_lxt.md]
"""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

from captum_transformer_attr import TransformerLRP
from captum_transformer_attr.output_files import write_texts

WORKER = Path(__file__).with_name("peers_lxt_worker.py")
COMMON = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
CONFIGS = {
    "llama": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        **COMMON,
    },
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 8, "n_positions": 64, **COMMON},
    "bert": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_labels": 3,
        **COMMON,
    },
}
CLASSES = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "bert": "BertForSequenceClassification"}


@dataclass(frozen=True)
class Case:
    """One comparison. theirs: lxt's table. ours: our rules. note: where the two are known to differ."""

    family: str
    theirs: str
    ours: str
    note: str = ""
    config: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("llama", "attnLRP", "attnlrp"),
    Case("llama", "cp_LRP", "cp"),
    Case("gpt2", "attnLRP", "attnlrp"),
    Case(
        "gpt2",
        "cp_LRP",
        "libra",
        "lxt's cp_LRP of GPT-2 takes the slope f(x)/x of activations, which Ali et al. do not: that is our libra",
    ),
    Case("bert", "attnLRP", "attnlrp"),
)


def random_model(case: Case) -> Any:
    """A seeded model in float64 with weights and biases large enough to make every operation matter."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(case.family, **CONFIGS[case.family], initializer_range=0.1)
    config._attn_implementation = "eager"
    model = getattr(transformers, CLASSES[case.family])(config).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def compare(case: Case, peer_python: str) -> dict[str, Any]:
    """Largest difference relative to the largest relevance, in one case."""
    model = random_model(case)
    ids = torch.randint(1, 97, (2, 24), generator=torch.Generator().manual_seed(2))
    target = (1,) if case.family == "bert" else (23, 5)
    ours = TransformerLRP(model, case.ours).attribute(ids, target=target[0] if len(target) == 1 else target)
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder, "job.pt"), Path(folder, "result.pt")
        work = {
            "family": case.family,
            "class": CLASSES[case.family],
            "rules": case.theirs,
            "config": {**CONFIGS[case.family], "initializer_range": 0.1},
            "weights": model.state_dict(),
            "ids": ids,
            "target": target,
        }
        torch.save(work, job)
        subprocess.run([peer_python, str(WORKER), str(job), str(result)], check=True, cwd=folder)
        theirs = torch.load(result, weights_only=False)
    logits = (model(ids).logits.detach() - theirs["logits"]).abs().max().item()
    difference = ((ours - theirs["relevance"]).abs().max() / theirs["relevance"].abs().max()).item()
    return {
        "case": case,
        "difference": difference,
        "logits": logits,
        "version": theirs["version"],
        "transformers": theirs["transformers"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    first = rows[0]
    lines = [
        f"# Agreement with lxt {first['version']}",
        "",
        f"Random models in float64, 2 × 24 tokens; lxt under transformers {first['transformers']}, "
        f"ours under {transformers.__version__}. "
        "Difference: largest over all tokens, relative to the largest relevance. Made by `benchmarks/peers_lxt.py`.",
        "",
        "| model | lxt table | our rules | difference of relevance | difference of logits | note |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        case = row["case"]
        numbers = f"{row['difference']:.1e} | {row['logits']:.1e}"
        lines.append(f"| {case.family} | `{case.theirs}` | `{case.ours}` | {numbers} | {case.note} |")
    return "\n".join(lines) + "\n"


def main(
    peer_python: Annotated[str, typer.Option(help="Python of an environment with lxt.")],
    out: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
) -> None:
    """Compare, print, and write the table."""
    torch.set_num_threads(1)
    text = table([compare(case, peer_python) for case in CASES])
    print(text)
    if out:
        write_texts({out: text})


if __name__ == "__main__":
    typer.run(main)
