"""Labels in units of their spread: what a head answers before and after, and which runs do so."""

import pytest
import torch
from datasets import Dataset

from prunadapt_ds import backbone, label_scale
from prunadapt_ds.data import TASKS, Task, TaskData
from prunadapt_ds.errors import UserError
from prunadapt_ds.label_scale import OWN_UNIT, LabelScale
from tests.tiny import tiny_folder
from tests.unit.test_resize import inputs

pytestmark = pytest.mark.fast
OWN = Task("own_regression", None, "a", None, (), ("r2",))
YEARS = [1990.5, 2010.0, 1970.25, 1985.0]


def loaded_with(tmp_path, model_type, task, labels):
    folder = tiny_folder(tmp_path / model_type, model_type)
    loaded = backbone.load(str(folder), num_labels=task.num_labels, is_regression=True)
    return TaskData(task, Dataset.from_dict({"label": labels}), {}), loaded


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "llama", "gpt2"])
def test_labels_get_mean_0_and_spread_1_as_far_as_the_head_has_a_bias(tmp_path, model_type):
    data, loaded = loaded_with(tmp_path, model_type, OWN, YEARS)
    scale = label_scale.of_training(data, loaded, None)
    learnt = scale.standardised(torch.tensor(YEARS, dtype=torch.float64))
    assert learnt.dtype == torch.float32 and float(learnt.std(correction=0)) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(scale.restored(learnt), torch.tensor(YEARS))
    if model_type in ("llama", "gpt2"):
        assert scale.mean == 0 and "has no bias" in loaded.notes[-1] and "around 1989" in loaded.notes[-1]
    else:
        assert float(learnt.mean()) == pytest.approx(0, abs=1e-6) and not loaded.notes


@pytest.mark.parametrize("model_type", ["bert", "roberta", "llama"])
def test_unfolded_a_head_answers_in_units_of_training_and_folded_again_in_those_of_labels(tmp_path, model_type):
    _, loaded = loaded_with(tmp_path, model_type, OWN, YEARS)
    scale = LabelScale(1990.0 if model_type != "llama" else 0.0, 25.0)
    model = loaded.model.eval()
    with torch.no_grad():
        before = model(**inputs()).logits
        label_scale.unfold(scale, loaded)
        torch.testing.assert_close(scale.restored(model(**inputs()).logits), before, atol=1e-3, rtol=0)
        parameters = dict(model.named_parameters())
        for name, (factor, shift) in label_scale.fold(scale, loaded).items():
            if name in parameters:
                parameters[name].mul_(factor).add_(shift)
        torch.testing.assert_close(model(**inputs()).logits, before, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "task, labels, saved",
    [
        (TASKS["sample"], [0, 1], None),  # classes
        (OWN, [2.5, 2.5], None),  # does not vary in the rows that --max_train_samples picked
        (OWN, YEARS, {"step": 3}),  # resumed from a checkpoint of before
    ],
)
def test_who_learns_labels_as_they_are(tmp_path, task, labels, saved):
    data, loaded = loaded_with(tmp_path, "bert", task, labels)
    scale = label_scale.of_training(data, loaded, saved)
    assert scale is OWN_UNIT or scale == OWN_UNIT
    assert label_scale.fold(scale, loaded) == {}
    kept = torch.tensor([1, 2])
    assert scale.standardised(kept) is kept and scale.restored(kept) is kept


def test_a_resumed_run_keeps_the_scale_that_it_began_with(tmp_path):
    data, loaded = loaded_with(tmp_path, "bert", OWN, YEARS)
    assert label_scale.of_training(data, loaded, {"label_scale": [3.0, 2.0]}) == LabelScale(3.0, 2.0)


@pytest.mark.parametrize(
    "mean, std, fitting",
    [
        (0.0, 1.0, {"float32", "bfloat16", "float16"}),
        (2.7, 1.5, {"float32", "bfloat16", "float16"}),  # STS-B
        (1998.0, 12.0, {"float32"}),  # years: a step of bfloat16 is 8 there, and one of float16 is 1
        (280_000.0, 40_000.0, {"float32", "bfloat16"}),  # prices: float16 ends at 65504
        (0.0, 1e-6, {"float32", "bfloat16"}),
    ],
)
def test_exports_in_sixteen_bits_must_hold_the_labels(mean, std, fitting):
    scale = label_scale.LabelScale(mean, std)
    for dtype in ("float32", "bfloat16", "float16"):
        assert scale.fits(getattr(torch, dtype)) == (dtype in fitting)
        if dtype in fitting:
            label_scale.refuse_dtype(scale, dtype)
        else:
            with pytest.raises(UserError, match=r"export_dtype='b?float16': cannot hold labels around .*take float32"):
                label_scale.refuse_dtype(scale, dtype)
    label_scale.refuse_dtype(scale, None)
