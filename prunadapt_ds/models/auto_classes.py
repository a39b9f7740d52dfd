"""Which of transformers' auto classes loads a model."""

from __future__ import annotations

from typing import Any

CLASSIFIER, LANGUAGE_MODEL = "AutoModelForSequenceClassification", "AutoModelForCausalLM"


def name_of(is_language: bool) -> str:
    """By what the model is trained to do."""
    return LANGUAGE_MODEL if is_language else CLASSIFIER


def name_for(stock: str) -> str:
    """By the name of a stock class."""
    return name_of(stock.endswith(("ForCausalLM", "LMHeadModel")))


def auto_class(is_language: bool) -> Any:
    """The class itself."""
    import transformers

    return getattr(transformers, name_of(is_language))
