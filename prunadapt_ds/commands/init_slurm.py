"""Copies SLURM templates and DeepSpeed configurations to a folder from which jobs are submitted."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from prunadapt_ds import files, resources
from prunadapt_ds.errors import Problem, UserError, exit_code_of
from prunadapt_ds.options import Help, Parser, as_called

_EXAMPLE = "prunadapt init-slurm my-project"


def main(argv: Sequence[str] | None = None) -> int:
    """Copy the files. Returns the exit code."""
    parser = Parser(description=__doc__, epilog=f"example: {as_called(_EXAMPLE)}", formatter_class=Help)
    parser.add_argument("folder", type=Path, metavar="DIR", help="created if it does not exist")
    return exit_code_of(lambda: copy(parser.parsed(argv).folder))


def copy(target: Path) -> None:
    """Write `slurm/` and `ds_configs/` to `target`. Raises UserError, before anything is copied, if one of them exists."""
    there = [name for name in resources.FOLDERS if os.path.exists(target / name)]  # a path's own method may raise
    if there:
        remedy = "exists already and may contain your changes; name another folder, or move it away"
        raise UserError([Problem("folder", str(target / name), remedy) for name in there])
    try:
        with files.owner_writes_alone():
            for name in resources.FOLDERS:
                with files.whole_folder(target / name) as unfinished:
                    for file in sorted(resources.folder(name).iterdir()):
                        if file.suffix in (".sh", ".json", ".md"):
                            shutil.copyfile(file, unfinished / file.name)
    except OSError as error:
        raise UserError(Problem("folder", str(target), f"cannot be written ({error.strerror})")) from error
    print(
        f"wrote {target}/slurm and {target}/ds_configs. Next: cd {shlex.quote(str(target))}, add your site's setup to"
    )
    print("site_setup in slurm/common.sh, then for example: sbatch slurm/train.sh --task_name mrpc")
