"""Adapters of peft on tiny models, and what can be done to them."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from support.tiny_models import make_model


def with_adapters(saved: Sequence[str] | None = None) -> PeftModel:
    """A Llama with adapters, first and second, in its attention, both far from doing nothing; the first is active.

    saved: modules of which each adapter has a copy of its own.
    """
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=saved)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers by names that are going away
        model = get_peft_model(make_model("llama", 512), config, "first")
        model.add_adapter("second", config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return activated(model.eval(), "first")


def activated(model: PeftModel, *adapters: str) -> PeftModel:
    """The model with these adapters active and no other."""
    model.base_model.set_adapter(list(adapters))
    return model


def scaled(model: PeftModel, factor: float) -> PeftModel:
    """The model with the first adapter `factor` times as strong."""
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["first"] *= factor
    return model


def disabled(model: PeftModel) -> PeftModel:
    """The model with all adapters off."""
    model.base_model.disable_adapter_layers()
    return model


def save_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """Save a random adapter of the model in a folder as users of peft do, and return where.

    settings: of LoraConfig.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        config = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"]} | settings)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
        model.save_pretrained(folder)
    return folder
