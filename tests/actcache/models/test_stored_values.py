import pytest
import torch
from support.adapters import activated, disabled, scaled, with_adapters
from support.tiny_models import make_model

from actcache.models.stored_values import used_state


def names(model):
    return [part.name for part in used_state(model)]


def test_a_plain_model_uses_all_that_it_saves():
    model = make_model("gpt2", 512)
    assert names(model) == list(model.state_dict())
    assert "lm_head.weight" in names(model), "a tied weight comes once for each place"


def test_adapters_that_are_not_active_are_left_out():
    model = with_adapters(["lm_head"])
    used = set(names(model))
    assert any("lora_A.first" in name for name in used)
    assert not any("second" in name or "original_module" in name for name in used)
    assert {name for name in names(activated(model, "second")) if "first" in name} == set()
    off = names(disabled(model))
    assert not any("lora" in name or "modules_to_save" in name or "scaling" in name for name in off)
    assert sum("original_module" in name for name in off) == 1


def test_the_scaling_of_an_adapter_is_a_number():
    numbers = {part.value for part in used_state(scaled(with_adapters(), 3)) if isinstance(part.value, str)}
    assert numbers == {repr(3 * 8 / 2)}, "three times lora_alpha / r"


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantised_tensor_is_its_integers_and_their_scale():
    module = torch.nn.Module()
    module.register_buffer(
        "q", torch._make_per_tensor_quantized_tensor(torch.tensor([1, -2], dtype=torch.int8), 0.5, 3)
    )
    found, scale = used_state(module)
    assert torch.equal(found.value, torch.tensor([1, -2], dtype=torch.int8))
    assert not found.is_kept
    assert scale.value == "torch.per_tensor_affine 0.5 3"
