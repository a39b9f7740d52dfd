"""Files that come with the package and are not code: DeepSpeed configurations and SLURM templates.

In a checkout they lie beside the package, where people look for them; an installed package has them inside (pyproject.toml
puts them there). Only this module needs to know which.
"""

from __future__ import annotations

from pathlib import Path

FOLDERS = ("ds_configs", "slurm")
_PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """The folder with the files of one of `FOLDERS`."""
    assert name in FOLDERS, name
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def find(path: str) -> Path:
    """`path`, or if it does not exist, the package's own file of that name: `ds_configs/zero3.json` works in any folder."""
    given = Path(path)
    if not given.exists() and len(given.parts) == 2 and given.parts[0] in FOLDERS:
        own = folder(given.parts[0]) / given.parts[1]
        return own if own.is_file() else given
    return given
