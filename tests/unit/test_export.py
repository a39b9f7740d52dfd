"""Writing an export: file by file, whole or not at all."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from prunadapt_ds import export, formats, gates, proof, reload, trained_folder, weight_files
from prunadapt_ds.budget import PruningPlan
from prunadapt_ds.errors import Interrupted, ParityError, PrunadaptError
from prunadapt_ds.models.families import FAMILIES
from prunadapt_ds.resize import resize
from tests.tiny import layout_and_structure, tiny_language_model, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.fast


@pytest.fixture
def dense(tmp_path):
    model = tiny_model("llama")
    layout, structure = layout_and_structure(model, 16)
    return model, layout, PruningPlan.dense(structure), tiny_tokenizer(tmp_path / "tokenizer", of_decoder=True)


def test_several_files_hold_what_one_would(dense, tmp_path, monkeypatch):
    export.export(*dense, tmp_path / "one")
    monkeypatch.setattr(weight_files, "MAX_FILE_BYTES", 20_000)
    export.export(*dense, tmp_path / "several")
    files = sorted((tmp_path / "several").glob("*.safetensors"))
    held = [sum(t.nbytes for t in load_file(f).values()) for f in files]
    assert len(files) > 3 and max(held[1:]) <= 20_000, (
        "only a tensor that is larger has a file of its own that is larger"
    )
    assert {k: v.tolist() for f in files for k, v in load_file(f).items()} == {
        k: v.tolist() for k, v in load_file(tmp_path / "one" / "model.safetensors").items()
    }
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f.name for f in files} and index["metadata"]["total_size"] == sum(held)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "several")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), dense[0].parameters(), strict=True))


def test_an_index_follows_its_files_into_another_dtype(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "MAX_FILE_BYTES", 20_000)
    export.export(*dense, tmp_path / "out")
    formats.cast(tmp_path / "out", torch.bfloat16)
    held = sum(t.nbytes for f in (tmp_path / "out").glob("*.safetensors") for t in load_file(f).values())
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == held


def test_no_file_is_begun_that_the_disk_has_no_room_for(tmp_path):
    with pytest.raises(OSError):
        weight_files.new_mapped(tmp_path / "file", (2**44, 2**10))


def test_a_write_that_fails_is_said_when_all_is_done(dense, tmp_path, monkeypatch):
    """Every rank goes through all tensors together; a rank that stopped half way would leave the others waiting."""
    taken = []

    def consumed(*args):
        for pair in tensors(*args):
            taken.append(pair[0])
            yield pair

    tensors = export.pruned_tensors
    monkeypatch.setattr(export, "pruned_tensors", consumed)
    monkeypatch.setattr(weight_files, "MAX_FILE_BYTES", 20_000)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".compact.weights.tmp").write_text("in the way")  # no folder can be made there
    monkeypatch.setattr(weight_files.shutil, "rmtree", lambda *args, **options: None)
    with pytest.raises(PrunadaptError, match="writing the export"):
        export.export(*dense, tmp_path / "out" / "compact")
    assert len(taken) == len(list(dense[0].parameters())) and not (tmp_path / "out" / "compact").exists()


@pytest.mark.parametrize(
    "number, kind, words",
    [
        (signal.SIGKILL, PrunadaptError, "was killed, as the system does when memory runs out"),
        (signal.SIGSEGV, PrunadaptError, f"ended by signal {int(signal.SIGSEGV)}:\nits last words"),
        (signal.SIGUSR1, Interrupted, "stopped by SIGUSR1"),
    ],
)
def test_a_proof_that_a_signal_ends_says_nothing_of_the_export(number, kind, words):
    with pytest.raises(kind, match=words) as raised:
        proof.raise_if_stopped(subprocess.CompletedProcess([], -number, "", "its last words"))
    assert not isinstance(raised.value, ParityError)
    proof.raise_if_stopped(subprocess.CompletedProcess([], 1, "", ""))


def test_a_model_that_our_loader_opened_can_be_saved(dense, tmp_path):
    """With the code that its configuration names."""
    model, layout, plan, tokenizer = dense
    mask = plan.mask()
    mask[0] = False
    gates.attach(model, layout, plan.structure)
    cut = PruningPlan.from_mask(plan.structure, mask)
    gates.apply_mask(model, cut.mask())
    export.export(model, layout, cut, tokenizer, tmp_path / "first")
    loaded, _ = trained_folder.load_folder(str(tmp_path / "first"), False)
    loaded.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / formats.MODELING_FILE).is_file()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "second", trust_remote_code=True)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_every_auto_class_of_the_family_loads_a_compact_folder(tmp_path, model_type):
    """The body alone, and below other heads, which are new as those of a stock checkpoint would be."""
    model = tiny_model(model_type)
    layout, structure = layout_and_structure(model, 16)
    plan = PruningPlan.from_mask(structure, torch.arange(structure.num_units) % 4 > 0)
    export.export(model, layout, plan, tiny_tokenizer(tmp_path / "tokenizer"), tmp_path / "out")
    named = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    other = "AutoModelForCausalLM" if FAMILIES[model_type].is_decoder else "AutoModelForTokenClassification"
    assert {"AutoModel", "AutoModelForSequenceClassification", other} <= set(named)
    ids, states = torch.tensor([[2, 9, 12, 7, 3]]), []
    for name in named:
        loaded, info = getattr(transformers, name).from_pretrained(
            tmp_path / "out", trust_remote_code=True, output_loading_info=True
        )
        assert not info["mismatched_keys"] and not any(layout.layers in key for key in info["missing_keys"]), name
        states.append(loaded.eval().base_model(ids)[0])
    assert all(torch.allclose(state, states[0]) for state in states)


@pytest.mark.parametrize("model_type, gone", [("bert", "heads"), ("bert", "layer"), ("gpt2", "neurons")])
def test_no_stock_class_makes_up_what_was_removed(tmp_path, model_type, gone):
    """Where nothing but whole sub-layers or layers is gone, all that is left has its usual shape. Also of a copy."""
    model = tiny_model(model_type)
    layout, structure = layout_and_structure(model, 16)
    layout, structure = replace(layout, skips=gone == "layer"), replace(structure, skips=gone == "layer")
    mask = torch.ones(structure.num_units, dtype=torch.bool)
    for sub in structure.sublayers:
        mask[sub.span] = sub.layer != 1 if gone == "layer" else sub.layer == 0 or sub.kind != gone
    plan = PruningPlan.from_mask(structure, mask)
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    export.export(model, layout, plan, tokenizer, tmp_path / "out")
    loaded, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values())
    loaded.save_pretrained(tmp_path / "copy")
    for name in ("out", "copy"):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
    copy = AutoModelForSequenceClassification.from_pretrained(tmp_path / "copy", trust_remote_code=True)
    ids = torch.tensor([[2, 9, 12, 7, 3]])
    resize(model, layout, plan)
    assert torch.equal(copy(ids).logits, loaded(ids).logits) and torch.allclose(model(ids).logits, loaded(ids).logits)
    assert [p.shape for p in copy.parameters()] == [p.shape for p in model.parameters()]


def test_what_a_call_asked_of_the_tokenizer_is_not_in_its_file(dense, tmp_path):
    dense[3]("a text", truncation=True, max_length=4)
    export.export(*dense, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert written["truncation"] is None


def test_code_that_was_not_used_is_not_named(dense, tmp_path):
    dense[0].config.auto_map = {"AutoConfig": "configuration_own.Config"}
    export.export(*dense, tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_all_chat_templates_are_copied(tmp_path):
    (tmp_path / "compact" / "additional_chat_templates").mkdir(parents=True)
    (tmp_path / "compact" / "additional_chat_templates" / "tool_use.jinja").write_text("a template")
    (tmp_path / "compact" / ".cache").mkdir()
    (tmp_path / "padded").mkdir()
    formats.copy_others(tmp_path / "compact", tmp_path / "padded")
    assert (tmp_path / "padded" / "additional_chat_templates" / "tool_use.jinja").read_text() == "a template"
    assert len(list((tmp_path / "padded").iterdir())) == 1, "and nothing that others keep there"


DECODERS = [name for name, family in FAMILIES.items() if family.is_decoder]


@pytest.mark.parametrize("kind", ["dense", "padded", "uniform"])
@pytest.mark.parametrize("model_type", DECODERS)
def test_stock_folders_name_tensors_as_transformers_does(tmp_path, model_type, kind):
    """Whatever the model calls them in memory: other programs know the names of the hub."""
    model = tiny_language_model(model_type)
    layout, structure = layout_and_structure(model, 16)
    keep = torch.ones(structure.num_units, dtype=torch.bool)
    for sublayer in structure.sublayers:
        if kind != "dense" and sublayer.kind == "neurons":
            keep[sublayer.span.stop - 8 : sublayer.span.stop] = False
    plan = PruningPlan.from_mask(structure, keep)
    written = tmp_path / "compact"
    export.export(model, layout, plan, tiny_tokenizer(tmp_path / "tokenizer", of_decoder=True), written)
    if kind != "dense":
        written = tmp_path / kind
        formats.convert(kind, tmp_path / "compact", plan.to_dict(), written)
    model.save_pretrained(tmp_path / "theirs")
    found, theirs = (load_file(folder / "model.safetensors") for folder in (written, tmp_path / "theirs"))
    assert found.keys() == theirs.keys()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", DECODERS)
def test_a_tied_tensor_has_a_shape_once(model_type, tied):
    model = tiny_language_model(model_type, tie_word_embeddings=tied)
    names = {tensor.data_ptr(): name for name, tensor in reversed(model.state_dict().items())}  # the first of each
    shapes = formats.dense_shapes(model.config.to_dict() | {"architectures": [type(model).__name__]})
    assert shapes == {name: tuple(model.state_dict()[name].shape) for name in names.values()}
    assert (len(shapes) < len(model.state_dict())) == tied


@pytest.mark.parametrize("program", [[reload.__file__], ["-m", "prunadapt_ds.tracing"]], ids=["reload", "tracing"])
def test_ctrl_c_ends_a_process_that_helps_without_an_exception(tmp_path, program):
    """Libraries catch exceptions where they import, and take them for a missing module."""
    os.mkfifo(tmp_path / "request")
    helper = subprocess.Popen([sys.executable, *program, str(tmp_path / "request")], stderr=subprocess.PIPE, text=True)
    with (tmp_path / "request").open("w"):  # once the program has opened it, too
        helper.send_signal(signal.SIGINT)
        assert helper.communicate(timeout=60)[1] == "" and helper.returncode == -signal.SIGINT
