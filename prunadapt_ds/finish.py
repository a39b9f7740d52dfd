"""The end of a run: score, export, reload in a fresh process, compare, report."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunadapt_ds import (
    adapter_folder,
    board,
    card,
    distributed,
    export,
    files,
    formats,
    graphs,
    label_scale,
    model_folder,
    outline,
    pages,
    proof,
    report,
    snapshot,
    watchdog,
)
from prunadapt_ds.batches import Rows
from prunadapt_ds.clocks import PHASES
from prunadapt_ds.errors import Interrupted, PrunadaptError
from prunadapt_ds.faults import fault_point
from prunadapt_ds.label_scale import LabelScale
from prunadapt_ds.logits import exact_products, upcast_parameters
from prunadapt_ds.models.structure import full_numel
from prunadapt_ds.session import Session, answers, evaluate, measures

PARITY_EXAMPLES = 512  # per validation set; fp32 runs compare all of them, except for language models


@exact_products()  # for merging weights and comparing logits
def finish(
    session: Session, stop_if_asked: Callable[[], None] = lambda: None, facts: Mapping[str, Any] | None = None
) -> None:
    """Score, export, reload in a fresh process, compare, report. Collective.

    `stop_if_asked` is called wherever the run can stop and be resumed. `facts`: if another process did the training, what its
    report says of it (status, device, ranks, command), which replaces what this process would say. Raises ParityError if the
    export's logits differ by more than the tolerance.
    """
    watchdog.rest()
    fault_point("finish/begin")
    if facts is None:
        session.note_peak()
    masked_metrics, masked = evaluate(session)
    watchdog.rest()
    session.tracker.log(session.total_steps, "finish", {"eval/score": masked_metrics["score"]})
    reference = parity_reference(session, masked)
    folder = session.output_dir / "exports" / "compact"
    stop_if_asked()
    watchdog.rest()
    fault_point("export/begin")
    # An earlier export of this run may have left folders with other weights.
    distributed.on_rank_0("clearing exports", lambda: graphs.discard_exports(session.output_dir, formats_of(session)))
    needs_remote_code = export.export(
        session.model,
        session.backbone.layout,
        session.plan,
        session.backbone.tokenizer,
        folder,
        session.present,
        head=label_scale.fold(session.label_scale, session.backbone),
    )
    if "adapter" in formats_of(session):
        base = model_folder.locate(session.config.model.model_name_or_path)
        adapter_folder.write(
            session.backbone,
            base,
            session.lora_targets,
            session.config.lora,
            folder.parent / "adapter",
            head=label_scale.fold(session.label_scale, session.backbone),
        )
    describe(session)
    session.report["status"] = "complete"  # before the model cards, which state it
    report.fill(session.report, facts or {})
    session.report["metric"]["masked"] = masked_metrics
    fault_point("export/end")
    stop_if_asked()
    watchdog.rest()
    release_cached(session.device)  # the proof is a second process on rank 0's GPU
    distributed.on_rank_0_for_long(
        "proving the export", lambda: prove(session, folder, needs_remote_code, masked, reference), watchdog.rest
    )
    fault_point("report")
    write_report(session, session.report["status"])
    options, found = board.options_of(session.config.to_dict()), board.measures_of(session.report)
    session.tracker.show(lambda writer: board.result(writer, options, found, session.config.given))
    session.tracker.say(report.table(session.report))
    task = session.data.task
    session.tracker.say(
        outline.footer(session.config, task.name, is_pair=bool(task.sentence2), board_dir=session.ds.board_dir)
    )
    session.tracker.close()


def release_cached(device: torch.device) -> None:
    """Return the unused memory that an accelerator's allocator has cached."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def write_report(session: Session, status: str) -> None:
    """Set the report's status and write it in all its formats. Collective."""
    session.report["status"] = status
    texts = functools.partial(text_of, session)
    distributed.on_rank_0("writing the report", lambda: pages.write(session.output_dir, session.report, texts))


def report_unfinished(session: Session, error: PrunadaptError) -> None:
    """Write a report of a run that ends early, with all that is known, if it can be written. Collective."""
    session.tracker.close()
    describe(session)
    with contextlib.suppress(PrunadaptError):  # perhaps the very one that ended the run, such as a full disk
        write_report(session, "interrupted" if isinstance(error, Interrupted) else "failed")


def formats_of(session: Session) -> list[str]:
    return session.config.output.export_formats or ["compact"]


def dtype_of(session: Session) -> str:
    """The dtype of the exported weights: --export_dtype, or that of the checkpoint that was loaded if labels fit it."""
    stored = session.backbone.stored_dtype
    fitting = stored if session.label_scale.fits(getattr(torch, stored)) else "float32"
    return session.config.output.export_dtype or fitting


def parity_reference(session: Session, masked: dict[str, Tensor]) -> dict[str, Tensor]:
    """fp32 logits of the masked model to compare the export with: [N, C] by validation set.

    They are `masked` itself if the run is fp32 and not of a language model; otherwise those of the first rows, computed again
    with upcast parameters.
    """
    if session.ds.dtype == "fp32" and not session.data.task.is_language:
        return masked
    with session.clocks.timed("evaluation"), upcast_parameters(session.model):
        return answers(session, compared_rows(session))


def compared_rows(session: Session) -> dict[str, Rows]:
    """The first rows of each validation set; for language models without labels, to predict the last token's logits."""
    some = {name: rows.head(PARITY_EXAMPLES) for name, rows in session.validation_rows.items()}
    if not session.data.task.is_language:
        return some
    return {f"{name}/last_token": rows.without_labels() for name, rows in some.items()}


def prove(
    session: Session, folder: Path, needs_remote_code: bool, masked: dict[str, Tensor], reference: dict[str, Tensor]
) -> None:
    """Rank 0: reload the export without this package and compare; complete the report and the model cards.

    The comparison uses fp32 weights, which are cast to a lower dtype afterwards. Raises ParityError if the logits differ.
    """
    config, result = session.config, session.report
    export_dtype = dtype_of(session)

    def compact(dtype: str, latency: bool) -> proof.Reload:
        low = "bfloat16" if session.ds.dtype == "bf16" else "float32"
        return proof.Reload(
            folder,
            {**compared_rows(session), **session.validation_rows},
            session.eval_batch_size,
            session.device,
            needs_remote_code=needs_remote_code,
            dtype=dtype,
            latency={**session.timing, "dtype": low} if latency else None,
        )

    files.replace(session.output_dir / "plan.json", json.dumps(session.plan.to_dict(), sort_keys=True))
    others = [write_format(session, kind, folder) for kind in formats_of(session)[1:]]
    reloaded = proof.reload_in_fresh_process(compact("float32", latency=export_dtype == "float32"), *others)
    found = [parity(reference, one, session.label_scale) for one in reloaded]
    result["parity"] |= max(found, key=lambda one: one["max_abs_logit_diff"])
    exported = reloaded[0]
    if export_dtype != "float32":
        for written in (folder, *(other.folder for other in others if other.adapter_of is None)):
            formats.cast(written, getattr(torch, export_dtype))
        (exported,) = proof.reload_in_fresh_process(compact(export_dtype, latency=True))
    result["latency"] |= exported.latency or {}
    write_predictions(session, masked, exported.logits)
    proof.require(result["parity"], "the export", "the trained model")
    result["metric"]["exported"] = measures(session, exported.logits)
    result["exports"] = {
        kind: {"path": str(Path("exports") / kind), "needs_remote_code": needs_remote_code and kind == "compact"}
        for kind in formats_of(session)
    }
    model = config.model.model_name_or_path
    base = card.stated(model)
    for kind in formats_of(session):
        files.replace(folder.parent / kind / "README.md", card.render(result, model, session.data.task, kind, base))


def parity(reference: dict[str, Tensor], exported: proof.Reloaded, scale: LabelScale) -> dict[str, float]:
    """Compare the rows that both sides have; one of them may have the first ones only. Logits are float32 [N, C] by dataset."""
    pairs = {name: (logits, exported.logits[name]) for name, logits in reference.items()}
    shared = {name: min(len(logits) for logits in pair) for name, pair in pairs.items()}
    return proof.compare_logits({name: (a[: shared[name]], b[: shared[name]]) for name, (a, b) in pairs.items()}, scale)


def write_format(session: Session, kind: str, compact: Path) -> proof.Reload:
    """Rank 0: write one more format beside the compact folder; returns how to prove it, with stock classes."""
    folder, base = compact.parent / kind, None
    if kind == "adapter":  # all ranks have written it
        base = adapter_folder.base_of(session.backbone, session.config.model.model_name_or_path)
    else:
        formats.convert(kind, compact, session.plan.to_dict(), folder)
    return proof.Reload(folder, compared_rows(session), session.eval_batch_size, session.device, adapter_of=base)


def write_predictions(session: Session, masked: dict[str, Tensor], exported: dict[str, Tensor]) -> None:
    """Write predictions.jsonl: a line for each validation example."""
    lines = []
    for name, rows in session.validation_rows.items():
        for i, label in enumerate(rows.labels.tolist()):
            if session.data.task.is_language:
                values = {"masked": masked[name][i].tolist(), "exported": exported[name][i].tolist()}
                sums = {kind: {"nll": nll, "tokens": int(n)} for kind, (nll, n) in values.items()}
                lines.append(json.dumps({"split": name, "index": i, **sums}) + "\n")
                continue
            line = {"split": name, "index": i, "label": label}
            for kind, logits in (("masked", masked[name][i]), ("exported", exported[name][i])):
                prediction = float(logits) if session.data.task.is_regression else int(logits.argmax())
                line[kind] = {"prediction": prediction, "logits": logits.tolist()}
            lines.append(json.dumps(line) + "\n")
    files.replace(session.output_dir / "predictions.jsonl", "".join(lines))


def describe(session: Session) -> None:
    """Fill in all parts of the report that do not need the model's predictions. Collective."""
    config, result, plan = session.config, session.report, session.plan
    structure = session.backbone.structure
    clocks, seconds, steps = session.clocks, session.clocks.seconds, session.step
    phases = {name: seconds.get(f"{name}_phase", 0.0) for name in PHASES}
    train_s, train_cpu_s = clocks.train_seconds(), distributed.dist_max(clocks.train_cpu_seconds())
    on_cpu = clocks.on_cpu
    is_pruning = config.prune.method == "prunadapt"
    dense = structure.dense_cost(
        "macs"
    )  # TMP never trains it, and a run that went on elsewhere may not have timed it there
    (dense_step, last_step), (dense_cpu, last_cpu) = clocks.steps.ends(dense), clocks.cpu_steps.ends(dense)
    trainable = sum(full_numel(p) for p in session.model.parameters() if p.requires_grad)
    result |= {
        "task": session.data.task.name,
        "method": config.prune.method,
        "criterion": config.prune.criterion if is_pruning else None,
        "model": config.model.model_name_or_path,
        "seed": config.train.seed,
        "world_size": distributed.world_size(),
        "dtype": session.ds.dtype,
        "launcher": distributed.launcher(),
        "nodes": distributed.nodes(),
        "command": outline.command(config, distributed.world_size(), distributed.launcher(), distributed.nodes()),
        "labels": list(session.data.task.label_names),
        "versions": versions(),
        "structure": plan.counts(),
        "plan_hash": plan.hash,
    }
    result["params"] |= {
        "encoder_dense": structure.dense_cost("params"),
        "encoder_kept": plan.cost("params"),
        "total_dense": structure.dense_cost("params") + structure.other_params,
        "total_kept": plan.cost("params") + structure.other_params,
        "trainable": trainable,
    }
    result["macs"] |= {
        "dense": structure.dense_cost("macs"),
        "kept": plan.cost("macs"),
        "seq_length": structure.seq_length,
    }
    result["sparsity"] |= {
        "target": config.prune.target_sparsity if is_pruning else None,
        "achieved": plan.sparsity(config.prune.budget),
    }
    if is_pruning and config.prune.budget == "latency":
        target = config.prune.target_sparsity or 0.0
        result["latency"] |= {
            "target_speedup": 1 / (1 - target),
            "table_speedup": 1 / (1 - plan.sparsity("latency")),
        }
    result["time"] |= {
        "train_s": train_s,
        "train_cpu_s": train_cpu_s if on_cpu else None,
        "dense_phase_s": phases["dense"],
        "prune_phase_s": phases["prune"] if is_pruning else None,
        "recover_phase_s": phases["recover"] if is_pruning else None,
        "teacher_s": seconds.get("teacher"),
        "importance_s": seconds.get("importance"),
        "shrink_s": seconds.get("shrink"),
        "checkpoint_s": seconds.get("checkpoint"),
        "steps": steps,
        "samples_per_s": session.sampler.samples_before(steps) / train_s if train_s else None,
        "dense_step_s": dense_step,
        "last_step_s": last_step,
        "dense_step_cpu_s": dense_cpu if on_cpu else None,
        "last_step_cpu_s": last_cpu if on_cpu else None,
    }
    report.fill(result, snapshot.place(session))
    result["communication"]["sent_bytes"] |= session.memory.sent
    result["memory"]["live_tensor_bytes"] |= session.memory.live
    result["memory"]["live_parts_bytes"] |= session.memory.parts
    result["memory"]["peak_rank_bytes"] |= session.memory.peaks


def text_of(session: Session, name: str, index: int) -> str:
    """The beginning of a validation example's text."""
    if session.data.task.is_language:  # rows are chunks of the text, not lines of the file
        tokens = session.validation_rows[name].row(index)["input_ids"]
        return session.backbone.tokenizer.decode(tokens, skip_special_tokens=True)[:200]
    row = session.data.validation[name][index]
    return " / ".join(str(row[key])[:200] for key in ("sentence1", "sentence2", "text") if row.get(key))


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in report.PACKAGES}}
