"""Traces a compact folder's model into a graph, computes the logits of both, and times both.

Runs in a separate process, without ranks and without DeepSpeed's changes to torch. Reads one request (JSON) and writes the
graph, logits and timings:

    python -m prunadapt_ds.tracing request.json

Legend: B batch size, T tokens, C classes or vocabulary size.
"""

from __future__ import annotations

import inspect
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunadapt_ds.models.layouts import most_tokens
from prunadapt_ds.reload import latency

ONNX_FILE, TORCH_FILE = "model.onnx", "model.pt2"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
TRACED = (3, 11)  # B and T of the example: torch.export would specialise on a size of 0 or 1
COMPARED = ((1, 1), (1, 2), (2, 7), (7, 16), (5, 33), (3, 60))
LATENCY = {"batch_size": 1, "seq_length": 128, "repeats": 20}
Inputs = dict[str, Tensor]


class Logits(nn.Module):
    """A transformers model with tensors as inputs and output: [B, T] each -> logits [B, C], of a language model [B, T, C]."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        more = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **more).logits


def load(request: dict[str, Any]) -> tuple[Logits, tuple[str, ...], int]:
    """Load the model in fp32, without a cache. Returns it with the names of its inputs and the padding token ID."""
    import transformers

    auto_class = getattr(transformers, request["auto_class"])
    model = auto_class.from_pretrained(
        request["compact"],
        trust_remote_code=request["needs_remote_code"],
        dtype=torch.float32,
        use_safetensors=True,
    )
    model.config.use_cache = False
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["compact"], trust_remote_code=False)
    taken = inspect.signature(model.forward).parameters
    names = tuple(name for name in INPUTS if name in tokenizer.model_input_names and name in taken)
    return Logits(model.eval()), names, int(tokenizer.pad_token_id or 0)


def example(model: Logits, names: tuple[str, ...], pad: int, shape: tuple[int, int], seed: int = 0) -> Inputs:
    """Random inputs [B, T]. All rows but the first are padded on the right, each by two tokens more than the one before."""
    batch, tokens = shape
    generator = torch.Generator().manual_seed(seed)
    lengths = (tokens - 2 * torch.arange(batch)).clamp(min=1)
    real = torch.arange(tokens) < lengths[:, None]
    kinds = max(1, getattr(model.config, "type_vocab_size", 1) or 1)
    values = {
        "input_ids": torch.randint(model.config.vocab_size, shape, generator=generator).where(real, pad),
        "attention_mask": real.long(),
        "token_type_ids": torch.randint(kinds, shape, generator=generator) * real,
    }
    return {name: values[name] for name in names}


def trace(model: Logits, names: tuple[str, ...], pad: int) -> torch.export.ExportedProgram:
    """Export the model's graph for any B and T."""
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    inputs = example(model, names, pad, TRACED)
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(names, free), strict=False)
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)  # would be saved, with the paths of this machine
    return program


class Graph:
    """An exported graph with the call signature of its model. Inputs that are not given are zeros."""

    def __init__(self, run: Callable[[Inputs], Tensor], names: tuple[str, ...], config: Any = None):
        self.run, self.names, self.config = run, names, config

    def __call__(self, **inputs: Tensor) -> Tensor:
        nothing = torch.zeros_like(inputs["input_ids"])
        return self.run({name: inputs.get(name, nothing) for name in self.names})


def onnx_runner(file: Path) -> Callable[[Inputs], Tensor]:
    """A function that runs an ONNX file with onnxruntime on the CPU, with as many threads as torch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(inputs: Inputs) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})[0])

    return run


def write_onnx(program: torch.export.ExportedProgram, names: tuple[str, ...], file: Path) -> None:
    """Write an ONNX file. Weights of more than 1.5 GB go to a second file, `model.onnx.data`."""
    axes = {0: "batch", 1: "sequence"}
    made = torch.onnx.export(
        program,
        (),
        input_names=list(names),
        output_names=["logits"],
        dynamic_shapes=dict.fromkeys(names, axes),
        verbose=False,
    )
    assert made is not None
    made.save(str(file))


def compared(model: Callable[..., Tensor], batches: list[Inputs]) -> Tensor:
    """The logits of all rows, of a language model of all real tokens, flattened and concatenated: float32 [N]."""
    found = []
    with torch.inference_mode():
        for inputs in batches:
            logits = model(**inputs)
            real = inputs["attention_mask"].bool()
            found.append((logits[real] if logits.dim() == 3 else logits).flatten())
    return torch.cat(found).float()


def answer(request: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    model, names, pad = load(request)
    most = most_tokens(model) or max(tokens for _, tokens in COMPARED) + LATENCY["seq_length"]
    batches = [example(model, names, pad, (rows, min(n, most)), seed) for seed, (rows, n) in enumerate(COMPARED)]
    options = {**LATENCY, "seq_length": min(LATENCY["seq_length"], most)}
    cpu = torch.device("cpu")
    # Timed one after the other, not in turns: onnxruntime's idle threads spin and would slow torch down.
    (compact_ms,), _ = latency([model], **options, device=cpu)
    program = trace(model, names, pad)
    folder = Path(request["folder"])
    if request["kind"] == "onnx":
        write_onnx(program, names, folder / ONNX_FILE)
        graph = Graph(onnx_runner(folder / ONNX_FILE), names, model.config)
    else:
        module = program.module()
        graph = Graph(lambda inputs: module(**inputs), names, model.config)
    (exported_ms,), options["repeats"] = latency([graph], **options, device=cpu)
    save_file({"compact": compared(model, batches), "exported": compared(graph, batches)}, request["logits"])
    if request["kind"] != "onnx":  # the module above was used, as loading the file would unpickle its example inputs
        torch.export.save(program, folder / TORCH_FILE)
    timed = {
        "compact_ms": compact_ms,
        "exported_ms": exported_ms,
        **options,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "speedup": compact_ms / exported_ms,
    }
    result = {"examples": sum(len(batch["input_ids"]) for batch in batches), "latency": timed}
    Path(request["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    # Ctrl-C ends this process by the signal: as an exception, an import that it meets would call it a missing module.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    answer(json.loads(Path(sys.argv[1]).read_text()))
