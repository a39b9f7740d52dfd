"""ONNX and torch.export: a compact folder whose layers differ in width, as one graph, computes what the masked model does."""

import json
import re
import zipfile

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, BertTokenizer

from prunadapt_ds import card, export, gates, graphs, tracing
from prunadapt_ds import report as reports
from prunadapt_ds.commands import reexport
from prunadapt_ds.errors import ParityError
from prunadapt_ds.models.families import FAMILIES
from prunadapt_ds.tracing import Graph, onnx_runner
from tests.tiny import VARIANTS, layout_and_structure, tiny_config, tiny_tokenizer
from tests.unit.test_card import OWN, report_of
from tests.unit.test_resize import adapted, inputs, plan_of

MODELS = [*FAMILIES, *VARIANTS]
save = torch.export.save


def compact_of(name, folder, how="unequal"):
    """The compact folder of a masked classifier, its logits on `inputs()`, and its plan."""
    model, layout, structure = adapted(name)
    plan = plan_of(structure, how)
    gates.apply_mask(model, plan.mask())
    tokenizer = tiny_tokenizer(folder.parent / "tokenizer")
    export.export(model, layout, plan, tokenizer, folder)
    with torch.no_grad():
        return model, plan, model(**inputs()).logits


@torch.no_grad()
def rounding(model, logits):
    """How far fp32 itself is from fp64: more in ModernBERT, whose random weights make each other's errors larger."""
    return float((model.double()(**inputs()).logits - logits).abs().max())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of BERT, whose tokenizer tells first and second sentences, exported as ONNX by the real command."""
    run = tmp_path_factory.mktemp("graphs") / "run"
    compact = run / "exports" / "compact"
    model, plan, _ = compact_of("bert", compact)
    words = AutoTokenizer.from_pretrained(compact).get_vocab()
    BertTokenizer(vocab=words).save_pretrained(compact)
    (run / "plan.json").write_text(json.dumps(plan.to_dict()))
    filled, _ = report_of(OWN)
    (run / "report.json").write_text(json.dumps(filled | {"status": "complete"}))
    (compact / "README.md").write_text(card.render(filled, "some/encoder", OWN, "compact", {"license": "mit"}))
    assert reexport.main(["--run_dir", str(run), "--export_formats", "onnx"]) == 0
    return run, model


@pytest.mark.ci
def test_onnxruntime_computes_what_the_masked_model_does(finished):
    run, model = finished
    given = inputs()
    given["token_type_ids"] = (torch.arange(10) > 4).long().expand(4, 10).contiguous()
    with torch.no_grad():
        wanted, other = model(**given).logits, model(**inputs()).logits
    names = ("input_ids", "attention_mask", "token_type_ids")
    found = Graph(onnx_runner(run / "exports" / "onnx" / "model.onnx"), names)(**given)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, other, atol=2e-4), "which sentence a token is of must matter"


@pytest.mark.ci
def test_what_lies_beside_it(finished):
    run, _ = finished
    report, folder = json.loads((run / "report.json").read_text()), run / "exports" / "onnx"
    reports.validate(report)
    small = {"config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert {p.name for p in folder.iterdir()} == {"model.onnx", *small}
    entry = report["exports"]["onnx"]
    assert entry["parity"]["max_abs_logit_diff"] <= entry["parity"]["tolerance"] and entry["parity"]["examples"] == 19
    assert entry["latency"]["compact_ms"] > 0 and entry["latency"]["exported_ms"] > 0
    config = json.loads((folder / "config.json").read_text())
    assert "auto_map" not in config and config["architectures"] == ["BertForSequenceClassification"]
    assert b"prunadapt_ds/" not in (folder / "model.onnx").read_bytes(), "names a folder of the machine"


@pytest.mark.ci
def test_torch_export(tmp_path, monkeypatch):
    """The same work in this process; the program that is saved is the one that was compared."""
    saved = []
    monkeypatch.setattr(graphs, "trace", lambda request, scratch: tracing.answer(request))
    monkeypatch.setattr(
        tracing.torch.export, "save", lambda program, file: (saved.append(program), save(program, file))
    )
    _, _, wanted = compact_of("llama", tmp_path / "compact")
    found = graphs.convert("torch_export", tmp_path / "compact", tmp_path / "graph")
    assert found["parity"]["max_abs_logit_diff"] <= 1e-5 and found["latency"]["exported_ms"] > 0
    given = inputs()
    torch.testing.assert_close(saved[0].module()(**given), wanted, rtol=1e-4, atol=1e-5)
    one = {name: value[:1, :1] for name, value in given.items()}
    assert saved[0].module()(**one).shape == (1, 3)
    assert {p.name for p in (tmp_path / "graph").iterdir()} == {
        "model.pt2", "config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    with zipfile.ZipFile(tmp_path / "graph" / "model.pt2") as archive:
        assert not any(b"prunadapt_ds/" in archive.read(name) for name in archive.namelist())


@pytest.mark.full
@pytest.mark.parametrize("how", ["unequal", "no-heads"])
@pytest.mark.parametrize("kind", graphs.KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_every_family(tmp_path, name, kind, how):
    compact = tmp_path / "compact"
    model, _, wanted = compact_of(name, compact, how)
    found = graphs.convert(kind, compact, tmp_path / kind)
    difference = found["parity"]["max_abs_logit_diff"]
    assert difference <= 1e-5 or difference <= 30 * rounding(model, wanted)
    if kind == "onnx":
        logits = Graph(onnx_runner(tmp_path / kind / "model.onnx"), ("input_ids", "attention_mask"))(**inputs())
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("kind", graphs.KINDS)
@pytest.mark.parametrize("name", [n for n in MODELS if FAMILIES[VARIANTS.get(n, (n,))[0]].is_decoder])
def test_every_language_model(tmp_path, name, kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name, initializer_range=0.2)).eval()
    layout, structure = layout_and_structure(model, 10)
    gates.attach(model, layout, structure)
    plan = plan_of(structure, "unequal")
    gates.apply_mask(model, plan.mask())
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer", of_decoder=True)
    tokenizer.pad_token = tokenizer.eos_token
    export.export(model, layout, plan, tokenizer, tmp_path / "compact")
    with torch.no_grad():
        wanted = model(**inputs()).logits
    found = graphs.convert(kind, tmp_path / "compact", tmp_path / kind)
    assert found["parity"]["max_abs_logit_diff"] <= found["parity"]["tolerance"]
    assert AutoTokenizer.from_pretrained(tmp_path / kind).padding_side == "right"
    if kind == "onnx":
        logits = Graph(onnx_runner(tmp_path / kind / "model.onnx"), ("input_ids", "attention_mask"))(**inputs())
        real = inputs()["attention_mask"].bool()
        torch.testing.assert_close(logits[real], wanted[real], rtol=1e-4, atol=1e-4)


@pytest.mark.fast
def test_a_graph_that_differs_leaves_nothing(tmp_path, monkeypatch):
    compact_of("bert", tmp_path / "compact")
    answer = {"compact": torch.zeros(6), "exported": torch.full((6,), 1e-3)}, {"examples": 2, "latency": {}}
    monkeypatch.setattr(graphs, "traced", lambda *args: answer)
    with pytest.raises(ParityError, match="differs"):
        graphs.convert("onnx", tmp_path / "compact", tmp_path / "onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"compact", "tokenizer"}


@pytest.mark.fast
def test_a_missing_extra_and_a_dtype_are_said_at_once(monkeypatch):
    find_spec = graphs.importlib.util.find_spec
    monkeypatch.setattr(graphs.importlib.util, "find_spec", lambda n: None if n == "onnxscript" else find_spec(n))
    found = graphs.problems(["padded", "onnx"], "bfloat16")
    assert [p.field for p in found] == ["export_formats", "export_dtype"]
    assert "onnxscript is not installed; run `pip install onnx onnxscript onnxruntime`" in found[0].remedy
    assert not graphs.problems(["torch_export"], None) and not graphs.problems(["padded"], "bfloat16")


@pytest.mark.fast
@pytest.mark.parametrize(
    "kind, library, file", [("onnx", "onnx", "model.onnx"), ("torch_export", "pytorch", "model.pt2")]
)
def test_the_card_of_a_graph(kind, library, file):
    text = card.remade(card.render(report_of(OWN)[0], "some/encoder", OWN, "compact", {"license": "mit"}), kind)
    made = ModelCard(text, ignore_metadata_errors=False)
    assert made.data.library_name == library and made.data.license == "mit" and "## Limits" in text
    assert file in text and "trust_remote_code" not in text
    compile(re.search(r"```python\n(.*?)```", text, re.S)[1], "card", "exec")


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["padded", "uniform"])
def test_the_card_of_a_folder_made_again(kind):
    made = report_of(OWN)[0]
    text = card.remade(card.render(made, "some/encoder", OWN, "compact", {}), kind)
    made["exports"] = {kind: {"path": f"exports/{kind}", "needs_remote_code": False}}
    assert text == card.render(made, "some/encoder", OWN, kind, {})
