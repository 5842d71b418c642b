"""A truncated model has the whole one's hidden states, without the blocks and the head that are not needed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
)

from sails_align.core.errors import InputError
from sails_align.models.hooks import decoder_layers, hidden_states_at
from sails_align.models.load import check_whole, exact_attention, load_truncated

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
VISION = SiglipVisionConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
CONFIGS = {
    "gemma2": Gemma2Config(**SHAPE, query_pre_attn_scalar=16),
    "llama": LlamaConfig(**SHAPE),
    "gemma3_multimodal": Gemma3Config(
        text_config=Gemma3TextConfig(**SHAPE, query_pre_attn_scalar=16),
        vision_config=VISION,
        image_token_index=60,
        boi_token_index=61,
        eoi_token_index=62,
    ),
}


def saved(config: PreTrainedConfig, folder: Path) -> torch.nn.Module:
    torch.manual_seed(1)
    auto = AutoModelForImageTextToText if isinstance(config, Gemma3Config) else AutoModelForCausalLM
    whole = auto.from_config(config, attn_implementation=exact_attention(config)).eval()
    whole.save_pretrained(folder)
    return whole


@pytest.mark.parametrize("name", CONFIGS)
def test_has_the_same_hidden_states(name: str, tmp_path: Path) -> None:
    whole = saved(CONFIGS[name], tmp_path)
    truncated = load_truncated(tmp_path, 1)
    assert len(decoder_layers(truncated)) == 2
    assert not [module for module, _ in truncated.named_modules() if "lm_head" in module or "vision" in module]
    ids_BS = torch.randint(1, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    expected, mine = (hidden_states_at(m, [0, 1], ids_BS, torch.ones_like(ids_BS)) for m in (whole, truncated))
    assert torch.equal(mine[0], expected[0])
    assert torch.equal(mine[1], expected[1])
    assert CONFIGS[name].get_text_config(decoder=True).num_hidden_layers == 4


def test_caps_its_attention_logits(tmp_path: Path) -> None:
    """What transformers' default for Gemma 2 leaves out. It matters where logits reach the cap: here it is small."""
    config = Gemma2Config(**SHAPE, query_pre_attn_scalar=16, attn_logit_softcapping=0.01, initializer_range=0.3)
    whole = saved(config, tmp_path)
    ids_BS = torch.randint(1, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    mine = hidden_states_at(load_truncated(tmp_path, 1), [1], ids_BS, torch.ones_like(ids_BS))[1]
    assert torch.equal(mine, hidden_states_at(whole, [1], ids_BS, torch.ones_like(ids_BS))[1])
    for block in whole.model.layers:  # the control
        block.self_attn.attn_logit_softcapping = None
    assert not torch.allclose(mine, hidden_states_at(whole, [1], ids_BS, torch.ones_like(ids_BS))[1], atol=0.1)


def test_in_another_precision(tmp_path: Path) -> None:
    saved(CONFIGS["gemma2"], tmp_path)
    assert load_truncated(tmp_path, 0).dtype == torch.float32
    assert load_truncated(tmp_path, 0, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(CONFIGS["llama"], tmp_path)
    with pytest.raises(InputError, match="nowhere"):
        load_truncated(tmp_path / "nowhere", 1)
    with pytest.raises(InputError, match="layer 4 is out of range; choose 0 to 3"):
        load_truncated(tmp_path, 4)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights.*layers\.1\.mlp\.up_proj"):
        load_truncated(tmp_path, 1)
    assert len(decoder_layers(load_truncated(tmp_path, 0))) == 1  # that block is not needed
    assert "UNEXPECTED" not in capsys.readouterr().err


def test_a_quantization_whose_library_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AutoModelForCausalLM.from_config(CONFIGS["llama"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("transformers.quantizers.quantizer_gptq.is_optimum_available", lambda: False)
    with pytest.raises(InputError, match=r"cannot load the model .*pip install optimum"):
        check_whole(str(tmp_path))
