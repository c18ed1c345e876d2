"""Method by metric tables on real models and data; resumable, with bootstrap intervals."""

from captum_transformer_attr.evaluation.batch import Batch, Words
from captum_transformer_attr.evaluation.controls import CENTER, RANDOM, center_method, random_method
from captum_transformer_attr.evaluation.images import ImageTask
from captum_transformer_attr.evaluation.machine import circumstances
from captum_transformer_attr.evaluation.measures import Column, Measure
from captum_transformer_attr.evaluation.report import as_json, as_markdown, earlier_rows, write
from captum_transformer_attr.evaluation.run import MethodRow, TaskResult, description_of, evaluate
from captum_transformer_attr.evaluation.task import Task, spread
from captum_transformer_attr.evaluation.texts import TextTask

__all__ = [
    "CENTER",
    "RANDOM",
    "Batch",
    "Column",
    "ImageTask",
    "Measure",
    "MethodRow",
    "Task",
    "TaskResult",
    "TextTask",
    "Words",
    "as_json",
    "as_markdown",
    "center_method",
    "circumstances",
    "description_of",
    "earlier_rows",
    "evaluate",
    "random_method",
    "spread",
    "write",
]
