"""Make other folders from what a finished run left, without training again, and prove each against the compact one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prunadapt_ds import distributed, export, formats
from prunadapt_ds.batches import Rows
from prunadapt_ds.config import EXPORT_DTYPES
from prunadapt_ds.entry import guarded
from prunadapt_ds.errors import ParityError, Problem, PrunadaptError, UserError

KINDS = ("padded", "uniform")
_EXAMPLE = "example: prunadapt export --run_dir outputs --export_formats padded uniform"
EXAMPLES, TOKENS = 64, 24  # random rows on which a new folder must compute what the compact one does


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, convert on rank 0, prove; returns the exit code."""
    options = _parser().parse_args(argv)
    return guarded(lambda: run(Path(options.run_dir), options.export_formats, options.export_dtype))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, epilog=_EXAMPLE, allow_abbrev=False)
    parser.add_argument("--run_dir", required=True, help="output_dir of a finished run")
    parser.add_argument(
        "--export_formats", nargs="+", required=True, choices=KINDS, help="folders to write in exports/"
    )
    parser.add_argument("--export_dtype", choices=EXPORT_DTYPES, help="dtype of the weights [as in exports/compact]")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser


def run(run_dir: Path, kinds: Sequence[str], dtype: str | None = None) -> None:
    """Rank 0 works, the others wait for its verdict. The report's `exports` gains the new folders.

    Raises UserError for a folder that no finished run left and a format that cannot say its plan, ParityError where a new
    folder computes something else.
    """
    distributed.init()
    failure: tuple[str, str] | None = None
    if distributed.rank() == 0:
        try:
            for kind in kinds:
                make(run_dir, kind, dtype)
        except PrunadaptError as error:
            failure = (type(error).__name__, str(error))
            caught = error
    failure = distributed.broadcast_object(failure)
    if failure is None:
        return
    if distributed.rank() == 0:
        raise caught
    raise (
        ParityError(failure[1])
        if failure[0] == "ParityError"
        else UserError(Problem("run_dir", str(run_dir), failure[1]))
    )


def make(run_dir: Path, kind: str, dtype: str | None) -> Path:
    """Write exports/<kind> of a run, and prove it."""
    compact, plan = run_dir / "exports" / "compact", run_dir / "plan.json"
    for path in (compact / "config.json", plan, run_dir / "report.json"):
        if not path.is_file():
            remedy = f"{path.relative_to(run_dir)} is missing; name the --output_dir of a run that has finished"
            raise UserError(Problem("run_dir", str(run_dir), remedy))
    folder = run_dir / "exports" / kind
    formats.convert(kind, compact, json.loads(plan.read_text()), folder)
    prove(compact, folder)
    if dtype is not None:
        export.cast(folder, getattr(torch, dtype))
    report = json.loads((run_dir / "report.json").read_text())
    report["exports"][kind] = {"path": str(Path("exports") / kind), "needs_remote_code": False}
    (run_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {folder}")
    return folder


def prove(compact: Path, folder: Path) -> None:
    """Both folders, loaded by fresh processes, compute the same on random rows."""
    rows = random_rows(compact)
    found = []
    for path in (compact, folder):
        remote = "auto_map" in json.loads((path / "config.json").read_text())
        reloaded = export.reload_in_fresh_process(
            path, {"random": rows}, needs_remote_code=remote, batch_size=16, device=distributed.device()
        )
        found.append(reloaded.logits["random"])
    parity = export.compare_logits({"random": (found[0], found[1])})
    if not parity["max_abs_logit_diff"] <= parity["tolerance"]:
        raise ParityError(f"{folder} differs from {compact} by {parity['max_abs_logit_diff']:.2e} in its logits")


def random_rows(folder: Path) -> Rows:
    from datasets import Dataset
    from transformers import AutoTokenizer

    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config["vocab_size"], (EXAMPLES, TOKENS), generator=generator).tolist()
    lengths = torch.randint(2, TOKENS + 1, (EXAMPLES,), generator=generator).tolist()
    data = Dataset.from_dict(
        {
            "input_ids": [row[:n] for row, n in zip(ids, lengths, strict=True)],
            "attention_mask": [[1] * n for n in lengths],
            "labels": [0] * EXAMPLES,
        }
    )
    return Rows(data, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
