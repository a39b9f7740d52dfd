"""Which transformers auto class loads a model."""

from __future__ import annotations

from typing import Any

CLASSIFIER, LANGUAGE_MODEL = "AutoModelForSequenceClassification", "AutoModelForCausalLM"


def name_of(is_language: bool) -> str:
    """The auto class for a language model or, if not `is_language`, for a classifier."""
    return LANGUAGE_MODEL if is_language else CLASSIFIER


def name_for(stock: str) -> str:
    """The auto class that loads the stock class named `stock`."""
    return name_of(stock.endswith(("ForCausalLM", "LMHeadModel")))


def auto_class(is_language: bool) -> Any:
    """Like `name_of`, but returns the class."""
    import transformers

    return getattr(transformers, name_of(is_language))
