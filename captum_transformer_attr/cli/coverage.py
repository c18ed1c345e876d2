"""The ``coverage`` command."""

from __future__ import annotations

import json
from dataclasses import asdict

import captum_transformer_attr
from captum_transformer_attr.cli.printing import print_json
from captum_transformer_attr.loading import PreprocessingOptions
from captum_transformer_attr.loading.samples import model_with_sample


def run_coverage(
    model: str, *, class_count: int | None, preprocessing: PreprocessingOptions, as_json: bool = False
) -> bool:
    """Print the table of a model built without its weights, or the same as JSON.

    Returns:
        Whether the model can be explained.

    Raises:
        LoadingError: if the model cannot be built or no input can be made up.
    """
    built, inputs = model_with_sample(model, preprocessing, class_count=class_count)
    table = captum_transformer_attr.coverage(built, inputs)
    if as_json:
        print_json(json.dumps(asdict(table) | {"covered": bool(table)}, indent=1))
    else:
        print(table)
    return bool(table)
