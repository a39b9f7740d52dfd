"""Tasks and their data: GLUE from the hub or from files, the user's own files, and a built-in sample."""

from prunadapt_ds.data.glue import stream_blind
from prunadapt_ds.data.language import load_language, tokenize_language
from prunadapt_ds.data.loading import load_task, load_validation, tokenize
from prunadapt_ds.data.metrics import MEASURES, compute_metrics, compute_perplexity, load_metric, measures_of
from prunadapt_ds.data.own import doubts
from prunadapt_ds.data.readers import Columns, blank_line, read_columns, rename_text
from prunadapt_ds.data.sample import generate
from prunadapt_ds.data.tasks import (
    GLUE,
    HUB_DATASET,
    OWN_METRICS,
    TASKS,
    BlindSet,
    Split,
    Task,
    TaskData,
    get_task,
    unknown_task,
)

__all__ = [
    "GLUE",
    "HUB_DATASET",
    "MEASURES",
    "OWN_METRICS",
    "TASKS",
    "BlindSet",
    "Columns",
    "Split",
    "Task",
    "TaskData",
    "blank_line",
    "compute_metrics",
    "compute_perplexity",
    "doubts",
    "generate",
    "get_task",
    "load_language",
    "load_metric",
    "load_task",
    "load_validation",
    "measures_of",
    "read_columns",
    "rename_text",
    "stream_blind",
    "tokenize",
    "tokenize_language",
    "unknown_task",
]
