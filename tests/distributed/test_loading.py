"""Loading and exporting under ZeRO-3: every rank reads its own part, and the model is the one that `from_pretrained` would have
made; what is written is the same, whatever lies where."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunadapt_ds import export, gates
from prunadapt_ds.models.families import FAMILIES
from tests.distributed import runs
from tests.distributed.harness import run_ranks
from tests.tiny import tiny_folder, tiny_language_folder, tiny_model, tiny_tokenizer
from tests.unit.test_resize import adapted, inputs, plan_of

COMMON = ("bert", "gpt2")


def same_as_plain(ranks):
    """Every rank holds the same as every other, and as the plain path."""
    for pairs in zip(*ranks, strict=True):
        streamed, plain = pairs[0]
        assert not isinstance(streamed, str), streamed
        assert streamed == plain
        assert all(pair == pairs[0] for pair in pairs)


def old_names(folder):
    """The same weights as an old checkpoint of a whole classifier named them: `bert.`, gamma and beta; a forgotten buffer."""
    tensors = load_file(folder / "model.safetensors")
    names = {
        n: "bert." + n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        for n in tensors
    }
    tensors = {names[n]: tensor for n, tensor in tensors.items()}
    tensors |= {"bert.embeddings.position_ids": torch.arange(512)[None], "cls.predictions.bias": torch.ones(200)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.ci
def test_streamed_is_what_from_pretrained_loads(tmp_path):
    """Two ranks: a plain family and one with transposed weights; several files; old names; mistakes; a head of another size."""
    folders = [tiny_folder(tmp_path / name, name, seed=4) for name in COMMON]
    old_names(folders[0])
    for name in ("parts", "lost"):
        tiny_model("llama", num_labels=5).bfloat16().save_pretrained(tmp_path / name, max_shard_size="20KB")
        tiny_tokenizer(tmp_path / name, of_decoder=True)
    parts = sorted((tmp_path / "parts").glob("*.safetensors"))
    sorted((tmp_path / "lost").glob("*.safetensors"))[1].unlink()
    others = [str(tmp_path / name) for name in ("parts", "lost")]
    ranks = run_ranks(runs.loaded_under_zero3, 2, [*map(str, folders), *others], False, "float32", others)
    lost, headless = [pairs.pop()[0] for pairs in ranks], [pairs.pop()[0] for pairs in ranks]
    same_as_plain(ranks)
    assert lost[0] == lost[1] and "model_name_or_path" in lost[0] and "00002-of" in lost[0], lost[0]
    tensors, names, notes = headless[0]
    assert headless[0] == headless[1] and names == ["score.weight"] and not notes
    assert tensors["score.weight"][0] == (3, 32), "a head of another size is new"
    stored = {name: tensor for part in parts for name, tensor in load_file(part).items()}
    assert (
        len(parts) > 2
        and bytes(tensors["model.norm.weight"][1]) == stored["model.norm.weight"].float().numpy().tobytes()
    )


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_family(tmp_path, world_size):
    folders = [str(tiny_folder(tmp_path / name, name, seed=4)) for name in FAMILIES]
    for precision in ("float32", "bfloat16"):
        same_as_plain(run_ranks(runs.loaded_under_zero3, world_size, folders, False, precision))
    decoders = [n for n, family in FAMILIES.items() if family.is_decoder]
    tied = [str(tiny_language_folder(tmp_path / f"{n}-lm", n, tie_word_embeddings=True)) for n in decoders]
    same_as_plain(run_ranks(runs.loaded_under_zero3, world_size, tied, True))


def parts_equal_whole(families, tmp_path, world_size):
    """Exports are the same in whatever blocks their rows came, and nothing larger than a block was gathered for them.

    Products of LoRA's matrices are rounded as the number of rows has it.
    """
    for name in families:
        tiny_folder(tmp_path / name, name, seed=4)
    ranks = run_ranks(runs.exported_under_zero3, world_size, families, str(tmp_path))
    assert all(rank == ranks[0] for rank in ranks)
    for family, (whole, *most) in zip(families, ranks[0], strict=True):
        assert whole > 1000 >= most[0] and most[1] <= 100
        plain, *parted = (load_file(tmp_path / f"{family}-{way}" / "model.safetensors") for way in range(3))
        for tensors in parted:
            torch.testing.assert_close(tensors, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.ci
def test_an_export_is_the_same_from_parts(tmp_path):
    """Three ranks, none of which has whole rows: a plain family, transposed weights, fused ones."""
    parts_equal_whole([*COMMON, "phi3"], tmp_path, 3)


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_family_is_exported_from_parts(tmp_path, world_size):
    parts_equal_whole(list(FAMILIES), tmp_path, world_size)


def compact_loads_in_shards(model_type, how, tmp_path):
    """Whoever trains it further with DeepSpeed begins with the logits that it had."""
    model, layout, structure = adapted(model_type, skips=how == "skipped")
    plan = plan_of(structure, how)
    gates.apply_mask(model, plan.mask())
    with torch.no_grad():
        masked = model(**inputs()).logits
    folder = tmp_path / f"{model_type}-{how}"
    export.export(model, layout, plan, tiny_tokenizer(tmp_path / "tokenizer"), folder)
    for logits, whole, strange, losses in run_ranks(runs.compact_under_zero3, 2, str(folder), inputs()):
        torch.testing.assert_close(torch.tensor(logits), masked, rtol=1e-5, atol=1e-5)
        assert not whole and not strange and losses[-1] < losses[0]


@pytest.mark.ci
@pytest.mark.parametrize("model_type, how", [("bert", "skipped"), ("gpt2", "no-heads"), ("llama", "unequal")])
def test_a_compact_folder_loads_in_shards(tmp_path, model_type, how):
    compact_loads_in_shards(model_type, how, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("how", ["unequal", "nothing"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_compact_folder_of_every_family_loads_in_shards(tmp_path, model_type, how):
    compact_loads_in_shards(model_type, how, tmp_path)
