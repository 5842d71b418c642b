"""Tiny configurations of the model families that are supported."""

from typing import Any

from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

N_LAYERS = 3
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
VISION = SiglipVisionConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
TEXT_CONFIGS = {
    "gemma2": Gemma2Config(**SHAPE, query_pre_attn_scalar=16),
    "gemma3": Gemma3TextConfig(**SHAPE, query_pre_attn_scalar=16),
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE),
    "qwen2": Qwen2Config(**{name: value for name, value in SHAPE.items() if name != "head_dim"}),
    "qwen3": Qwen3Config(**SHAPE),
}
GEMMA3_MULTIMODAL = Gemma3Config(
    text_config=TEXT_CONFIGS["gemma3"],
    vision_config=VISION,
    image_token_index=60,
    boi_token_index=61,
    eoi_token_index=62,
)
