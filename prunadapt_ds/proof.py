"""Proves an export: a fresh process that does not import this package loads the folder and must compute the same logits.

That process runs `reload.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunadapt_ds import reload
from prunadapt_ds.batches import Rows
from prunadapt_ds.errors import Interrupted, ParityError, PrunadaptError
from prunadapt_ds.formats import auto_class_of
from prunadapt_ds.label_scale import OWN_UNIT, LabelScale
from prunadapt_ds.signals import STOP_SIGNALS

TOLERANCE = 1e-4  # for max |logit difference|, relative to max(1, max |logit|)
OF_A_RANK = ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")
ROUNDING = 2**-22  # of a label far from 0 in fp32, relative to it: what the export answers is rounded to that


@dataclass(frozen=True)
class Reload:
    """A folder, and what a fresh process should compute from it.

    `latency`: {"batch_size", "seq_length", "repeats", "dtype"} to also time it against the dense stock model; None: no timing.
    `adapter_of`: base of the PEFT adapter in the folder: {"model", "auto_class", "num_labels", "pad_token_id"}; None: a model.
    """

    folder: Path
    datasets: dict[str, Rows]
    batch_size: int
    device: torch.device
    needs_remote_code: bool = False
    dtype: str = "float32"
    latency: dict[str, Any] | None = None
    adapter_of: dict[str, Any] | None = None

    def request(self, scratch: Path) -> dict[str, Any]:
        """The request in the form that reload.py reads. The answers go to `scratch`."""
        rows = next(iter(self.datasets.values()))
        return {
            "folder": str(self.folder.resolve()),
            "rows": {name: [rows.row(i) for i in range(len(rows))] for name, rows in self.datasets.items()},
            "labels": {
                n: list(rows.token_labels) for n, rows in self.datasets.items() if rows.token_labels is not None
            },
            "auto_class": self.adapter_of["auto_class"] if self.adapter_of else auto_class_of(self.folder),
            "needs_remote_code": self.needs_remote_code,
            "pad_token_id": rows.tokenizer.pad_token_id,
            "most_tokens": rows.tokenizer.model_max_length,
            "batch_size": self.batch_size,
            "device": str(self.device),
            "dtype": self.dtype,
            "latency": self.latency,
            "adapter_of": self.adapter_of,
            "logits": str(scratch / "logits.safetensors"),
            "result": str(scratch / "result.json"),
        }


@dataclass(frozen=True)
class Reloaded:
    """What a fresh process computed from an exported folder: `reload.summary` float32 [N, C] per dataset, and timings."""

    logits: dict[str, Tensor]
    latency: dict[str, Any] | None


def reload_in_fresh_process(*reloads: Reload) -> list[Reloaded]:
    """Load each folder in a new Python process that does not import this package, and predict.

    One process serves all folders, because most of its time goes into imports. Folders that need remote code come last.
    Raises ParityError with the end of the process's stderr if it fails, and Interrupted if a signal stopped it.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        order = sorted(range(len(reloads)), key=lambda i: reloads[i].needs_remote_code)
        for i in order:
            (scratch / str(i)).mkdir()
            (scratch / str(i) / "request.json").write_text(json.dumps(reloads[i].request(scratch / str(i))))
        script = shutil.copyfile(Path(reload.__file__), scratch / "reload.py")
        requests = [str(scratch / str(i) / "request.json") for i in order]
        done = run_script(script, requests, environment(scratch), scratch)
        if done.returncode != 0:
            raise_if_stopped(done)
            failed = next((i for i in order if not (scratch / str(i) / "result.json").exists()), order[-1])
            folder = reloads[failed].folder
            raise ParityError(f"the exported folder {folder} could not be reloaded:\n{done.stderr[-3000:]}")
        answers = [scratch / str(i) for i in range(len(reloads))]
        results = [json.loads((a / "result.json").read_text()) for a in answers]
        for asked, result in zip(reloads, results, strict=True):
            if result["on_cpu_because"]:
                print(
                    f"{asked.folder} was proven on the CPU and not timed: {result['on_cpu_because']}", file=sys.stderr
                )
        return [
            Reloaded(load_file(a / "logits.safetensors"), result.get("latency"))
            for a, result in zip(answers, results, strict=True)
        ]


def environment(scratch: Path) -> dict[str, str]:
    """Environment of a process that is no rank, asks no hub, and keeps the code that it loads in `scratch`."""
    kept = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
    return kept | {"HF_MODULES_CACHE": f"{scratch}/modules", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def run_script(
    script: Path, arguments: list[str], environment: dict[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run a script in a new Python process, with `folder` as its working directory."""
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


def raise_if_stopped(done: subprocess.CompletedProcess[str]) -> None:
    """Raise Interrupted if a stop signal ended the process: terminals and SLURM send these to all processes of a run.

    Raises PrunadaptError if another signal did, which says nothing about the export.
    """
    for number in STOP_SIGNALS:
        if done.returncode == -number:
            raise Interrupted(
                f"stopped by {number.name} before the export was proven; the same command goes on from there"
            )
    if done.returncode == -signal.SIGKILL:
        raise PrunadaptError(
            "the process that loads the export was killed, as the system does when memory runs out (it holds the model in fp32); "
            "with more memory for rank 0's host the same command goes on from here"
        )
    if done.returncode < 0:
        raise PrunadaptError(
            f"the process that loads the export was ended by signal {-done.returncode}:\n{done.stderr[-3000:]}"
        )


def compare_logits(pairs: dict[str, tuple[Tensor, Tensor]], scale: LabelScale = OWN_UNIT) -> dict[str, float]:
    """The report's parity block over all datasets.

    pairs: (trained, exported) logits by dataset, float32 [N, C] each. A NaN counts as an infinite difference. `scale`: that of
    a regression's labels, in whose unit the logits are. As the model learnt them they are numbers around 1, and the tolerance
    is for these.
    """
    trained, exported = (torch.cat([pair[i].flatten() for pair in pairs.values()]) for i in (0, 1))
    difference = float((trained - exported).abs().nan_to_num(nan=torch.inf).max())
    return {
        "max_abs_logit_diff": difference if difference < torch.inf else sys.float_info.max,
        "tolerance": TOLERANCE * scale.std * max(1.0, float(scale.standardised(trained).abs().max()))
        + ROUNDING * abs(scale.mean),
        "examples": sum(len(logits) for logits, _ in pairs.values()),
    }


def require(parity: Mapping[str, Any], exported: object, trained: object) -> None:
    """Raise ParityError, which names both sides, unless the logits that `compare_logits` compared agree within the tolerance."""
    difference, tolerance = parity["max_abs_logit_diff"], parity["tolerance"]
    if not difference <= tolerance:
        raise ParityError(
            f"{exported} differs from {trained} by {difference:.2e} in its logits; the tolerance is {tolerance:.2e}"
        )
