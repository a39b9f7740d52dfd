"""The hub path against a stand-in for the hub: a local server that speaks as much of its protocol as is used.

Each load runs in a process of its own: HF_ENDPOINT and the caches are read when the libraries are imported.
"""

import hashlib
import itertools
import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file

from prunadapt_ds import card, export
from prunadapt_ds.budget import PruningPlan
from prunadapt_ds.data import TASKS
from prunadapt_ds.hub import unreachable
from tests.integration import processes
from tests.unit.test_card import LANGUAGE, OWN, report_of

pytestmark = pytest.mark.ci

REPO = "nyu-mll/glue"
COMMIT = hashlib.sha1(b"stand-in").hexdigest()
TAGGED = hashlib.sha1(b"stand-in, as it was at its tag").hexdigest()
COMMITS = {"main": COMMIT, COMMIT: COMMIT, "v1": TAGGED, TAGGED: TAGGED}
ROWS = {
    "rte": {
        "columns": ("sentence1", "sentence2"),
        "names": ["entailment", "not_entailment"],
        "splits": {"train": 5, "validation": 3, "test": 2},
    },
    "qnli": {
        "columns": ("question", "sentence"),
        "names": ["entailment", "not_entailment"],
        "splits": {"train": 4, "validation": 2, "test": 2},
    },
    "mnli": {
        "columns": ("premise", "hypothesis"),
        "names": ["entailment", "neutral", "contradiction"],
        "splits": {
            "train": 6,
            "validation_matched": 4,
            "validation_mismatched": 3,
            "test_matched": 2,
            "test_mismatched": 2,
        },
    },
}
LOAD = """
import json, sys, time
from types import SimpleNamespace
import datasets
from prunadapt_ds.data import load_task
from prunadapt_ds.errors import UserError
names = "task_name data_dir train_file validation_file max_train_samples max_eval_samples".split()
config = SimpleNamespace(**dict.fromkeys(names))
config.task_name = sys.argv[1]
started = time.monotonic()
try:
    data = load_task(config, seed=0)
    out = {"train": data.train.to_dict(), "validation": {k: v.to_dict() for k, v in data.validation.items()}}
except UserError as error:
    out = {"error": str(error)}
print(json.dumps({**out, "seconds": time.monotonic() - started}))
"""


def columns(task: str, split: str) -> dict[str, list]:
    spec = ROWS[task]
    first, second = spec["columns"]
    n = spec["splits"][split]
    return {
        first: [f"{task} {split} first {i}" for i in range(n)],
        second: [f'{task} {split} "second" {i}' for i in range(n)],
        "label": [-1 if split.startswith("test") else i % len(spec["names"]) for i in range(n)],
        "idx": [100 + i for i in range(n)],  # not 0..N-1: ours must not be taken from here
    }


def repository() -> dict[str, bytes]:
    """Path to content of every file, laid out as in the real repository."""
    import yaml

    files, configs, infos = {}, [], []
    for task, spec in ROWS.items():
        first, second = spec["columns"]
        label = {"class_label": {"names": {str(i): name for i, name in enumerate(spec["names"])}}}
        configs.append(
            {
                "config_name": task,
                "data_files": [{"split": split, "path": f"{task}/{split}-*"} for split in spec["splits"]],
            }
        )
        infos.append(
            {
                "config_name": task,
                "features": [
                    {"name": first, "dtype": "string"},
                    {"name": second, "dtype": "string"},
                    {"name": "label", "dtype": label},
                    {"name": "idx", "dtype": "int32"},
                ],
                "splits": [{"name": split, "num_examples": n} for split, n in spec["splits"].items()],
            }
        )
        for split in spec["splits"]:
            sink = pa.BufferOutputStream()
            table = pa.table(columns(task, split))
            table = table.set_column(3, "idx", table["idx"].cast(pa.int32()))
            pq.write_table(table, sink)
            files[f"{task}/{split}-00000-of-00001.parquet"] = sink.getvalue().to_pybytes()
    card = yaml.safe_dump({"dataset_info": infos, "configs": configs})
    files["README.md"] = f"---\n{card}---\n# GLUE\n".encode()
    return files


def models(folder: Path) -> dict[str, dict[str, bytes]]:
    """A model in one file, one in several with a second copy of its weights, one whose weights are pickled; an adapter, and
    a model that is pruned."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    from tests.tiny import layout_and_structure, tiny_folder, tiny_model, tiny_tokenizer

    whole = tiny_folder(folder / "whole", "bert")
    parts = tiny_folder(folder / "parts", "bert")
    AutoModelForSequenceClassification.from_pretrained(whole).save_pretrained(parts, max_shard_size="20KB")
    (parts / "model.safetensors").unlink()
    (parts / "consolidated.safetensors").write_bytes((whole / "model.safetensors").read_bytes())
    pickled = tiny_folder(folder / "pickled", "bert")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query", "value"])
    adapter = get_peft_model(AutoModelForSequenceClassification.from_pretrained(whole), lora)
    adapter.peft_config["default"].base_model_name_or_path = "some/whole"
    adapter.peft_config["default"].revision = "v1"
    adapter.save_pretrained(folder / "adapter")
    (page := folder / "README.md").write_text("A model.")
    model = tiny_model("bert")
    layout, structure = layout_and_structure(model, 16)
    plan = PruningPlan.from_mask(structure, torch.arange(structure.num_units) % 3 > 0)
    export.export(model, layout, plan, tiny_tokenizer(folder / "tokenizer"), folder / "compact")
    return {
        f"models/some/{kind.name}": {file.name: file.read_bytes() for file in (*sorted(kind.iterdir()), page)}
        for kind in (whole, parts, pickled, folder / "adapter", folder / "compact")
    }


class StandIn(BaseHTTPRequestHandler):
    """As much of the hub as loading a dataset or a model needs."""

    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}  # by "datasets/owner/name" or "models/owner/name"
    asked: ClassVar[list[str]] = []

    def log_message(self, *args):
        pass

    def answer(self, body: bytes = b"", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: object) -> None:
        self.answer(json.dumps(value).encode(), Content_Type="application/json")

    def missing(self) -> None:
        self.answer(status=404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")

    def no_revision(self) -> None:
        self.answer(status=404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")

    def entries(self, files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
        """Files and folders under `folder`, as the tree endpoint lists them."""
        found: dict[str, dict] = {}
        for path, body in files.items():
            if folder and not path.startswith(folder + "/"):
                continue
            rest = path[len(folder) :].lstrip("/").split("/")
            for depth in range(1, len(rest)):
                name = "/".join([*([folder] if folder else []), *rest[:depth]])
                if recursive or depth == 1:
                    found[name] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
            if recursive or len(rest) == 1:
                found[path] = self.entry(path, body)
        return list(found.values())

    @staticmethod
    def entry(path: str, body: bytes) -> dict:
        return {"type": "file", "oid": hashlib.sha1(body).hexdigest(), "size": len(body), "path": path}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self.asked.append(f"POST {self.path} {body}")
        for name, files in self.repositories.items():
            if f"/api/{name}/paths-info/" in self.path:
                paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
                listed = [e for e in self.entries(files, "", recursive=True) if e["path"] in paths]
                return self.json(listed)
        return self.missing()

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        url = urlsplit(self.path)
        path = unquote(url.path)
        for name, files in self.repositories.items():
            api, resolve = f"/api/{name}", f"/{name.removeprefix('models/')}/resolve/"
            if path == api or path.startswith(f"{api}/revision/"):
                commit = COMMITS.get(path[len(f"{api}/revision/") :] or "main")
                siblings = [{"rfilename": file} for file in files]
                if commit is None:
                    return self.no_revision()
                return self.json(
                    {"id": name.split("/", 1)[1], "sha": commit, "private": False, "tags": [], "siblings": siblings}
                )
            if path.startswith(f"{api}/tree/"):
                _, _, folder = path[len(f"{api}/tree/") :].partition("/")
                listed = self.entries(files, folder, "recursive=True" in url.query or "recursive=true" in url.query)
                return self.json(listed) if listed else self.missing()
            if path.startswith(resolve):
                revision, _, file = path[len(resolve) :].partition("/")
                if revision not in COMMITS:
                    return self.no_revision()
                if file in files:
                    body = files[file]
                    etag = f'"{hashlib.sha1(body).hexdigest()}"'
                    return self.answer(body, ETag=etag, X_Repo_Commit=COMMITS[revision])
        return self.missing()

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    StandIn.repositories = {f"datasets/{REPO}": repository(), **models(tmp_path_factory.mktemp("models"))}
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hf_home")


def environment(endpoint: str, home: Path) -> dict[str, str]:
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HF_") and not name.lower().endswith("_proxy")
    }
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))
    extra = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "PYTHONPATH": path}
    return {**env, **extra, "HF_HUB_DISABLE_TELEMETRY": "1"}


def start(task: str, endpoint: str, home: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", LOAD, task]
    env = environment(endpoint, home)
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )


def finish(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return {**json.loads(out.splitlines()[-1]), "stderr": err}


def load(task: str, endpoint: str, home: Path) -> dict:
    return finish(start(task, endpoint, home))


def expected(task: str, split: str) -> dict[str, list]:
    raw = columns(task, split)
    first, second = ROWS[task]["columns"]
    n = ROWS[task]["splits"][split]
    texts = {"sentence1": raw[first], "sentence2": raw[second]}
    return {**texts, "label": raw["label"], "index": list(range(n))}


@pytest.mark.parametrize(
    ("task", "validation"),
    [
        ("rte", {"validation": "validation"}),
        ("qnli", {"validation": "validation"}),
        ("mnli", {"matched": "validation_matched", "mismatched": "validation_mismatched"}),
    ],
)
def test_loads_what_the_hub_serves(hub, home, task, validation):
    loaded = load(task, hub, home)
    assert "error" not in loaded, loaded["error"]
    assert any(COMMIT in line and f"{task}/train" in line for line in StandIn.asked)
    assert loaded["train"] == expected(task, "train")
    assert loaded["validation"] == {key: expected(task, split) for key, split in validation.items()}


def test_two_processes_fill_an_empty_cache_at_once(hub, tmp_path):
    both = [finish(process) for process in [start("rte", hub, tmp_path) for _ in range(2)]]
    assert [one.get("train") for one in both] == [expected("rte", "train")] * 2


def test_a_loaded_task_is_there_when_the_hub_is_gone(hub, tmp_path):
    load("rte", hub, tmp_path)
    again = load("rte", "http://127.0.0.1:9", tmp_path)
    assert again.get("train") == expected("rte", "train"), again.get("error")
    assert again["seconds"] < 5


LOAD_MODEL = """
import json, os, sys, time
os.environ["HF_HOME"] = os.environ["HF_HOME"].format(os.environ.get("RANK", 0))
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from prunadapt_ds import backbone, distributed, engine
from prunadapt_ds.errors import UserError
if "RANK" in os.environ:
    distributed.init()
    distributed.start_deepspeed()
    sharded = engine.shard_while_loading({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
started = time.monotonic()
try:
    out = {"layers": backbone.load(sys.argv[1], num_labels=2).layout.num_layers}
except UserError as error:
    out = {"error": str(error)}
print(json.dumps({**out, "seconds": time.monotonic() - started}))
distributed.shutdown()
"""


def load_model(name: str, endpoint: str, home: Path) -> dict:
    command = [sys.executable, "-c", LOAD_MODEL, name]
    env = environment(endpoint, home)
    out = subprocess.PIPE
    return finish(subprocess.Popen(command, env=env, stdout=out, stderr=out, text=True, errors="replace"))


def load_on_two_ranks(name: str, endpoint: str, home: Path) -> list[dict]:
    """Under ZeRO-3; what each rank says. "{}" in `home` is the rank's number."""
    port = processes.free_port()
    ranks = [{**environment(endpoint, home), **processes.place(rank, MASTER_PORT=port)} for rank in range(2)]
    ended = processes.run(["-c", LOAD_MODEL, name], *ranks)
    return [json.loads(next(line for line in rank.text.splitlines() if line.startswith("{"))) for rank in ended]


def cached(home: Path, without: str = "") -> None:
    """A cache that holds some/encoder, but for one file."""
    from tests.tiny import tiny_folder

    folder = home / "hub" / "models--some--encoder"
    tiny_folder(folder / "snapshots" / COMMIT, "bert")
    if without:
        (folder / "snapshots" / COMMIT / without).unlink()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)


@pytest.mark.parametrize("kind", ["whole", "parts"])
def test_two_ranks_load_a_model_of_the_hub_and_again_when_it_is_gone(hub, tmp_path, kind):
    StandIn.asked.clear()
    first = load_on_two_ranks(f"some/{kind}", hub, tmp_path)
    assert [rank.get("layers") for rank in first] == [3, 3], first
    fetched = [line for line in StandIn.asked if line.startswith("GET") and "safetensors" in line]
    assert fetched and not any("consolidated" in line for line in fetched), "only what transformers looks for"
    again = load_on_two_ranks(f"some/{kind}", "http://127.0.0.1:9", tmp_path)
    assert [rank.get("layers") for rank in again] == [3, 3]


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("config.json", "set HF_HOME"),
        ("tokenizer.json", "has no tokenizer"),
        ("model.safetensors", "set HF_HOME"),
    ],
)
def test_a_host_that_alone_lacks_a_file_ends_all_ranks(tmp_path, missing, said):
    """They load together: a rank that left it alone would be waited for."""
    cached(tmp_path / "0")
    cached(tmp_path / "1", without=missing)
    ranks = load_on_two_ranks("some/encoder", "http://127.0.0.1:9", tmp_path / "{}")
    assert ranks[0]["error"] == ranks[1]["error"]
    assert "model_name_or_path='some/encoder'" in ranks[0]["error"] and said in ranks[0]["error"]


def test_a_revision_is_what_is_loaded_and_again_when_the_hub_is_gone(hub, tmp_path):
    for name in ("some/whole@v1", f"some/whole@{TAGGED}"):
        assert load_model(name, hub, tmp_path).get("layers") == 3
        assert [folder.name for folder in tmp_path.glob("hub/*/snapshots/*")] == [TAGGED], "and no other"
        assert load_model(name, "http://127.0.0.1:9", tmp_path).get("layers") == 3
    for endpoint in (hub, "http://127.0.0.1:9"):
        for name in ("some/whole@v2", "some/whole@"):
            assert f"model_name_or_path='{name}'" in load_model(name, endpoint, tmp_path)["error"]


LOAD_OTHERS = """
import json
from prunadapt_ds import initial_adapter, trained_folder
from prunadapt_ds.model_folder import check
from prunadapt_ds.errors import UserError
kinds = [type(trained_folder.load_folder(name, trust=False)[0]).__name__ for name in ("some/adapter", "some/compact")]
refused = []
for name in ("some/adapter", "some/compact"):
    try:
        check(name)
    except UserError as error:
        refused.append(str(error))
print(json.dumps({"r": initial_adapter.read("some/adapter").r, "kinds": kinds, "refused": refused}))
"""


@pytest.mark.parametrize("endpoint", ["answers", "is gone"])
def test_adapters_and_pruned_models_of_the_hub_are_scored_as_such(hub, home, endpoint):
    env = environment(hub if endpoint == "answers" else "http://127.0.0.1:9", home)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    found = finish(subprocess.Popen([sys.executable, "-c", LOAD_OTHERS], env=env, **pipes))
    assert (found["r"], found["kinds"]) == (
        2,
        ["PeftModelForSequenceClassification", "PrunedBertForSequenceClassification"],
    )
    assert list(home.glob(f"hub/models--some--whole/snapshots/{TAGGED}/*.safetensors")), "the base at its revision"
    adapter, pruned = found["refused"]
    assert "is the folder of an adapter" in adapter and "is pruned already" in pruned


def test_pickled_weights_of_the_hub_are_refused_and_the_command_that_is_told_converts_them(hub, tmp_path):
    out = load_model("some/pickled", hub, tmp_path)
    assert "has no *.safetensors" in out["error"] and not list(tmp_path.rglob("*.bin"))
    command = out["error"].partition("name the new folder: ")[2]
    python = f'"{sys.executable}" {command.removeprefix("python ")}'
    subprocess.run(python, shell=True, env=environment(hub, tmp_path), cwd=tmp_path, check=True, timeout=120)
    assert load_model(str(tmp_path / "pickled-safetensors"), hub, tmp_path).get("layers") == 3


BY_TRANSFORMERS = """
import sys
from transformers import AutoModelForSequenceClassification, AutoTokenizer
for kind in (AutoModelForSequenceClassification, AutoTokenizer):
    kind.from_pretrained(sys.argv[1])
"""


@pytest.mark.parametrize("kind", ["whole", "parts"])
def test_what_transformers_has_cached_is_taken_when_the_hub_is_gone(hub, tmp_path, kind):
    command = [sys.executable, "-c", BY_TRANSFORMERS, f"some/{kind}"]
    subprocess.run(command, env=environment(hub, tmp_path), check=True, timeout=120)
    assert load_model(f"some/{kind}", "http://127.0.0.1:9", tmp_path).get("layers") == 3


def test_a_cached_model_is_there_when_the_hub_is_gone(tmp_path):
    cached(tmp_path)
    asked = []

    class Gone(socketserver.BaseRequestHandler):
        def handle(self):  # hangs up
            asked.append(self.client_address)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Gone) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        out = load_model("some/encoder", f"http://127.0.0.1:{server.server_address[1]}", tmp_path)
        server.shutdown()
    assert out.get("layers") == 3
    assert 1 <= len(asked) <= 2, "nothing asks the hub again and again"


def test_a_model_on_an_unreachable_hub_is_reported_quickly(tmp_path):
    with black_hole() as listener:
        out = load_model("some/encoder", f"http://127.0.0.1:{listener.getsockname()[1]}", tmp_path)
    assert out["seconds"] < 5 and "model_name_or_path='some/encoder'" in out["error"]
    for word in ("could not be loaded from the hub", "name a folder", "HF_HOME"):
        assert word in out["error"]
    assert "Traceback" not in out["stderr"]


def black_hole():
    """A port that takes connections and never answers."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(16)
    return listener


@pytest.mark.parametrize("kind", ["refused", "silent", "no such host"])
def test_an_unreachable_hub_is_reported_quickly(tmp_path, kind):
    with black_hole() as listener:
        endpoint = {
            "refused": "http://127.0.0.1:9",
            "silent": f"http://127.0.0.1:{listener.getsockname()[1]}",
            "no such host": "http://hub.invalid",
        }[kind]
        started = time.monotonic()
        out = load("rte", endpoint, tmp_path)
    assert out["seconds"] < 5, f"{time.monotonic() - started:.1f} s in all"
    assert "task_name='rte'" in out["error"]
    for option in ("--data_dir", "--train_file", "--task_name sample"):
        assert option in out["error"]
    assert "\n" not in out["error"] and "Traceback" not in out["stderr"]


@pytest.mark.full
def test_the_hub_itself_takes_the_cards(monkeypatch):
    """`ModelCard.validate` asks the hub, which alone has the validator: run where it answers. What can be checked without
    it, the library's own reading of the metadata, is in tests/unit/test_card.py."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # as all other tests are
    reason = unreachable(lambda api, timeout: api.model_info("google-bert/bert-base-uncased", timeout=timeout))
    if reason is not None:
        pytest.skip(f"the validator is the hub's own and needs the network: {reason}")
    for task, kind in itertools.product((*TASKS.values(), OWN, LANGUAGE), ("compact", "padded")):
        report, _ = report_of(task, kind)
        ModelCard(card.render(report, "google-bert/bert-base-uncased", task, kind, {"license": "mit"})).validate()
