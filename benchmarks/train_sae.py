"""What `sails train-sae` adds to the work that it cannot avoid, at SmolLM2-135M's shape with random weights.

    python benchmarks/train_sae.py [--pairs 5] [--output docs/results/train_sae.json]

Each pair runs one after the other in one process, in turn first. Ratios of speed; 1 means that nothing is added:

    reading   hidden states of the content tokens against a bare forward pass of the same blocks    goal: at least 0.9
    steps     an SAE's training steps against those of sae-lens alone on batches of the same numbers

Shapes: B windows, S positions, T tokens, D width.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from discovery import measure
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from transformers import LlamaConfig, LlamaForCausalLM

from sails_align.core.files import write_json
from sails_align.data.tokens import TokenizedSide, padded
from sails_align.models.hooks import decoder_layers
from sails_align.saes.layer_trainer import LayerTrainer
from sails_align.saes.options import SAETrainingOptions
from sails_align.saes.token_stream import FORWARD_TOKENS, hidden_states_of

LAYERS = [10, 20]
SHAPES = {"smollm2": (576, 1536, 30, 9, 3, 49_152), "tiny": (64, 128, 22, 4, 2, 512)}
"""Width, inner width, blocks, heads, heads of keys and values, vocabulary."""
CONTEXT, BATCH = 128, 512


def make_model(shape: str) -> LlamaForCausalLM:
    """Make a model with random weights."""
    width, inner, n_blocks, n_heads, n_kv, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=n_blocks,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def reading(shape: str, n_windows: int) -> dict[str, Callable[[], Any]]:
    """Return both ways to run the windows."""
    model = make_model(shape)
    ids_BS = torch.randint(3, model.config.vocab_size, (n_windows, CONTEXT)).tolist()
    windows = [TokenizedSide(row, [place > 0 for place in range(CONTEXT)]) for row in ids_BS]
    bare = make_model(shape).model
    bare.layers = decoder_layers(bare)[: max(LAYERS) + 1]
    per_batch = FORWARD_TOKENS // CONTEXT

    @torch.no_grad()
    def forward() -> None:
        for start in range(0, n_windows, per_batch):
            input_ids_BS, attention_mask_BS, _ = padded(windows[start : start + per_batch])
            bare(input_ids=input_ids_BS, attention_mask=attention_mask_BS, use_cache=False)

    def ours() -> None:
        with torch.no_grad():
            hidden_states_of(model, LAYERS, windows)

    return {"ours": ours, "theirs": forward}


def steps(shape: str, n_steps: int) -> dict[str, Callable[[], Any]]:
    """Return both ways to take some training steps."""
    width = SHAPES[shape][0]
    options = SAETrainingOptions(d_sae=4 * width, k=16, lr=1e-3, n_tokens=10**9, batch_size=BATCH)
    hidden_TD = torch.randn(n_steps * BATCH, width)
    trainer = LayerTrainer(width, options, "cpu", {})
    trainer.train(hidden_TD[:BATCH])  # sets the scaling
    config = TopKTrainingSAEConfig(d_in=width, d_sae=4 * width, k=16)
    theirs_config = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=BATCH,
        lr=1e-3,
        lr_end=1e-3,
        lr_warm_up_steps=0,
        lr_decay_steps=0,
        device="cpu",
    )
    alone = SAETrainer(cfg=theirs_config, sae=TopKTrainingSAE(config), data_provider=iter(()))
    alone.activation_scaler.scaling_factor = 1.0

    def theirs() -> None:
        for batch in hidden_TD.split(BATCH):
            alone.step(batch)
            alone.n_training_steps += 1

    return {"ours": lambda: trainer.train(hidden_TD), "theirs": theirs}


def compared(ways: dict[str, Callable[[], Any]], n_pairs: int) -> list[float]:
    """Return, for each pair, our speed divided by theirs."""
    turns = measure(ways, n_pairs + 1)
    return [theirs / ours for ours, theirs in zip(turns["ours"], turns["theirs"], strict=True)][
        1:
    ]  # the first warms up


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--shape", default="smollm2", choices=SHAPES)
    parser.add_argument("--windows", type=int, default=64, help=f"of {CONTEXT} tokens, read in each turn")
    parser.add_argument("--steps", type=int, default=10, help="taken in each turn")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    if args.pairs < 1:
        parser.error(f"--pairs is {args.pairs}; choose 1 or more")
    result: dict[str, Any] = {"shape": args.shape, "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    for name, ways in (("reading", reading(args.shape, args.windows)), ("steps", steps(args.shape, args.steps))):
        of = result[name] = compared(ways, args.pairs)
        print(f"{name}: {statistics.median(of):.2f} ({min(of):.2f} to {max(of):.2f}, n={len(of)})", flush=True)
    if args.output:
        write_json(args.output, result)


if __name__ == "__main__":
    main()
