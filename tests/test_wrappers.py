"""Models behind something else: a compiler, an adapter, a device map."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn import Module
from transformers import AutoModelForCausalLM, StaticCache

from specflow import CachedPredictor, limits_of
from specflow.protocols import Limits
from specflow.testing import model_conformance
from tests.toys import tiny_llama


@pytest.mark.parametrize("static", [False, True])
def test_a_compiled_model_is_fed_like_the_model_in_it(static: bool) -> None:
    model = tiny_llama(dtype=torch.float32)
    compiled = torch.compile(model, backend="eager", dynamic=True)
    assert isinstance(compiled, Module)
    make = (lambda: StaticCache(model.config, max_cache_len=64)) if static else None
    predictor = CachedPredictor(compiled, make)
    report = model_conformance(compiled, predictor=predictor, steps=15, longest=64)
    assert report.holds, report
    assert predictor.feeding is not None
    assert predictor.feeding.name == "any pieces"
    assert limits_of(compiled) == limits_of(model) == Limits(64, 128)


@pytest.mark.skipif(not find_spec("peft"), reason="peft is not installed")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize(("tuned", "feeding"), [("lora", "any pieces"), ("prompt", "the whole text afresh")])
def test_an_adapted_model_is_tried(tuned: str, feeding: str) -> None:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model  # noqa: PLC0415 - it may not be installed

    configs: dict[str, LoraConfig | PromptTuningConfig] = {
        "lora": LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False),
        "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    model = get_peft_model(tiny_llama(dtype=torch.float32), configs[tuned])
    model.eval()
    predictor = CachedPredictor(model)
    report = model_conformance(model, predictor=predictor)
    assert report.holds, report
    assert predictor.feeding is not None
    assert predictor.feeding.name == feeding
    plain = CachedPredictor(tiny_llama(dtype=torch.float32))
    assert not torch.allclose(predictor((5, 9, 7), ()), plain((5, 9, 7), ()), atol=1e-2)


def test_a_model_that_is_spread_over_devices_conforms(tmp_path: Path) -> None:
    tiny_llama(dtype=torch.float32).save_pretrained(tmp_path / "model")
    places = {"model.layers.1": "disk"} | dict.fromkeys(
        ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # accelerate's remarks about what it puts on the disk
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=tmp_path / "rest"
        )
    model.eval()
    report = model_conformance(model, steps=30)
    assert report.holds, report
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu", "meta"}
