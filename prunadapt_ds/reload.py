"""Loads an exported folder as any user would, computes logits, and times it.

Runs as a script in a separate process that never imports the trainer: it needs only torch, transformers and safetensors (and
peft for an adapter). Reads requests (JSON with the rows to predict) and answers each with logits and timings, one by one:

    python reload.py request.json [request.json ...]

Legend: B batch size, T tokens, V vocabulary size, N rows, C outputs per row.
"""

from __future__ import annotations

import json
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any


def token_losses(logits: Any, labels: Any) -> tuple[Any, Any]:
    """Summed negative log-likelihood and number of counted tokens per sequence: [B, T, V] and [B, T] -> float32 [B] twice.

    Logits at position t predict token t + 1; labels below 0 are ignored.
    """
    import torch
    import torch.nn.functional as F

    targets = labels[:, 1:]
    real = targets >= 0
    losses = F.cross_entropy(logits[:, :-1][real].float(), targets[real], reduction="none")
    sums = torch.zeros(len(labels), device=logits.device).index_add(0, real.nonzero()[:, 0], losses)
    return sums, real.sum(1).float()


def summary(logits: Any, attention_mask: Any, labels: Any) -> Any:
    """Reduce a batch's logits to what is compared, in float32.

    A classifier's [B, C] are kept as they are. A language model's [B, T, V] become its `token_losses` [B, 2] or, without
    labels, the logits of each row's last token [B, V].
    """
    import torch

    if logits.dim() == 2:
        return logits.float()
    if labels is not None:  # row by row: fp32 copies of all would be several times the logits
        return torch.cat([torch.stack(token_losses(x[None], y[None]), 1) for x, y in zip(logits, labels, strict=True)])
    last = (attention_mask * torch.arange(attention_mask.shape[1], device=logits.device)).argmax(1)
    return logits[torch.arange(len(logits), device=logits.device), last].float()


def predict(
    model: Any,
    rows: list[dict[str, list[int]]],
    pad_token_id: int,
    batch_size: int,
    device: Any,
    most_tokens: int,
    labels: Any = None,
) -> Any:
    """Compute `summary` for all rows, in their order: float32 [N, C].

    Rows of similar length share a batch, padded on the right to a multiple of 8 tokens where `most_tokens`, the model's
    maximum, allows it.
    """
    import torch

    logits = None
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = max(len(rows[i]["input_ids"]) for i in chosen)
        longest = max(longest, min(-(-longest // 8) * 8, most_tokens))
        inputs = {}
        for column in rows[0]:
            fill = pad_token_id if column == "input_ids" else 0
            padded = [rows[i][column] + [fill] * (longest - len(rows[i][column])) for i in chosen]
            inputs[column] = torch.tensor(padded, device=device)
        padded_labels = None
        if labels is not None:
            padded = [labels[i] + [-100] * (longest - len(labels[i])) for i in chosen]
            padded_labels = torch.tensor(padded, device=device)
        with torch.inference_mode():
            output = summary(model(**inputs).logits, inputs["attention_mask"], padded_labels).cpu()
        if logits is None:
            logits = torch.empty(len(rows), output.shape[1])
        logits[chosen] = output
    return logits


def latency(
    models: list[Any], batch_size: int, seq_length: int, repeats: int, device: Any, seconds: float = 60
) -> tuple[list[float], int]:
    """Time forward passes of the models, which take turns. Returns each one's median in milliseconds, and the number of turns.

    After a warm-up there are `repeats` turns, or fewer, but at least three, once the whole takes longer than `seconds`.
    """
    import torch

    vocabulary = models[0].config.vocab_size
    input_ids = torch.randint(0, vocabulary, (batch_size, seq_length), device=device)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def turn() -> list[float]:
        taken = []
        for model in models:
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            model(**inputs)
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(1000 * (time.perf_counter() - start))
        return taken

    begin = time.perf_counter()
    with torch.inference_mode():
        for _ in range(3):
            turn()
            if time.perf_counter() - begin > seconds / 4:
                break
        turns: list[list[float]] = []
        while len(turns) < min(3, repeats) or (len(turns) < repeats and time.perf_counter() - begin < seconds):
            turns.append(turn())
    return [statistics.median(taken) for taken in zip(*turns, strict=True)], len(turns)


def load_adapter(folder: str, base: dict[str, Any], dtype: Any) -> Any:
    """Load a base model with the PEFT adapter in `folder`. `base`: see `proof.Reload.adapter_of`."""
    import transformers
    from peft import PeftModel

    numbers = {k: base[k] for k in ("num_labels", "pad_token_id") if base[k] is not None}
    model = getattr(transformers, base["auto_class"]).from_pretrained(
        base["model"], dtype=dtype, ignore_mismatched_sizes=True, use_safetensors=True, **numbers
    )
    return PeftModel.from_pretrained(model, folder)


def answer(request: dict[str, Any]) -> None:
    """Answer a request. If the requested GPU fails, answer it on the CPU instead, without timings."""
    try:
        return answer_on(request["device"], request)
    except RuntimeError as error:  # the run's engine fills the GPU's memory, or the GPU allows only one process
        if request["device"] == "cpu":
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        why = f"{request['device']} did not compute it: {reason}"
    answer_on("cpu", {**request, "latency": None}, why)


def answer_on(device_name: str, request: dict[str, Any], why: str = "") -> None:
    import torch
    import transformers
    from safetensors.torch import save_file
    from transformers import AutoConfig

    torch.set_float32_matmul_precision("highest")  # the environment may allow TF32, which is too coarse to compare
    auto_class = getattr(transformers, request["auto_class"])
    device = torch.device(device_name)

    def load(dtype: str) -> Any:
        if request["adapter_of"]:
            return load_adapter(request["folder"], request["adapter_of"], getattr(torch, dtype)).to(device).eval()
        model = auto_class.from_pretrained(
            request["folder"],
            trust_remote_code=request["needs_remote_code"],
            dtype=getattr(torch, dtype),
            use_safetensors=True,
        )
        return model.to(device).eval()

    model = load(request["dtype"])
    tensors: dict[str, Any] = {}
    result: dict[str, Any] = {"on_cpu_because": why}
    for name, rows in request["rows"].items():
        labels = request["labels"].get(name)
        tensors[name] = predict(
            model, rows, request["pad_token_id"], request["batch_size"], device, request["most_tokens"], labels
        )
    save_file(tensors, request["logits"])
    if request["latency"]:
        dtype = request["latency"]["dtype"]
        if dtype != request["dtype"]:
            del model  # so that no more than two are in memory
            model = load(dtype)
        try:
            config = AutoConfig.from_pretrained(request["folder"], trust_remote_code=False)
            dense = auto_class.from_config(config, dtype=getattr(torch, dtype)).to(device).eval()
            options = {k: request["latency"][k] for k in ("batch_size", "seq_length", "repeats")}
            single, _ = latency([dense, model], **{**options, "batch_size": 1}, device=device)
            (dense_ms, exported_ms), options["repeats"] = latency([dense, model], **options, device=device)
            result["latency"] = {
                "dense_ms": dense_ms,
                "exported_ms": exported_ms,
                **options,
                "dtype": dtype,
                "threads": torch.get_num_threads(),
                "speedup": dense_ms / exported_ms,
                **dict(zip(("dense_ms_batch_1", "exported_ms_batch_1"), single, strict=True)),
            }
        except RuntimeError as error:  # no memory for the dense model as well: proven, but not timed
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):  # on a CPU
                raise
            result["latency"] = None
    assert "prunadapt_ds" not in sys.modules, "the exported folder must load without the trainer"
    Path(request["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    # Ctrl-C ends this process by the signal: as an exception, an import that it meets would call it a missing module.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for path in sys.argv[1:]:
        answer(json.loads(Path(path).read_text()))
