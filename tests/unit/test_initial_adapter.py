"""Starting from an adapter that PEFT itself has written: what is taken over, and that the model answers as PEFT's does."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from prunadapt_ds import adapter_folder, adapters, backbone, initial_adapter, labels
from prunadapt_ds.config import LoraOptions, parse
from prunadapt_ds.errors import UserError
from prunadapt_ds.inputs import refuse_changed
from tests.tiny import tiny_folder
from tests.unit.test_resize import inputs

pytestmark = pytest.mark.fast


def write_adapter(base, folder, *, num_labels=2, **options):
    """An adapter with random matrices and a random head, as PEFT saves it, and the logits of the model with it."""
    torch.manual_seed(7)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels, pad_token_id=0)
    config = LoraConfig(**{"task_type": "SEQ_CLS", "r": 3, "lora_alpha": 5, "init_lora_weights": False, **options})
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(folder)
    with torch.no_grad():
        return adapted(**inputs()).logits


@pytest.mark.parametrize(
    "model_type, targets, saved",
    [
        ("bert", ["query", "value", "output.dense"], ["classifier", "bert.pooler"]),
        ("llama", "all-linear", ["score"]),
        ("gpt2", ["c_attn", "c_proj"], ["score"]),  # weights lie the other way round
        ("modernbert", r".*\.(Wqkv|Wi)", ["classifier", "head"]),
    ],
)
def test_the_model_answers_as_peft_s(tmp_path, model_type, targets, saved):
    base = tiny_folder(tmp_path / "base", model_type)
    fan = {"fan_in_fan_out": True} if model_type == "gpt2" else {}
    expected = write_adapter(base, tmp_path / "adapter", target_modules=targets, modules_to_save=saved, **fan)
    given = initial_adapter.read(str(tmp_path / "adapter"))
    loaded, lora = backbone.load(str(base), num_labels=2), LoraOptions()
    names = initial_adapter.take_over(given, loaded, lora, frozenset())
    assert (lora.r, lora.lora_alpha) == (3, 5) and 0 < len(names) == len(given.modules)
    assert set(names) <= set(adapters.target_modules(loaded.layout)) and "its head" in loaded.notes[-1]
    adapters.add_lora(loaded.model, loaded.layout, names, r=lora.r, lora_alpha=lora.lora_alpha)
    initial_adapter.load(given, loaded)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.eval()(**inputs()).logits, expected, rtol=1e-5, atol=1e-6)
    trains = {n for n, p in loaded.model.named_parameters() if p.requires_grad}
    assert any("lora_A" in n for n in trains) and loaded.task_head_names <= trains


@pytest.mark.parametrize("name, revision", [("some/encoder@v1", "v1"), ("some/encoder", None)])
def test_an_adapter_names_the_revision_of_its_base_and_truncates_nothing(tmp_path, name, revision):
    loaded, lora = backbone.load(str(tiny_folder(tmp_path / "base", "bert")), num_labels=2), LoraOptions()
    adapters.add_lora(loaded.model, loaded.layout, ["query"], r=2, lora_alpha=4)
    loaded.tokenizer("a text", truncation=True, max_length=4)
    adapter_folder.write(loaded, name, ["query"], lora, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "tokenizer.json").read_text())["truncation"] is None
    written = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (written.base_model_name_or_path, written.revision) == ("some/encoder", revision)


def test_a_head_for_other_labels_begins_anew(tmp_path):
    base = tiny_folder(tmp_path / "base", "bert")
    write_adapter(base, tmp_path / "a", num_labels=5, target_modules=["query"], modules_to_save=["classifier"])
    given, loaded = initial_adapter.read(str(tmp_path / "a")), backbone.load(str(base), num_labels=2)
    names = initial_adapter.take_over(given, loaded, LoraOptions(), frozenset())
    assert "starts from scratch" in loaded.notes[-1]
    adapters.add_lora(loaded.model, loaded.layout, names, r=3, lora_alpha=5)
    initial_adapter.load(given, loaded)
    assert loaded.model.classifier.weight.shape[0] == 2


@pytest.mark.parametrize("named_by", ["its base", "its folder", "nobody"])
def test_the_adapter_s_head_is_put_into_our_order_of_the_classes(tmp_path, named_by):
    base, theirs, ours = tiny_folder(tmp_path / "base", "bert"), ("C", "A", "B"), ("a", "b", "c")
    if named_by == "its base":
        names = {"id2label": dict(enumerate(theirs)), "label2id": {name: i for i, name in enumerate(theirs)}}
        AutoModelForSequenceClassification.from_pretrained(base, pad_token_id=0, **names).save_pretrained(base)
    saved = ["classifier", "bert.pooler"]
    expected = write_adapter(base, tmp_path / "a", num_labels=3, target_modules=["query"], modules_to_save=saved)
    if named_by == "its folder":
        (tmp_path / "a" / labels.FILE).write_text(json.dumps(theirs))
    given, loaded = initial_adapter.read(str(tmp_path / "a")), backbone.load(str(base), num_labels=3, label_names=ours)
    names = initial_adapter.take_over(given, loaded, LoraOptions(), frozenset(), ours)
    assert ("its head, which knew the classes as C, A, B" in loaded.notes[-1]) == (named_by != "nobody")
    adapters.add_lora(loaded.model, loaded.layout, names, r=given.r, lora_alpha=given.lora_alpha)
    assert initial_adapter.load(given, loaded, ours)
    with torch.no_grad():
        found = loaded.model.eval()(**inputs()).logits
    torch.testing.assert_close(
        found, expected if named_by == "nobody" else expected[:, [1, 2, 0]], rtol=1e-5, atol=1e-6
    )


def test_a_head_that_is_the_model_s_own_does_not_begin_anew(tmp_path):
    base = tiny_folder(tmp_path / "base", "bert")
    write_adapter(base, tmp_path / "a", task_type=None, target_modules=["query"])
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=0).save_pretrained(base)
    given, loaded = initial_adapter.read(str(tmp_path / "a")), backbone.load(str(base), num_labels=2)
    initial_adapter.take_over(given, loaded, LoraOptions(), frozenset())
    assert loaded.notes[-1].endswith("projections")
    assert not initial_adapter.heads(given, loaded)


def test_options_that_contradict_the_adapter(tmp_path):
    base = tiny_folder(tmp_path / "base", "bert")
    write_adapter(base, tmp_path / "a", target_modules=["query"])
    given, loaded = initial_adapter.read(str(tmp_path / "a")), backbone.load(str(base), num_labels=2)
    lora = LoraOptions(r=4, lora_alpha=2.0, target_modules=["key"])
    with pytest.raises(UserError) as caught:
        initial_adapter.take_over(given, loaded, lora, frozenset({"r", "lora_alpha", "target_modules"}))
    assert {p.field for p in caught.value.problems} == {"r", "lora_alpha", "target_modules"}
    same = LoraOptions(r=3, lora_alpha=5.0, target_modules=["query"])
    assert initial_adapter.take_over(given, loaded, same, frozenset({"r", "lora_alpha", "target_modules"}))
    other = backbone.load(str(tiny_folder(tmp_path / "wide", "bert", hidden_size=64)), num_labels=2)
    with pytest.raises(UserError, match="has shape"):
        initial_adapter.take_over(given, other, LoraOptions(), frozenset())
    with pytest.raises(UserError, match=r"such as model\.layers\.0\.self_attn\.q_proj"):
        llama = backbone.load(str(tiny_folder(tmp_path / "llama", "llama")), num_labels=2)
        initial_adapter.take_over(given, llama, LoraOptions(), frozenset())


def changed(folder, **values):
    file = folder / initial_adapter.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def pickled(folder):
    (folder / initial_adapter.WEIGHTS).rename(folder / "adapter_model.bin")


CASES = {
    "DoRA": (lambda f: changed(f, use_dora=True), "use_dora=True"),
    "ranks that differ": (lambda f: changed(f, rank_pattern={"query": 2}), "rank_pattern"),
    "biases": (lambda f: changed(f, bias="all"), "bias='all'"),
    "a base that was rewritten": (lambda f: changed(f, init_lora_weights="pissa_niter_4"), "init_lora_weights"),
    "another method": (lambda f: changed(f, peft_type="IA3"), "has IA3 weights"),
    "no rank": (lambda f: changed(f, r=None), "r=None"),
    "pickled": (pickled, "pickled ones are never loaded"),
    "no weights": (lambda f: (f / initial_adapter.WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "not JSON": (lambda f: (f / initial_adapter.CONFIG).write_text("{"), "adapter_config.json cannot be read"),
    "no configuration": (lambda f: (f / initial_adapter.CONFIG).unlink(), "the folder has no adapter_config.json"),
    "cut short": (lambda f: (f / initial_adapter.WEIGHTS).write_bytes(b"x"), "damaged or cut short"),
}


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(tiny_folder(folder / "base", "bert"), folder / "a", target_modules=["query"])
    return folder


@pytest.mark.parametrize("case", CASES)
def test_what_is_refused(right, tmp_path, case):
    spoil, words = CASES[case]
    shutil.copytree(right / "a", tmp_path / "a")
    spoil(tmp_path / "a")
    with pytest.raises(UserError, match="adapter_name_or_path") as caught:
        initial_adapter.read(str(tmp_path / "a"))
    assert words in str(caught.value)


@pytest.mark.parametrize("name, words", [("./nowhere", "no such folder"), ("no/such-adapter", "from the hub")])
def test_what_is_not_there(name, words):
    with pytest.raises(UserError, match=words):
        initial_adapter.read(name)


def test_another_adapter_is_another_run():
    config = parse(["--adapter_name_or_path", "x"])
    found = {"data": "1", "backbone": "2", "adapter": "3"}
    refuse_changed(config, found, {"identity": dict(found)})
    for before, now in (({**found, "adapter": "4"}, found), (found, {"data": "1", "backbone": "2"})):
        with pytest.raises(UserError, match="adapter_name_or_path"):
            refuse_changed(config, now, {"identity": before})


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "llama"])
def test_a_fine_tuned_classifier_keeps_its_head(tmp_path, model_type):
    """A checkpoint that classifies already goes on from what it has learnt; its head trains on."""
    base = tiny_folder(tmp_path / "base", model_type)
    torch.manual_seed(11)
    tuned = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, pad_token_id=0).eval()
    tuned.save_pretrained(base)
    loaded = backbone.load(str(base), num_labels=3, label_names=("a", "b", "c"))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.eval()(**inputs()).logits, tuned(**inputs()).logits)
    assert not labels.reorder_head(loaded, loaded.known_classes, ("a", "b", "c")), (
        "LABEL_0 is no name that anybody gave"
    )
    assert all(p.requires_grad for n, p in loaded.model.named_parameters() if n in loaded.task_head_names)
    assert any(n.startswith(("classifier", "score")) for n in loaded.task_head_names)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "llama"])
def test_a_head_that_knows_the_classes_in_another_order_is_put_into_ours(tmp_path, model_type):
    base = tiny_folder(tmp_path / "base", model_type)
    tuned = AutoModelForSequenceClassification.from_pretrained(
        base, id2label={0: "C", 1: "A", 2: "B"}, label2id={"C": 0, "A": 1, "B": 2}, pad_token_id=0
    ).eval()
    tuned.save_pretrained(base)
    ours = ("a", "b", "c")
    loaded = backbone.load(str(base), num_labels=3, label_names=ours)
    assert loaded.known_classes == ("C", "A", "B") and labels.reorder_head(loaded, loaded.known_classes, ours)
    with torch.no_grad():
        expected = tuned(**inputs()).logits[:, [1, 2, 0]]
        torch.testing.assert_close(loaded.model.eval()(**inputs()).logits, expected)
    new = backbone.load(str(base), num_labels=4, label_names=(*ours, "d"))
    assert new.known_classes == (), "of another size: it begins anew"


def test_classes_are_known_by_their_names():
    columns = labels.columns(("CONTRADICTION", "Neutral", "entailment"), ("entailment", "neutral", "contradiction"))
    assert columns == [2, 1, 0] and labels.columns(("a", "A"), ("a", "b")) is None
    assert labels.in_order(torch.tensor([[1.0, 2.0]]), ("NO", "YES"), ("yes", "no")).tolist() == [[2.0, 1.0]]
    assert labels.doubt(("good", "bad"), ("accept", "reject")).startswith(
        "calls its classes good, bad; they are mapped"
    )
    assert not any(labels.doubt(theirs, ("no", "yes")) for theirs in (("LABEL_0", "LABEL_1"), ("Yes", "No")))
    assert labels.doubt(("LABEL_0",), ()) == ""
