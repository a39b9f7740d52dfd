"""What an export is compared with: exact products, and of a bf16 model the fp32 model of the same numbers."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from prunadapt_ds.logits import exact_products, upcast_parameters
from prunadapt_ds.models.families import FAMILIES
from tests.tiny import VARIANTS, VOCABULARY, tiny_model

pytestmark = pytest.mark.fast
NOT_IN_BF16 = {"hidden_size": 48, "initializer_range": 0.2}  # the root of which Gemma multiplies its embeddings by


@pytest.mark.parametrize("model_type, changes", [*((m, {}) for m in [*FAMILIES, *VARIANTS]), ("gemma", NOT_IN_BF16)])
def test_upcast_is_the_fp32_model(tmp_path, model_type, changes):
    tiny_model(model_type, **changes).save_pretrained(tmp_path)
    stored = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    exact = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    exact.load_state_dict({name: tensor.float() for name, tensor in stored.state_dict().items()})
    ids = torch.randint(5, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rounded = stored(input_ids=ids).logits
        with upcast_parameters(stored):
            upcast = stored(input_ids=ids).logits
        want = exact(input_ids=ids).logits
    assert upcast.dtype == torch.float32
    torch.testing.assert_close(upcast, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(rounded.float(), want, rtol=1e-5, atol=1e-5), "rounding between must show here"


def test_products_are_exact_where_the_environment_allows_less():
    was = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(was)
