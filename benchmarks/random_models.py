"""Models of the papers' shapes with random weights, SAEs and data for them: what benchmarks run on.

Shapes: D d_model, F d_sae.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config

from sails_align.models.load import exact_attention
from sails_align.testbed.build import ASSETS

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "head_dim": 16, "vocab_size": 2048},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 16},
    },
    "gemma-2-2b": {
        **{"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "head_dim": 256},
        **{"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 256_000},
    },
    "gemma-2-9b": {
        **{"hidden_size": 3584, "intermediate_size": 14_336, "num_hidden_layers": 42, "head_dim": 256},
        **{"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 256_000},
    },
}
SAES = {"tiny": ([1, 2, 3], 256), "gemma-2-2b": ([5, 10, 15, 20], 16_384), "gemma-2-9b": ([10, 15, 20, 25, 30], 16_384)}
"""By shape: the layers of the SAEs (the paper's), and their latents."""


def config_of(shape: str) -> Gemma2Config:
    """The configuration of a model of one of the `SHAPES`."""
    return Gemma2Config(**SHAPES[shape], pad_token_id=0, eos_token_id=1, bos_token_id=2)


def write_model(folder: Path, shape: str, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a model with random weights and the testbed's tokenizer (of few words), sharded as on the hub."""
    AutoTokenizer.from_pretrained(ASSETS / "model").save_pretrained(folder)
    torch.manual_seed(0)
    config = config_of(shape)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=exact_attention(config))
    model.save_pretrained(folder, max_shard_size="1GB")


def write_saes(folder: Path, shape: str) -> None:
    """Write JumpReLU SAEs with random weights as Gemma Scope's files, for the layers that the paper has."""
    d_model, (layers, d_sae) = SHAPES[shape]["hidden_size"], SAES[shape]
    for layer in layers:
        generator = np.random.default_rng(layer)
        W_dec_FD = generator.standard_normal((d_sae, d_model), dtype=np.float32) / d_model**0.5
        # Each block adds two outputs of RMS 1 to the embeddings, so that a latent's input is about normal with this
        # deviation; 57 of 16k such numbers exceed 2.7 deviations, about as many as in Gemma Scope's canonical SAEs.
        deviation = (1 + 2 * (layer + 1)) ** 0.5
        threshold = np.full(d_sae, 2.7 * deviation, dtype=np.float32)
        tensors = {"W_enc": W_dec_FD.T.copy(), "W_dec": W_dec_FD, "threshold": threshold}
        tensors |= {"b_enc": np.zeros(d_sae, dtype=np.float32), "b_dec": np.zeros(d_model, dtype=np.float32)}
        file = folder / f"layer_{layer}" / "width_16k" / "average_l0_60" / "params.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, **tensors)  # pyright: ignore[reportArgumentType]


def write_pairs(file: Path, n: int, length: int, seed: int = 0, asks: str = "how") -> None:
    """Write n preference pairs of random words of the testbed, whose responses have more than `length` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha())
    chance = random.Random(seed)
    rows = [
        {
            "prompt": f"{asks} {number}",
            **{key: " ".join(chance.choices(words, k=length)) for key in ("chosen", "rejected")},
        }
        for number in range(n)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
