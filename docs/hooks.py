"""What mkdocs does not do by itself: pages that are generated or lie elsewhere in the project, and formulas without JavaScript.

mkdocs calls the functions named on_*; mkdocs.yml names this file.
"""

from __future__ import annotations

import contextlib
import html
import importlib
import io
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

from prunadapt_ds import config, console
from prunadapt_ds.models import table as families
from prunadapt_ds.options import Option, Usage, options_of

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = {  # page of the site: the file it shows
    "slurm.md": "slurm/README.md",
    "deepspeed.md": "ds_configs/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
GENERATED = {  # page of the site: what shows the same in a checkout
    "models.md": "README.md#supported-families",
    "commands.md": "prunadapt_ds/config.py",
}
LEAVING = re.compile(r"\[([^\]]*)\]\((?:benchmarks|tests|prunadapt_ds)/[^)]*\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/."""
    pages = {page: (ROOT / path).read_text(encoding="utf-8") for page, path in ELSEWHERE.items()}
    pages |= {"commands.md": commands_page(), "models.md": models_page()}
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that leave docs/ lead to the page that shows the same file; those of a file from outside lead to the site's pages,
    or are text where the site has none."""
    for shown, path in {**ELSEWHERE, **GENERATED}.items():
        markdown = markdown.replace(f"](../{path}", f"]({shown}")
    if page.file.src_uri not in ELSEWHERE:
        return markdown
    return LEAVING.sub(r"\1", markdown.replace("](docs/", "]("))


def on_page_content(page_html: str, **_: Any) -> str:
    return FORMULA.sub(lambda found: mathml(found[2], is_block=found[1] == "div"), page_html)


def mathml(latex: str, is_block: bool) -> str:
    drawn = convert(html.unescape(latex).strip(), display="block" if is_block else "inline")
    return f'<div class="formula">{drawn}</div>' if is_block else drawn


# ---------------------------------------------------------------------------------------------- command line


def commands_page() -> str:
    """Every command with its options, read off the tables that the programs themselves read."""
    intro = (
        "# Command line\n\nInstalled, every program is a word behind `prunadapt`; in a checkout `prunadapt train` is "
        "`python launcher/train.py`. On several ranks: `deepspeed --module prunadapt_ds train ...`, or "
        "`torchrun --nproc-per-node 2 -m prunadapt_ds train ...`. This page is made from the programs' own tables.\n"
    )
    rows = [("command", "what it is for")]
    rows += [(f"[`{c.name}`](#{c.name})", c.text) for c in console.COMMANDS]
    return "\n".join([intro, table(rows), *map(command_section, console.COMMANDS)])


def command_section(command: console.Command) -> str:
    """Tables of the options where they are fields of dataclasses, otherwise what `--help` prints."""
    module = importlib.import_module(f"prunadapt_ds.{command.module}")
    usage = config.TRAIN if command.name == "train" else getattr(module, "USAGE", None)
    if usage is None:
        return f"\n## {command.name}\n\n```text\n{help_of(command.name)}\n```\n"
    return f"\n## {command.name}\n{options_tables(getattr(module, 'SECTIONS', config.SECTIONS), usage)}"


def options_tables(sections: Mapping[str, type], usage: Usage) -> str:
    parts = [f"\n{usage.description}\n\n```bash\n{usage.example}\n```\n"]
    options = options_of(sections)
    for section, cls in sections.items():
        own = [o for o in options.values() if o.section == section and (usage.takes is None or o.name in usage.takes)]
        if own:
            rows = [("option", "takes", "default", "")]
            rows += [(f"`--{o.name}`", takes(o), default(o), str(o.limits["help"])) for o in own]
            parts.append(f"\n**{(cls.__doc__ or section).strip().rstrip('.')}**\n\n{table(rows)}")
    return "\n".join(parts)


def takes(o: Option) -> str:
    """The values of an option in words."""
    if o.limits["choices"]:
        words = ", ".join(f"`{choice}`" for choice in o.limits["choices"])
    else:
        words = {int: "whole number", float: "number", bool: "`true` or `false`", str: "text"}[o.kind]
    signs = {"least": "≥", "above": ">", "most": "≤", "below": "<"}
    bounds = [f"{sign} {o.limits[name]:g}" for name, sign in signs.items() if o.limits[name] is not None]
    return ", ".join([words + (" (one or more)" if o.is_list else ""), *bounds])


def default(o: Option) -> str:
    if o.default is None:
        return ""
    return f"`{str(o.default).lower() if o.kind is bool else o.default}`"


def help_of(name: str) -> str:
    """What `prunadapt NAME --help` prints, 100 columns wide."""
    words, columns, text = sys.argv, os.environ.get("COLUMNS"), io.StringIO()
    os.environ["COLUMNS"] = "100"
    try:
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            console.main([name, "--help"])
    finally:
        sys.argv = words
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return text.getvalue().strip()


def table(rows: list[tuple[str, ...]]) -> str:
    """Markdown; the first row is the header."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def models_page() -> str:
    return (
        "# Models\n\nFamilies of backbones, by `model_type` of a `config.json`. What a column means: "
        "[how it works](method.md#units), [exports](exports.md).\n\n"
        f"{families.table()}\n\n"
        "*fused*: query, key and value (or gate and up) share one matrix, whose rows are cut in place. *shared layers*: one block "
        "runs several times and is cut once for all of them. A new family is one record: [contributing](contributing.md).\n"
    )
