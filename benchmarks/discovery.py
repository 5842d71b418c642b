"""What feature discovery costs: beside the bare forward pass it needs, and beside SAELens / TransformerLens caching.

    python benchmarks/discovery.py                                        # random-weight Gemma-2, 100M parameters
    python benchmarks/discovery.py --model_name_or_path M --sae_path S    # a Gemma-2 model and its SAEs

All ways work on the same weights, SAEs and batches, in turns within one process; a ratio is the median of the ratios
within the turns. The ways:

    forward   the model up to the deepest SAE's block, no hooks, nothing kept
    ours      `discover`: that forward, SAE encoding of the averaged tokens, sums
    cached    SAELens' usage guide: `run_with_cache`, `sae.encode(cache[hook])`, then the mean over the averaged tokens
    cached, trimmed   the same with `stop_at_layer` and `names_filter`: only what is needed is run and kept

Peak memory is read from processes of their own that stream n and 4n examples through a small model with wide SAEs.
"""

import argparse
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sae_lens import HookedSAETransformer, JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, Gemma2Model

from sails_align.core.artifacts import package_versions
from sails_align.core.errors import InputError, exit_on_input_error
from sails_align.core.files import write_json
from sails_align.data.tokens import TokenizedSide, padded
from sails_align.models.hooks import hidden_states_at
from sails_align.saes.load import ResidualSAE, residual_sae
from sails_align.saes.sets import SAESet
from sails_align.saes.source import SAESource
from sails_align.subspace.forward import batches, discover
from sails_align.subspace.selection import FeatureFitter
from sails_align.subspace.statistics import SIDES

# Gemma-2-2B's proportions at d_model 640: an MLP of 4 d_model, SAEs of 7 d_model, one every five blocks.
HUNDRED_M: dict[str, Any] = {
    "hidden_size": 640,
    "intermediate_size": 2560,
    "num_hidden_layers": 13,
    "vocab_size": 32_000,
}
HUNDRED_M |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 80, "query_pre_attn_scalar": 80}
SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 1000}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32}
L0 = 60  # active latents a token in the random SAEs, as in Gemma Scope's canonical ones
BATCH: dict[str, Any] = {"batch_size": 16, "max_tokens_per_batch": 4096}


@dataclass(frozen=True)
class Setting:
    """What all ways have in common."""

    whole: Gemma2ForCausalLM
    truncated: Gemma2Model
    """Shares the weights of the whole model."""
    saes: Mapping[int, ResidualSAE]
    sides: dict[str, list[TokenizedSide]]

    @property
    def layers(self) -> list[int]:
        return list(self.saes)

    def batches(self) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
        for side in SIDES:
            for batch in batches(self.sides[side], **BATCH):
                yield side, padded(batch)


def random_model(shape: dict[str, Any]) -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**shape)).eval()
    model.set_attn_implementation("eager")  # the default leaves out Gemma 2's soft-capping
    return model


def random_sides(n: int, vocab_size: int, seed: int = 0) -> dict[str, Iterator[TokenizedSide]]:
    """n examples of either side, made as they are read: some 50 prompt tokens, then some 50 that are averaged."""

    def side(rng: random.Random) -> Iterator[TokenizedSide]:
        for _ in range(n):
            n_prompt, n_response = rng.randint(20, 80), rng.randint(20, 80)
            ids = [rng.randrange(3, vocab_size) for _ in range(n_prompt + n_response)]
            yield TokenizedSide(ids, [False] * n_prompt + [True] * n_response)

    return {name: side(random.Random(f"{seed} {name}")) for name in SIDES}


def random_saes(model: Gemma2ForCausalLM, layers: list[int], d_sae: int) -> dict[int, ResidualSAE]:
    """JumpReLU SAEs (Gemma Scope's kind) with random weights, and thresholds that leave L0 latents active."""
    d_model = model.config.hidden_size
    ids_BS = torch.randint(3, model.config.vocab_size, (4, 32))
    hidden_states = hidden_states_at(model, layers, ids_BS, torch.ones_like(ids_BS))
    saes = {}
    for layer in layers:
        metadata = SAEMetadata(hook_name=f"blocks.{layer}.hook_resid_post", model_name="random")
        sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_model, d_sae=d_sae, metadata=metadata))
        torch.nn.init.normal_(sae.W_enc, std=d_model**-0.5)
        torch.nn.init.normal_(sae.W_dec, std=d_model**-0.5)
        pre_TF = hidden_states[layer].flatten(0, 1) @ sae.W_enc
        sae.threshold.data.fill_(pre_TF.sort(dim=1, descending=True).values[:, L0].mean().item())
        saes[layer] = residual_sae("random", sae)
    return saes


def truncate(whole: Gemma2ForCausalLM, deepest_layer: int) -> Gemma2Model:
    """The decoder up to a block, with the whole model's weights."""
    shape = whole.config.to_dict()
    shape |= {"num_hidden_layers": deepest_layer + 1, "layer_types": shape["layer_types"][: deepest_layer + 1]}
    config = Gemma2Config(**shape)
    with torch.device("meta"):
        truncated = Gemma2Model(config)
    truncated.set_attn_implementation("eager")
    truncated.embed_tokens, truncated.norm = whole.model.embed_tokens, whole.model.norm
    truncated.rotary_emb = whole.model.rotary_emb
    truncated.layers = whole.model.layers[: deepest_layer + 1]
    return truncated.eval()


def hooked(whole: Gemma2ForCausalLM) -> HookedSAETransformer:
    """The same weights in TransformerLens, unprocessed."""
    config: Any = whole.config
    lens_config = HookedTransformerConfig(
        d_model=config.hidden_size,
        d_head=config.head_dim,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        n_layers=config.num_hidden_layers,
        n_ctx=512,
        eps=config.rms_norm_eps,
        d_vocab=config.vocab_size,
        act_fn=config.hidden_activation,
        normalization_type="RMS",
        rotary_base=config.rope_parameters["rope_theta"],
        positional_embedding_type="rotary",
        use_attn_scale=True,
        attn_scale=config.query_pre_attn_scalar**0.5,
        window_size=config.sliding_window,
        use_local_attn=True,
        attn_types=["local" if kind == "sliding_attention" else "global" for kind in config.layer_types],
        attn_scores_soft_cap=config.attn_logit_softcapping,
        output_logits_soft_cap=config.final_logit_softcapping,
        gated_mlp=True,
        final_rms=True,
        use_normalization_before_and_after=True,
        device="cpu",
    )
    model = HookedSAETransformer(lens_config)
    model.load_and_process_state_dict(
        convert_gemma_weights(whole, lens_config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()


@torch.no_grad()
def run_forward(setting: Setting) -> None:
    for _, (input_ids_BS, attention_mask_BS, _) in setting.batches():
        setting.truncated(input_ids=input_ids_BS, attention_mask=attention_mask_BS, use_cache=False)


def run_ours(setting: Setting) -> dict[int, Tensor]:
    """Mean difference of every latent, by layer. (F,)"""
    fitter = FeatureFitter(setting.saes)
    discover(setting.truncated, {"response": setting.sides}, [fitter], setting.layers, **BATCH)
    stats = fitter.result()
    pairs = {layer: stats.pair("response", layer) for layer in setting.layers}
    return {layer: aligned.mean - unaligned.mean for layer, (aligned, unaligned) in pairs.items()}


@torch.no_grad()
def run_cached(setting: Setting, lens: HookedSAETransformer, **options: Any) -> dict[int, Tensor]:
    """Mean difference of every latent, by layer, with the activations out of TransformerLens' cache. (F,)"""
    sums = {(layer, side): torch.zeros(sae.info.d_sae) for layer, sae in setting.saes.items() for side in SIDES}
    n_tokens: dict[str, int] = dict.fromkeys(SIDES, 0)
    for side, (input_ids_BS, _, mask_BS) in setting.batches():
        _, cache = lens.run_with_cache(input_ids_BS, **options)
        n_tokens[side] += int(mask_BS.sum())
        for layer, sae in setting.saes.items():
            acts_BSF = sae.sae.encode(cache[sae.info.hook_name])
            sums[layer, side] += acts_BSF[mask_BS].sum(0)
    means = {(layer, side): (sums_F / n_tokens[side]).double() for (layer, side), sums_F in sums.items()}
    return {layer: means[layer, "aligned"] - means[layer, "unaligned"] for layer in setting.layers}


def measure(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way in each of `repeats` turns, beginning with another way in each."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats):
        order = list(ways)[turn % len(ways) :] + list(ways)[: turn % len(ways)]
        for name in order:
            start = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def stream(n: int) -> None:
    """Print the peak memory of this process, in MiB, after n examples a side: what the memory measurement runs."""
    model = random_model(SMALL)
    fitter = FeatureFitter(random_saes(model, [0, 1], d_sae=8192))
    discover(model, {"response": random_sides(n, SMALL["vocab_size"])}, [fitter], [0, 1], **BATCH)
    # Not getrusage's ru_maxrss: a child begins with its parent's.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].removesuffix("kB")) / 2**10)


def peak_memory(n: int) -> dict[int, float]:
    """Peak memory in MiB of processes that stream n and 4n examples a side."""
    peaks = {}
    for examples in (n, 4 * n):
        command = [sys.executable, __file__, "--stream", str(examples)]
        peaks[examples] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return peaks


def setting_of(args: argparse.Namespace) -> Setting:
    if args.model_name_or_path is None:
        whole = random_model(HUNDRED_M)
        saes = random_saes(whole, args.layers, args.d_sae)
    else:
        if args.sae_path is None:
            raise InputError("--model_name_or_path needs --sae_path: the folder of the model's SAEs")
        whole = AutoModelForCausalLM.from_pretrained(
            args.model_name_or_path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        if not isinstance(whole, Gemma2ForCausalLM):
            raise InputError(f"{args.model_name_or_path} is a {type(whole).__name__}: only Gemma-2 models are compared")
        saes = SAESet.load(SAESource(path=args.sae_path), model_config=whole.config, model_name=args.model_name_or_path)
    sides = {side: list(made) for side, made in random_sides(args.examples, whole.config.vocab_size).items()}
    return Setting(whole, truncate(whole, max(saes)), saes, sides)


def describe(setting: Setting) -> dict[str, Any]:
    """What was measured, for the record."""
    config = setting.whole.config
    sequences = [sequence for side in setting.sides.values() for sequence in side]
    return {
        "parameters": sum(p.numel() for p in setting.whole.parameters()),
        "d_model": config.hidden_size,
        "blocks": config.num_hidden_layers,
        "sae_layers": setting.layers,
        "d_sae": [sae.info.d_sae for sae in setting.saes.values()],
        "sae_architecture": next(iter(setting.saes.values())).info.architecture,
        "sequences": len(sequences),
        "tokens": sum(len(sequence.input_ids) for sequence in sequences),
        "averaged_tokens": sum(sum(sequence.mask) for sequence in sequences),
        "precision": "float32",
        **BATCH,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": package_versions(),
    }


def compare(setting: Setting, repeats: int) -> dict[str, Any]:
    lens = hooked(setting.whole)
    trimmed = {
        "stop_at_layer": max(setting.layers) + 1,
        "names_filter": [sae.info.hook_name for sae in setting.saes.values()],
    }
    ways: dict[str, Callable[[], Any]] = {
        "forward": lambda: run_forward(setting),
        "ours": lambda: run_ours(setting),
        "cached": lambda: run_cached(setting, lens),
        "cached, trimmed": lambda: run_cached(setting, lens, **trimmed),
    }
    mine, theirs = ways["ours"](), ways["cached, trimmed"]()  # also warms up
    differ = max(((mine[at] - theirs[at]).norm() / mine[at].norm()).item() for at in setting.layers)
    seconds = measure(ways, repeats)
    return {
        "setting": describe(setting),
        "seconds": seconds,
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "ours_over_forward": ratios_of(seconds["ours"], seconds["forward"]),
        "cached_over_ours": ratios_of(seconds["cached"], seconds["ours"]),
        "trimmed_over_ours": ratios_of(seconds["cached, trimmed"], seconds["ours"]),
        "relative_difference_of_results": differ,
    }


def ratios_of(times: list[float], others: list[float]) -> dict[str, float]:
    """Median and extremes of the ratios within the turns: far extremes mean that other work disturbed the machine."""
    ratios = [time / other for time, other in zip(times, others, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def show(result: dict[str, Any]) -> None:
    console, setting = Console(), result["setting"]
    console.print(
        f"Gemma-2 of {setting['parameters'] / 1e6:.1f}M parameters: {setting['blocks']} blocks, "
        f"d_model {setting['d_model']}\n"
        f"{setting['sae_architecture']} SAEs at layers {setting['sae_layers']}, d_sae {setting['d_sae']}\n"
        f"{setting['sequences']} sequences, {setting['tokens']} tokens, {setting['averaged_tokens']} of them averaged; "
        f"{setting['precision']}, {setting['threads']} threads"
    )
    table = Table("way", "median seconds", "tokens / s", "times ours")
    for name, seconds in result["median_seconds"].items():
        table.add_row(
            name,
            f"{seconds:.2f}",
            f"{setting['tokens'] / seconds:.0f}",
            f"{seconds / result['median_seconds']['ours']:.2f}",
        )
    console.print(table)
    for name, target in (
        ("ours_over_forward", "at most 1.15"),
        ("cached_over_ours", "at least 2"),
        ("trimmed_over_ours", "none"),
    ):
        ratio = result[name]
        console.print(
            f"{name}: {ratio['median']:.3f} (turns: {ratio['min']:.3f} to {ratio['max']:.3f}; target: {target})"
        )
    console.print(f"relative difference of the results: {result['relative_difference_of_results']:.1e}")
    for examples, peak in result["peak_memory_mib"].items():
        console.print(f"peak memory with {examples} examples a side: {peak:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="a Gemma-2 model; default: random weights, about 100M parameters")
    parser.add_argument("--sae_path", help="the model's SAEs")
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 10], help="of the random SAEs")
    parser.add_argument("--d_sae", type=int, default=4608, help="of the random SAEs")
    parser.add_argument("--examples", type=int, default=8, help="sequences a side")
    parser.add_argument("--repeats", type=int, default=5, help="measured turns")
    parser.add_argument("--memory_examples", type=int, default=250, help="n: memory is measured at n and 4n")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--stream", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stream is not None:
        stream(args.stream)
        return
    with exit_on_input_error():
        result = compare(setting_of(args), args.repeats)
        result["peak_memory_mib"] = peak_memory(args.memory_examples)
        show(result)
        if args.output is not None:
            write_json(args.output, result)


if __name__ == "__main__":
    main()
