"""Generates the table of supported families from their records: `python -m prunadapt_ds.models.table README.md`.

Rewrites the text between the markers in a Markdown file.
"""

from __future__ import annotations

import sys
from pathlib import Path

from prunadapt_ds.models.families import FAMILIES, Family

BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"


def row(family: Family) -> str:
    """One line of the table."""
    fused = any(len(p.parts) > 1 or p.parts == ("qkv",) for p in (*family.heads.inputs, *family.neurons.inputs))
    names = [p.path.split(".")[-1] for p in (*family.heads.inputs, family.heads.output)]
    grouped = any(name == "kv_heads" for _, _, name in family.heads.attributes) or any(
        name == "kv_heads" for _, name in family.heads.config_fields
    )
    tasks = "classification, language" if family.is_decoder else "classification"
    unit = "key/value group (query head if there is one key)" if grouped else "head"
    uniform = [kind for kind in ("heads", "neurons") if getattr(family, kind).config_fields]
    uniform += ["whole layers"] * family.drops_layers
    notes = ["fused"] * fused + ["shared layers"] * family.shares_layers
    cells = [
        f"`{family.model_type}`",
        tasks,
        unit,
        ", ".join(f"`{n}`" for n in names),
        ", ".join(uniform),
        ", ".join(notes),
    ]
    return "| " + " | ".join(cells) + " |"


def table() -> str:
    """All families, in the order of the records."""
    head = [
        "| family | tasks | attention is cut by | attention projections | cut by `--uniform` | |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(row(family) for family in FAMILIES.values())])


def updated(text: str) -> str:
    """The document `text` with the current table between its markers. Raises ValueError if it has none."""
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"the document has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
