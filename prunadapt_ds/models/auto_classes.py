"""Which transformers auto class loads a model."""

from __future__ import annotations

from typing import Any

CLASSIFIER, LANGUAGE_MODEL = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
# Auto classes for a folder with code of its own, and transformers' tables of the classes that they make.
_TABLES = {
    "AutoModel": "MODEL_MAPPING",
    CLASSIFIER: "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    LANGUAGE_MODEL: "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
}


def name_of(is_language: bool) -> str:
    """The auto class for a language model or, if not `is_language`, for a classifier."""
    return LANGUAGE_MODEL if is_language else CLASSIFIER


def name_for(stock: str) -> str:
    """The auto class that loads the stock class named `stock`."""
    return name_of(stock.endswith(("ForCausalLM", "LMHeadModel")))


def stock_classes(model: Any) -> dict[str, str]:
    """By auto class: the name of the stock class that it makes of the model's configuration, the model's own among them.

    Only classes that call the base model what this one does (LlamaForQuestionAnswering does not), and so find its weights.
    """
    import transformers

    own, kind = type(model).__name__, type(model.config)
    tables = {name: getattr(transformers, table) for name, table in _TABLES.items()}
    found = {name: table[kind] for name, table in tables.items() if kind in table}
    akin = {name: c.__name__ for name, c in found.items() if c.base_model_prefix == model.base_model_prefix}
    return akin | {name_for(own): own}


def auto_class(is_language: bool) -> Any:
    """Like `name_of`, but returns the class."""
    import transformers

    return getattr(transformers, name_of(is_language))
