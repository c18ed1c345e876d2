"""The commands and their options. What they do stands in the modules they call."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from captum_transformer_attr.errors import TransformerAttributionError

app = typer.Typer(
    help="Class-specific explanations of transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
settings = {"debug": False}
INTERRUPTED = 130

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="'embedded' or 'embedded-swin' (digit scenes), a timm name, a Hugging Face name or folder, "
        "or a safetensors file that describes itself.",
    ),
]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Local weights: safetensors, or a torch file that holds nothing but weights.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")]
Classes = Annotated[
    int | None, typer.Option("--num-classes", min=1, help="Outputs of the checkpoint, if not the default.")
]
Size = Annotated[
    str | None, typer.Option(help="Image input size instead of the model's own: 224 or 224x320 (height x width).")
]
Mean = Annotated[str | None, typer.Option(help="Normalisation instead of the model's own: 0.5 or 0.5,0.5,0.5.")]
Std = Annotated[str | None, typer.Option(help="As --mean.")]
Squash = Annotated[bool, typer.Option("--squash", help="Resize the whole image to the input size; crop nothing.")]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help="Our classes and Captum's, several allowed (comma or repeated), options behind colons: "
        "TransformerRelevance:start_layer=1,IntegratedGradients:n_steps=20",
    ),
]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    settings["debug"] = debug


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for demo.html and demo.png; made if missing.")
    ] = Path("captum-transformer-attr-demo"),
    scenes: Annotated[int, typer.Option(min=200, help="Scenes that the table is measured on.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of the scenes.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the tables as JSON.")] = False,
) -> None:
    """Explain the digits in cluttered scenes, methods side by side, and measure who points at the right one."""
    from captum_transformer_attr.cli.demo import run_demo

    run_demo(output, scenes, seed, as_json=json)


@app.command()
def explain(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...", help="Image files, sentences, or region features (.npy, .npz).", show_default=False
        ),
    ],
    model: Model = "embedded",
    checkpoint: Checkpoint = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            "-t",
            help='Class index or label, several allowed; "this > that" for a difference; default: the top predictions.',
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="A question about the image, or a text to compare it with (CLIP); several allowed."),
    ] = None,
    generate: Annotated[
        int, typer.Option(min=0, help="Language models: write so many tokens, and explain each of them.")
    ] = 0,
    top: Annotated[int, typer.Option(min=1, help="How many top predictions to explain without --target.")] = 2,
    method: Methods = None,
    png: Annotated[Path | None, typer.Option(help="Write a picture.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON to standard output.")] = False,
    labels: Annotated[Path | None, typer.Option(help="Class names: one per line, or a JSON list.")] = None,
    num_classes: Classes = None,
    merge: Annotated[str, typer.Option(help="Word pieces to words: max (of magnitude), sum or mean.")] = "max",
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    squash: Squash = False,
    device: Device = "auto",
) -> None:
    """Explain what a model says about images or texts.

    Classifiers of images and texts, detectors, language models (prompts), question answering on images and
    contrastive models (image and --text).

    Without --png, --html and --json it writes explanation.png and explanation.html.
    """
    from captum_transformer_attr.cli.explain import ExplainRequest, run_explain
    from captum_transformer_attr.cli.values import image_options

    if png is None and html is None and not json:
        png, html = Path("explanation.png"), Path("explanation.html")
    run_explain(
        ExplainRequest(
            inputs=tuple(inputs),
            model=model,
            checkpoint=checkpoint,
            texts=tuple(text or ()),
            targets=tuple(target or ()),
            generate=generate,
            top=top,
            methods=tuple(method or ()),
            png=png,
            html=html,
            json=json,
            labels=labels,
            class_count=num_classes,
            merge=merge,
            preprocessing=image_options(size, mean, std, squash),
            device=device,
        )
    )


@app.command()
def coverage(
    model: Model = "embedded",
    num_classes: Classes = None,
    size: Size = None,
    json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """List every operation of a model with its rule, and what would be refused. Needs no weights.

    The exit status is 1 if the model would be refused.
    """
    from captum_transformer_attr.cli.coverage import run_coverage
    from captum_transformer_attr.cli.values import image_options

    preprocessing = image_options(size, None, None, False)
    if not run_coverage(model, class_count=num_classes, preprocessing=preprocessing, as_json=json):
        raise typer.Exit(1)


@app.command()
def evaluate(
    data: Annotated[
        str,
        typer.Argument(
            help="digit-scenes, or a data set on your disk: images, imagenet, imagenet-segmentation, tiny-imagenet, "
            "boxed-images, coco, sst2, sst-rationales, eraser."
        ),
    ],
    path: Annotated[Path | None, typer.Argument(help="Its folder or file.", show_default=False)] = None,
    annotations: Annotated[Path | None, typer.Option(help="Its annotation file or devkit, where it has one.")] = None,
    model: Model = "embedded",
    checkpoint: Checkpoint = None,
    num_classes: Classes = None,
    method: Methods = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="perturbation, perturbation-squares, saco, pointing, corners, segmentation, discriminativeness, "
            "captum; for texts perturbation, perturbation-mask, saco, rationale. Several allowed."
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=2, help="Examples, spread evenly over the data set.")] = 300,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples at a time.")] = 8,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write NAME.md and NAME.json.", metavar="NAME")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Folder that keeps finished work, to go on after an interruption.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of scenes, random scores and bootstrap intervals.")] = 0,
) -> None:
    """Measure how faithful methods are, as a method x metric table with 95 % intervals."""
    from captum_transformer_attr.cli.evaluate import EvaluateRequest, run_evaluate

    run_evaluate(
        EvaluateRequest(
            data=data,
            path=path,
            annotations=annotations,
            model=model,
            checkpoint=checkpoint,
            class_count=num_classes,
            methods=tuple(method or ()),
            metrics=tuple(metric or ()),
            count=count,
            batch_size=batch_size,
            output=output,
            resume=resume,
            json=json,
            device=device,
            seed=seed,
        )
    )


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command; every failure becomes one line on standard error and a non-zero status.

    Returns:
        0, 1 after an error, 2 after a wrong call, 130 after Ctrl-C.
    """
    for talkative in ("huggingface_hub", "matplotlib.font_manager"):
        logging.getLogger(talkative).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            status = app(args=None if arguments is None else list(arguments), standalone_mode=False)
        # Newer versions of typer turn Ctrl-C into this status without a word, older ones raise Abort.
        if status == INTERRUPTED:
            _say("interrupted")
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted")
        return INTERRUPTED
    except (TransformerAttributionError, OSError) as error:
        return _failed(error, str(error))
    except Exception as error:
        # typer's usage errors; their class has been click's own or a copy inside typer, depending on the version.
        if hasattr(error, "format_message"):
            _say(error.format_message())
            return 2
        return _failed(error, f"{type(error).__name__}: {error} (more with: captum-transformer-attr --debug ...)")


def _failed(error: BaseException, message: str) -> int:
    if settings["debug"]:
        Console(stderr=True).print_exception()
    _say(message)
    return 1


def _say(message: Any) -> None:
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
