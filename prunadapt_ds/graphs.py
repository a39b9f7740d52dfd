"""Exports a compact folder as a graph for runtimes without transformers, and checks that it computes the same logits.

    onnx           model.onnx (and model.onnx.data above 1.5 GB): for onnxruntime and other ONNX runtimes
    torch_export   model.pt2: for torch.export.load and ahead-of-time compilers

Graphs take any batch size and sequence length and are fp32; language models return the logits of all tokens and use no cache.
A separate process does the work (tracing.py); the folder appears once the check has passed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunadapt_ds import formats, proof
from prunadapt_ds.config import EXPORT_FORMATS
from prunadapt_ds.errors import Problem, PrunadaptError
from prunadapt_ds.files import discard, whole_folder
from prunadapt_ds.label_scale import OWN_UNIT, LabelScale
from prunadapt_ds.older_readers import TOKENIZER_CONFIG, write_config, write_tokenizer_config

KINDS = ("onnx", "torch_export")
ALL_KINDS = (*EXPORT_FORMATS, *KINDS)  # graphs and folders of weights


def discard_exports(run_dir: Path, kept: Sequence[str] = ()) -> None:
    """Remove exports/KIND for all kinds except those `kept`."""
    for kind in set(ALL_KINDS) - set(kept):
        discard(run_dir / "exports" / kind)


ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def problems(kinds: Sequence[str], dtype: str | None) -> list[Problem]:
    """The problems with requesting these formats and this dtype on this machine."""
    found = []
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if "onnx" in kinds and missing:
        remedy = f"{', '.join(missing)} is not installed; run `pip install onnx onnxscript onnxruntime`"
        found.append(Problem("export_formats", "onnx", remedy))
    graphs = [kind for kind in kinds if kind in KINDS]
    if graphs and dtype not in (None, "float32"):
        found.append(Problem("export_dtype", dtype, f"{' and '.join(graphs)} are written in float32; leave it out"))
    return found


def convert(kind: str, compact: Path, folder: Path, scale: LabelScale = OWN_UNIT) -> dict[str, Any]:
    """Write `folder` in the format `kind` and check its logits. Returns the report's entries {parity, latency}.

    `scale`: that of a regression's labels.

    Raises ParityError if the graph's logits differ from those of the compact folder's model, and PrunadaptError if no graph
    could be made. In both cases, no folder is left behind.
    """
    with whole_folder(folder) as unfinished, tempfile.TemporaryDirectory() as scratch:
        formats.copy_others(compact, unfinished)
        write_small_files(compact, unfinished)
        logits, found = traced(kind, compact, unfinished, Path(scratch))
        parity = proof.compare_logits({kind: (logits["compact"], logits["exported"])}, scale)
        parity |= {"examples": found["examples"]}
        proof.require(parity, folder, compact)
    return {"parity": parity, "latency": found["latency"]}


def write_small_files(compact: Path, folder: Path) -> None:
    """Write a stock configuration, and make the tokenizer pad on the right: graphs count positions from the left."""
    config = formats.stock_config(json.loads((compact / "config.json").read_text()))
    write_config(folder, config | {"use_cache": False, "dtype": "float32"})
    tokenizer_file = folder / TOKENIZER_CONFIG
    if tokenizer_file.is_file():
        write_tokenizer_config(folder, json.loads(tokenizer_file.read_text()) | {"padding_side": "right"})


def traced(kind: str, compact: Path, folder: Path, scratch: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the graph. Returns the logits {"compact", "exported"} on the same rows, float32 [N] each, and {examples, latency}."""
    from safetensors.torch import load_file

    request: dict[str, Any] = {
        "kind": kind,
        "compact": str(compact.resolve()),
        "folder": str(folder.resolve()),
        "needs_remote_code": "auto_map" in json.loads((compact / "config.json").read_text()),
        "auto_class": formats.auto_class_of(compact),
        "logits": f"{scratch}/logits.safetensors",
        "result": f"{scratch}/result.json",
    }
    trace(request, scratch)
    return load_file(request["logits"]), json.loads(Path(request["result"]).read_text())


def trace(request: dict[str, Any], scratch: Path) -> None:
    """Answer `request` in a separate process, see tracing.py. Raises PrunadaptError with the end of its stderr if it fails."""
    (scratch / "request.json").write_text(json.dumps(request))
    here = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = proof.environment(scratch) | {"PYTHONPATH": here}
    done = subprocess.run(
        [sys.executable, "-m", "prunadapt_ds.tracing", f"{scratch}/request.json"],
        env=environment,
        cwd=scratch,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        proof.raise_if_stopped(done)
        raise PrunadaptError(
            f"no {request['kind']} graph could be made from {request['compact']}:\n{done.stderr[-3000:]}"
        )
