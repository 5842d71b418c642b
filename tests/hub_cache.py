"""The hub's cache, made by hand: repositories of models and SAEs with the files, names and formats of the real ones.

Models are narrow and have random weights, and as many blocks as the real ones, so that the recipes' SAE layers exist.
"""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from hub_configs import CONFIGS, parse
from paths import RECIPES
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel

COMMIT = "0" * 40
D_MODEL, D_SAE = 96, 128
GEMMA_SCOPE_WIDTH = 16384
SHARD = "200KB"
"""So small that narrow weights, too, are in several files with an index."""
_NARROW = {
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 600,
}
_TOKENS = {  # a family's special tokens, by what they are
    "gemma": {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"},
    "llama": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
}


def add_to_cache(cache: Path, repo_id: str, name: str) -> Path:
    """Where a file of a repository lies in the hub's cache, with the folders and the ref that lead there."""
    repo = cache / ("models--" + repo_id.replace("/", "--"))
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / "main").write_text(COMMIT)
    file = repo / "snapshots" / COMMIT / name
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


# Models


def add_model(cache: Path, repo_id: str, config: dict[str, Any]) -> PreTrainedModel:
    """A base model: config.json with the real keys, weights in shards, a tokenizer without a chat template.

    Args:
        cache: the hub's cache.
        repo_id: such as google/gemma-2-2b.
        config: what is in config.json; see `narrow`.
    """
    folder = add_to_cache(cache, repo_id, "config.json").parent
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(parse(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # as trained ones: blocks that do something, gains that differ
            if "norm" in name:
                torch.nn.init.normal_(parameter, mean=1.0 if config["model_type"] == "llama" else 0.0, std=0.2)
            else:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder, max_shard_size=SHARD)
    assert (folder / "model.safetensors.index.json").is_file()
    (folder / "config.json").write_text(json.dumps(config))
    family = config["model_type"][:5].rstrip("23_")
    tokenizer = gemma_tokenizer() if family == "gemma" else llama_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config(config, family)))
    if "vision_config" in config:
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Gemma3ImageProcessor"}))
        (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Gemma3Processor"}))
    return model


def narrow(config: dict[str, Any], d_model: int = D_MODEL) -> dict[str, Any]:
    """A model's configuration with small numbers in place of its widths."""
    small = _NARROW | {"hidden_size": d_model}
    if "text_config" not in config:
        tokens = {"bos_token_id": 0, "eos_token_id": 1} if config["model_type"] == "llama" else {}
        optional = {
            name: value for name, value in small.items() if name != "head_dim" or config["model_type"] != "llama"
        }
        return config | optional | tokens
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    size = {"image_size": 28, "patch_size": 14}  # 4 patches
    tokens = {"boi_token_index": 590, "eoi_token_index": 591, "image_token_index": 592, "mm_tokens_per_image": 4}
    text = config["text_config"] | small
    return config | tokens | {"text_config": text, "vision_config": config["vision_config"] | vision | size}


def _tokenizer_config(config: dict[str, Any], family: str) -> dict[str, Any]:
    if family == "llama":
        return {**_TOKENS[family], "clean_up_tokenization_spaces": True, "tokenizer_class": "PreTrainedTokenizerFast"}
    options = {"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "GemmaTokenizer"}
    return {
        **_TOKENS[family],
        **options,
        **({"processor_class": "Gemma3Processor"} if "vision_config" in config else {}),
    }


_TEXT = (
    "\n\nHuman: How do I pick a lock?\n\nAssistant: I am sorry, but I cannot help you with that."
    "\n\nHuman: What should I cook tonight?\n\nAssistant: You could try a soup with beans and bread."
)
_WORDS = re.findall(r"\n\n\w+:| ?\w+|\W", _TEXT)
"""One by one, so that no token is of two of them."""


def gemma_tokenizer() -> Tokenizer:
    """Gemma's kind: BPE over text with ▁ for spaces, bytes for what is unknown, and BOS in front."""
    special = list(_TOKENS["gemma"].values())
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_previous")  # pyright: ignore[reportAttributeAccessIssue]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=580, special_tokens=[*special, *of_bytes], show_progress=False)  # pyright: ignore[reportCallIssue]
    tokenizer.train_from_iterator(_WORDS, trainer)
    # Bytes are ordinary words of the vocabulary, and no special tokens.
    tokenizer = _with_special_tokens_alone(tokenizer, special)
    return _with_bos(tokenizer, "<bos>")


def llama_tokenizer() -> Tokenizer:
    """Llama 3's kind: byte-level BPE, with BOS in front."""
    special = list(_TOKENS["llama"].values())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=580,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # pyright: ignore[reportCallIssue]
    tokenizer.train_from_iterator(_WORDS, trainer)
    return _with_bos(tokenizer, "<|begin_of_text|>")


def _with_special_tokens_alone(tokenizer: Tokenizer, special: list[str]) -> Tokenizer:
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] in special]
    return Tokenizer.from_str(json.dumps(values))


def _with_bos(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


# SAEs


def sae_tensors(
    d_model: int = D_MODEL, d_sae: int = D_SAE, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A JumpReLU SAE with random directions, by Gemma Scope's names."""
    generator = torch.Generator().manual_seed(seed + 1000)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    decoder = sae_decoder(d_model, d_sae, seed)
    tensors = {
        "W_enc": decoder.T.contiguous() + 0.1 * random(d_model, d_sae) / d_model**0.5,
        "W_dec": decoder,
        "b_enc": random(d_sae) * 0.1,
        "b_dec": random(d_model),
        "threshold": random(d_sae).abs(),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def sae_decoder(d_model: int, d_sae: int, seed: int) -> torch.Tensor:
    """`W_dec` alone of `sae_tensors`, in float32."""
    directions_FD = torch.randn(d_sae, d_model, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(directions_FD, dim=1)


def write_npz(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Gemma Scope's `params.npz`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})  # pyright: ignore[reportArgumentType]


def add_gemma_scope(cache: Path, repo_id: str, folder: str, tensors: dict[str, torch.Tensor]) -> Path:
    """An SAE of google/gemma-scope-*; the folder is such as layer_12/width_16k/average_l0_82."""
    file = add_to_cache(cache, repo_id, f"{folder}/params.npz")
    write_npz(file, tensors)
    return file


def add_gemma_scope_2(cache: Path, repo_id: str, folder: str, tensors: dict[str, torch.Tensor]) -> Path:
    """An SAE of google/gemma-scope-2-*; the folder is such as resid_post/layer_12_width_16k_l0_medium."""
    layer = int(folder.partition("layer_")[2].partition("_")[0])
    config = {
        "architecture": "jump_relu",
        "hf_hook_point_in": f"model.layers.{layer}.output",
        "hf_hook_point_out": f"model.layers.{layer}.output",
        "model_name": repo_id.partition("/")[2].replace("gemma-scope-2", "gemma-v3"),
        "type": "sae",
        "width": len(tensors["W_dec"]),
    }
    add_to_cache(cache, repo_id, f"{folder}/config.json").write_text(json.dumps(config))
    file = add_to_cache(cache, repo_id, f"{folder}/params.safetensors")
    save_file({name.lower(): tensor for name, tensor in tensors.items()}, file)
    return file


def add_llama_scope(
    cache: Path, repo_id: str, folder: str, tensors: dict[str, torch.Tensor], *, scaling: float, threshold: float = 0.3
) -> None:
    """An SAE of fnlp/Llama3_1-8B-Base-LX*; the folder is such as Llama3_1-8B-Base-L10R-8x.

    Args:
        cache: the hub's cache.
        repo_id: of the repository.
        folder: within it.
        tensors: by Gemma Scope's names; the threshold there is not used.
        scaling: what inputs are multiplied by, as sae-lens' registry has it for this SAE.
        threshold: of all latents alike.
    """
    d_sae, d_model = tensors["W_dec"].shape
    layer = int(folder.rpartition("-L")[2].partition("R")[0])
    hyperparameters = {
        "act_fn": "jumprelu",
        "d_model": d_model,
        "d_sae": d_sae,
        "dataset_average_activation_norm": {"in": d_model**0.5 / scaling, "out": d_model**0.5 / scaling},
        "expansion_factor": d_sae // d_model,
        "hook_point_in": f"blocks.{layer}.hook_resid_post",
        "hook_point_out": f"blocks.{layer}.hook_resid_post",
        "jump_relu_threshold": threshold,
        "norm_activation": "dataset-wise",
    }
    add_to_cache(cache, repo_id, f"{folder}/hyperparams.json").write_text(json.dumps(hyperparameters))
    weights = {"encoder.weight": tensors["W_enc"].T.contiguous(), "decoder.weight": tensors["W_dec"].T.contiguous()}
    weights |= {"encoder.bias": tensors["b_enc"], "decoder.bias": tensors["b_dec"]}
    save_file(weights, add_to_cache(cache, repo_id, f"{folder}/checkpoints/final.safetensors"))


# The recipes' models with their SAEs, and data


def add_recipe(cache: Path, name: str) -> None:
    """All that the recipes of a model take from the hub.

    sae-lens takes the shapes of Gemma Scope's SAEs from their names, so these and Gemma 2's d_model are real.

    Args:
        cache: the hub's cache.
        name: of a folder of recipes.
    """
    from sae_lens.loading.pretrained_saes_directory import get_norm_scaling_factor, get_pretrained_saes_directory

    recipe = yaml.safe_load((RECIPES / "configs" / name / "sft_sails.yaml").read_text())
    d_model, d_sae = widths(name)
    add_model(cache, recipe["model_name_or_path"], narrow(CONFIGS[name], d_model))
    release = get_pretrained_saes_directory()[recipe["sae_release"]]
    for seed, sae_id in enumerate(recipe["sae_ids"]):
        place, tensors = (cache, release.repo_id, release.saes_map[sae_id]), sae_tensors(d_model, d_sae, seed=seed)
        if "llama" in name:
            scaling = get_norm_scaling_factor(recipe["sae_release"], sae_id)
            assert scaling is not None
            add_llama_scope(*place, tensors, scaling=scaling)
        elif "gemma-3" in name:
            add_gemma_scope_2(*place, tensors)
        else:
            add_gemma_scope(*place, {name: tensor.half() for name, tensor in tensors.items()})  # half the disk


def widths(name: str) -> tuple[int, int]:
    """d_model and d_sae of a recipe's model and SAEs in the cache."""
    return (CONFIGS[name]["hidden_size"], GEMMA_SCOPE_WIDTH) if "gemma-2" in name else (D_MODEL, D_SAE)


def write_hh_rlhf(folder: Path, sample: Path, n: int = 40, longest: int = 600) -> None:
    """HH-RLHF as `hf download --local-dir` puts it, from real rows.

    Args:
        folder: of the data set.
        sample: rows of harmless-base; some of them stand in for those of helpful-base.
        n: rows of a training split; a test split has a quarter.
        longest: characters of a row's responses, at most, which keeps it quick.
    """
    with gzip.open(sample, "rt", encoding="utf-8") as file:
        lines = [line for line in file if len(max(json.loads(line).values(), key=len)) <= longest]
    start = 0
    for part in ("harmless-base", "helpful-base"):
        for split, size in (("train", n), ("test", n // 4)):
            path = folder / part / f"{split}.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(path, "wt", encoding="utf-8") as file:
                file.writelines(lines[start : start + size])
            start += size
    assert start <= len(lines), "no row is there twice"
