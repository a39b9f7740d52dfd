"""Export a run in other formats without training again, and prove each against the compact folder.

An interrupted run has no compact folder yet: it is made first, from the newest intact checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os.path
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prunadapt_ds import card, distributed, files, formats, graphs, label_scale, model_folder, proof
from prunadapt_ds.batches import Rows
from prunadapt_ds.commands import unfinished
from prunadapt_ds.config import EXPORT_DTYPES
from prunadapt_ds.entry import guarded
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.label_scale import LabelScale
from prunadapt_ds.models import modeling_prunadapt
from prunadapt_ds.options import Help, Parser, as_called

KINDS = ("compact", "padded", "uniform", *graphs.KINDS)
_EXAMPLE = "prunadapt export --run_dir outputs --export_formats padded onnx"
EXAMPLES, TOKENS = 64, 24  # random rows on which a new folder must compute what the compact one does


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `argv`, convert on rank 0, and prove the result; returns the exit code."""

    def work() -> None:
        options = _parser().parsed(argv)
        trusts = options.trust_remote_code
        run(Path(options.run_dir), options.export_formats, options.export_dtype, trust_remote_code=trusts)

    return guarded(work)


def _parser() -> Parser:
    parser = Parser(
        description=__doc__, epilog=f"example: {as_called(_EXAMPLE)}", formatter_class=Help, allow_abbrev=False
    )
    parser.add_argument("--run_dir", required=True, help="output_dir of a run that is finished, or was interrupted")
    parser.add_argument(
        "--export_formats",
        nargs="+",
        required=True,
        choices=KINDS,
        help="folders to write in exports/; `compact` only for an interrupted run, which gets it in any case",
    )
    parser.add_argument("--export_dtype", choices=EXPORT_DTYPES, help="dtype of the weights [as in exports/compact]")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run code that comes with the backbone of an interrupted run"
    )
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser


def run(run_dir: Path, kinds: Sequence[str], dtype: str | None = None, *, trust_remote_code: bool = False) -> None:
    """Export a run in the formats `kinds`, and add the new folders to the `exports` of its report.

    Rank 0 makes the folders while the others wait; all ranks make the compact folder of an interrupted run.
    Raises UserError for a folder that no run left, for one with modelling code that is not ours, and for a format that cannot
    represent its plan; ParityError if a new folder computes something else.
    """
    distributed.init()
    start = distributed.on_rank_0(f"reading {run_dir}", lambda: unfinished.find(run_dir))
    distributed.together(lambda: check(run_dir, kinds, dtype, is_finished=start is None))
    if start is not None and ("compact" in kinds or not unfinished.is_exported(run_dir, start)):
        unfinished.export(run_dir, start, dtype, trust_remote_code=trust_remote_code)
    others = [kind for kind in kinds if kind != "compact"] if start else kinds
    status = "interrupted" if start else "complete"
    distributed.on_rank_0(f"exporting from {run_dir}", lambda: make_all(run_dir, others, dtype, status))


def check(run_dir: Path, kinds: Sequence[str], dtype: str | None, *, is_finished: bool) -> None:
    """Raise UserError for formats that cannot be made here."""
    found = graphs.problems(kinds, dtype)
    if "compact" in kinds and is_finished and (run_dir / "exports" / "compact").is_dir():
        found.append(Problem("export_formats", "compact", "the run is finished and has written it; leave it out"))
    if found:
        raise UserError(found)


def make_all(run_dir: Path, kinds: Sequence[str], dtype: str | None, status: str) -> None:
    if not kinds:
        return
    with files.OwnedFolder(run_dir):  # or another export's entry in the report would be lost
        for kind in kinds:
            make(run_dir, kind, dtype, status)


def make(run_dir: Path, kind: str, dtype: str | None, status: str) -> None:
    """Write exports/<kind> of a run whose report must have this status, and prove it. For rank 0."""
    compact, plan = run_dir / "exports" / "compact", run_dir / "plan.json"

    def refuse(remedy: str) -> UserError:
        return UserError(Problem("run_dir", str(run_dir), remedy))

    for path in (compact / "config.json", plan, run_dir / "report.json"):
        if not os.path.isfile(path):
            missing = f"{path.relative_to(run_dir)} is missing, and there is no intact checkpoint in checkpoints/"
            raise refuse(f"{missing}; name the --output_dir of a run that has finished or was interrupted")
    report = files.read_object(run_dir / "report.json", refuse)
    if report.get("status") != status or not isinstance(report.get("exports"), dict):
        remedy = (
            "report.json is not that of a finished run, and there is no intact checkpoint; go on with the run first"
        )
        raise refuse(remedy)
    if not only_our_code(compact, files.read_object(compact / "config.json", refuse)):
        raise refuse(
            f"exports/compact needs other code than this version's {formats.MODELING_FILE}, and no other is run; "
            "export with the version that trained it"
        )
    model_folder.check(str(compact), to_train=False, field="run_dir")
    folder = run_dir / "exports" / kind
    kept = formats.read_plan(plan, compact)
    more: dict[str, Any] = {}
    scale = LabelScale(*files.unless_damaged(run_dir / "run.json").get("label_scale", ()))
    label_scale.refuse_dtype(scale, dtype)

    def prove_and_cast(unfinished: Path) -> None:
        prove(compact, unfinished, scale)
        if dtype is not None:
            formats.cast(unfinished, getattr(torch, dtype))

    if kind in graphs.KINDS:
        more = graphs.convert(kind, compact, folder, scale)
    else:
        formats.convert(kind, compact, kept, folder, prove_and_cast)
    if (compact / "README.md").is_file():
        text = (compact / "README.md").read_text(encoding="utf-8")
        files.replace(folder / "README.md", card.remade(text, kind))
    report["exports"][kind] = {"path": str(Path("exports") / kind), "needs_remote_code": False} | more
    files.replace(run_dir / "report.json", json.dumps(report, indent=2) + "\n")
    print(f"wrote {folder}{said(more)}")


def said(more: dict[str, Any]) -> str:
    """What was measured of an exported graph, for the line about it; "" if nothing was."""
    if not more:
        return ""
    parity, latency = more["parity"], more["latency"]
    return (
        f": logits differ by {parity['max_abs_logit_diff']:.1e}; {latency['exported_ms']:.1f} ms for "
        f"{latency['seq_length']} tokens on {latency['threads']} thread(s), where torch takes {latency['compact_ms']:.1f} ms "
        "for exports/compact"
    )


def only_our_code(folder: Path, config: dict[str, Any]) -> bool:
    """Whether a folder needs no code, or the package's own, byte for byte: a run's folder may come from anybody."""
    named = config.get("auto_map", {})
    if named == {}:
        return True
    ours = Path(modeling_prunadapt.__file__)
    try:
        return (folder / formats.MODELING_FILE).read_bytes() == ours.read_bytes() and all(
            str(value).startswith(f"{ours.stem}.") for value in named.values()
        )
    except (OSError, AttributeError):
        return False


def prove(compact: Path, folder: Path, scale: LabelScale) -> None:
    """Check in a fresh process that both folders compute the same on random rows. Raises ParityError."""
    rows = {"random": random_rows(compact)}
    pair = [
        proof.Reload(path, rows, 16, distributed.device(), "auto_map" in json.loads((path / "config.json").read_text()))
        for path in (compact, folder)
    ]
    found = [answer.logits["random"] for answer in proof.reload_in_fresh_process(*pair)]
    proof.require(proof.compare_logits({"random": (found[0], found[1])}, scale), folder, compact)


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
