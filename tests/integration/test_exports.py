"""Every family in every format it can have, loaded by one fresh process without this package."""

import json
import os
import subprocess
import sys

import pytest
import torch

from prunadapt_ds import export, formats, gates
from prunadapt_ds.budget import decide
from prunadapt_ds.errors import UserError
from prunadapt_ds.models.families import FAMILIES
from prunadapt_ds.models.layouts import uniform_floors
from tests.tiny import VARIANTS, tiny_tokenizer
from tests.unit.test_resize import adapted, inputs, plan_of

pytestmark = pytest.mark.ci
MODELS = [*FAMILIES, *VARIANTS]
DECODERS = [name for name in MODELS if FAMILIES[VARIANTS.get(name, (name,))[0]].is_decoder]

LOADER = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
folders, batch = json.loads(sys.argv[1]), load_file(sys.argv[2])
logits = {}
for name, remote in folders.items():
    auto = AutoModelForCausalLM if "-language-" in name else AutoModelForSequenceClassification
    model = auto.from_pretrained(name, trust_remote_code=remote, dtype=torch.float32)
    AutoTokenizer.from_pretrained(name)
    with torch.no_grad():
        logits[name] = model.eval()(**batch).logits
assert "prunadapt_ds" not in sys.modules
save_file(logits, sys.argv[3])
"""


def uniform_plan(family, structure, config):
    floored = uniform_floors(family, structure, config, 8)
    scores = torch.rand(structure.num_units, generator=torch.Generator().manual_seed(1))
    costs = torch.cat([s.costs("params").diff() for s in structure.sublayers])
    costs = torch.where(
        torch.cat([torch.full((s.num_units,), s.layer) for s in structure.sublayers]) == 1, 0.5 * costs, costs
    )
    much = family.heads.config_fields or family.drops_layers
    return decide(scores * costs, floored, 0.55 if much else 0.2, uniform=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """folder -> (logits of the masked model, those that a fresh process computes), and the plans."""
    base, wanted, plans, remote = tmp_path_factory.mktemp("exports"), {}, {}, {}
    tokenizer = tiny_tokenizer(base / "tokenizer")
    for name in MODELS:
        model, layout, structure = adapted(name)
        family = FAMILIES[model.config.model_type]
        for how, kinds in (
            ("unequal", ("compact", "padded")),
            ("no-heads", ("padded",)),
            ("uniform", ("compact", "uniform")),
        ):
            if how == "uniform":
                plan = uniform_plan(family, structure, model.config)
                model, layout, _ = adapted(name, skips=family.drops_layers)
            else:
                plan = plan_of(structure, how)
            gates.apply_mask(model, plan.mask())
            with torch.no_grad():
                logits = model(**inputs()).logits
            compact = base / f"{name}-{how}-compact"
            export.export(model, layout, plan, tokenizer, compact)
            plans[f"{name}-{how}"] = plan
            for kind in kinds:
                folder = base / f"{name}-{how}-{kind}"
                if kind != "compact":
                    formats.convert(kind, compact, plan.to_dict(), folder)
                wanted[str(folder)], remote[str(folder)] = logits, kind == "compact"
    for name in DECODERS:
        model, layout, structure = adapted(name, of_language=True)
        plan = plan_of(structure, "unequal")
        gates.apply_mask(model, plan.mask())
        compact, padded = (base / f"{name}-language-{kind}" for kind in ("compact", "padded"))
        export.export(model, layout, plan, tokenizer, compact)
        formats.convert("padded", compact, plan.to_dict(), padded)
        with torch.no_grad():
            logits = model(**inputs()).logits
        wanted |= {str(compact): logits, str(padded): logits}
        remote |= {str(compact): True, str(padded): False}
    found = stranger(base, remote)
    return base, {folder: (logits, found[folder]) for folder, logits in wanted.items()}, plans


def stranger(base, remote, **variables):
    """The logits of each folder in a fresh process; `remote`: which of them bring code of their own."""
    from safetensors.torch import load_file, save_file

    save_file(inputs(), base / "batch.safetensors")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(base / "modules"), **variables}
    arguments = [json.dumps(remote), str(base / "batch.safetensors"), str(base / "logits.safetensors")]
    done = subprocess.run(
        [sys.executable, "-c", LOADER, *arguments], cwd=base, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(base / "logits.safetensors")


HOW = ("unequal-compact", "unequal-padded", "no-heads-padded", "uniform-compact", "uniform-uniform")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", MODELS)
def test_a_stranger_computes_the_same(exported, name, how):
    base, logits, _ = exported
    masked, found = logits[str(base / f"{name}-{how}")]
    torch.testing.assert_close(found, masked, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["compact", "padded"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_stranger_finds_the_same_next_tokens(exported, name, kind):
    base, logits, _ = exported
    masked, found = logits[str(base / f"{name}-language-{kind}")]
    real = inputs()["attention_mask"].bool()  # transformers 4 and 5 differ in what padding sees
    torch.testing.assert_close(found[real], masked[real], rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_transformers_4_computes_the_same(exported, tmp_path):
    """Servers are slow to follow. The names of its fields are older_readers.py's matter."""
    base, logits, _ = exported
    older = ["transformers==4.57.3", "tokenizers==0.22.1", "huggingface_hub==0.36.2"]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "older"), *older]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("transformers 4 cannot be installed here")
    remote = {folder: folder.endswith("compact") for folder in logits}
    modules = {"PYTHONPATH": str(tmp_path / "older"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    found = stranger(base, remote, **modules)
    for folder, (masked, _) in logits.items():
        real = inputs()["attention_mask"].bool() if masked.dim() == 3 else slice(None)  # of a token, or of a text
        torch.testing.assert_close(found[folder][real], masked[real], rtol=1e-4, atol=1e-5, msg=folder)


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_files(exported, name):
    base, _, plans = exported
    config = json.loads((base / f"{name}-uniform-uniform" / "config.json").read_text())
    family = FAMILIES[config["model_type"]]
    assert "pruned_structure" not in config and "auto_map" not in config
    every = [(c["heads"], c["neurons"]) for c in plans[f"{name}-uniform"].counts()]
    counts = [c for c in every if c != (0, 0)]
    assert (len(counts) < len(every)) == family.drops_layers, "whole layers go where the configuration can say so"
    assert len(set(counts)) == 1 and (counts[0][1] < 48 or family.drops_layers)
    heads = plans[f"{name}-uniform"].structure.sublayers[0].num_units
    assert (counts[0][0] < heads) == bool(family.heads.config_fields), "heads go where the configuration can say so"
    for kind in ("unequal-padded", "uniform-uniform"):
        assert not (base / f"{name}-{kind}" / "modeling_prunadapt.py").exists()
        assert (base / f"{name}-{kind}" / "tokenizer.json").is_file()
    sizes = [(base / f"{name}-{k}" / "model.safetensors").stat().st_size for k in ("unequal-compact", "unequal-padded")]
    assert sizes[0] < sizes[1]


def test_unequal_layers_fit_no_stock_configuration(exported, tmp_path):
    base, _, plans = exported
    for name, word in (("llama", "layers keep"), ("bert", "--uniform")):
        with pytest.raises(UserError, match=word):
            formats.convert(
                "uniform", base / f"{name}-unequal-compact", plans[f"{name}-unequal"].to_dict(), tmp_path / "x"
            )
    of_three = plans["llama-mha-unequal"].to_dict()
    for unit in of_three["units"]:
        unit["kept"] = list(range({"heads": 3, "neurons": 8}[unit["kind"]]))
    with pytest.raises(UserError, match="accepts 1, 2, 4 heads, not 3"):
        formats.convert("uniform", base / "llama-mha-unequal-compact", of_three, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llama", "llama-mha"])
def test_uniform_within_one_step(name):
    model, _, structure = adapted(name)
    floored = uniform_floors(FAMILIES["llama"], structure, model.config, 8)
    scores = torch.rand(structure.num_units, generator=torch.Generator().manual_seed(3))
    costs = torch.cat([s.costs("params").diff() for s in structure.sublayers])
    step = 3 * max(int(costs[0]), 8 * int(costs[2]))
    for sparsity in (0.1, 0.2, 0.35, 0.5, 0.6):
        plan = decide(scores, floored, sparsity, uniform=True)
        assert abs(plan.cost("params") - (1 - sparsity) * structure.dense_cost("params")) <= step
        assert len({(c["heads"], c["neurons"]) for c in plan.counts()}) == 1
