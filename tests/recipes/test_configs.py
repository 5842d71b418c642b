"""The recipes' configurations: the parser takes every one of them, and real models have what they name.

The models are made on the meta device, with the shapes of the real ones and without weights.
"""

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_configs import SAE_LAYERS, SHAPES
from paths import RECIPES, ROOT
from peft import PeftModel

from sails_align.core.errors import InputError
from sails_align.initializers.targets import SIDES, target_modules_for
from sails_align.smollm2 import HUB_ID
from sails_align.subspace.basis import Subspace
from sails_align.subspace.options import PRESETS
from sails_align.training import run as align
from sails_align.training.defaults import OWN_RATES, RATES
from sails_align.training.plan import TrainingPlan
from sails_align.training.shapes import meta_model

FOLDER = RECIPES / "configs"
FILES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.glob("*/[sd][fp][to]_*.yaml"))
OWN = {"testbed": "testbed", "smollm2-135m": HUB_ID}
"""Models that come with the package, and what they are known as."""
METHODS = ("sft_sails", "sft_lora", "sft_full", "dpo_sails", "dpo_lora", "dpo_full")
PARAMETERS = {
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "llama-3.1-8b": 8_030_261_248,
    "gemma-3-4b": 4_300_079_472,
}
"""As the hub's pages of the models say."""
NOT_TRAINED = {"gemma-3-4b": 416_866_032 + 1152 * 2560 + 1152}
"""Of them: the vision tower's, and those of its projector (a matrix and a norm)."""
SHARES = {"gemma-2-2b": "0.24%", "gemma-2-9b": "0.19%", "llama-3.1-8b": "0.17%", "gemma-3-4b": "0.21%"}
"""Of the parameters, trained: of the first two those of the paper."""
SAE_IDS = {"llama-3.1-8b": "l{}r_8x", "gemma-3-4b": "layer_{}_width_16k_l0_medium"}


def values_of(file: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / file).read_text())


def parsed(file: str, *more: str) -> TrainingPlan:
    method = Path(file).name.partition("_")[0]
    return align.parse(method, ["--config", str(FOLDER / file), *more])  # pyright: ignore[reportArgumentType]


def test_there_is_one_for_each_row_of_the_comparison() -> None:
    assert set(FILES) == {f"{model}/{method}.yaml" for model in (*OWN, *SHAPES) for method in METHODS}


@pytest.mark.parametrize("file", FILES)
def test_every_value_is_used_as_it_is_written(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    args = parsed(file)
    parts = [args.sails, args.data, args.script, args.training, args.model, args.dpo, *args.extras]
    for name, value in values_of(file).items():
        given = [getattr(part, name) for part in parts if hasattr(part, name)]
        assert value in given, f"{name}: {value!r} became {given}"
        assert not isinstance(value, str) or not value.replace("e-", "").replace(".", "").isdecimal(), "a number"
        if name.endswith("_path") and name != "model_name_or_path":
            assert Path(value).exists()


def test_a_wrong_value_is_found(tmp_path: Path) -> None:
    text = (FOLDER / "gemma-2-2b" / "sft_sails.yaml").read_text()
    for change in ("max_lenght: 5", "learning_rate: fast", "preset: paperr"):
        (tmp_path / "sft_x.yaml").write_text(text + change)
        with pytest.raises(InputError, match=change.partition(":")[0]):
            align.parse("sft", ["--config", str(tmp_path / "sft_x.yaml")])


@pytest.mark.parametrize("file", FILES)
def test_it_is_the_method_its_name_says(file: str) -> None:
    method, start = Path(file).stem.split("_")
    args = parsed(file)
    assert args.start == {"sails": "sails", "lora": "default", "full": "full"}[start]
    assert args.method == method
    assert args.model.use_peft == (start != "full")
    model = Path(file).parent.name
    rates = OWN_RATES[OWN[model]] if model in OWN else RATES
    assert args.training.learning_rate == rates[args.method]["new" if args.model.use_peft else "full"]
    assert args.dpo.ref_model_name_or_path is None
    if model not in OWN:
        assert args.model.dtype == ("float32" if start == "full" else "bfloat16")
        n_pairs = args.training.per_device_train_batch_size * args.training.gradient_accumulation_steps * 8
        assert n_pairs == 64


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_methods_differ_in_what_they_are_and_nothing_else(model: str, method: str) -> None:
    sails, lora, full = (values_of(f"{model}/{method}_{start}.yaml") for start in ("sails", "lora", "full"))
    own = {"init", "preset", "sae_release", "sae_ids"}
    assert {name: value for name, value in sails.items() if name not in own} == {
        name: value for name, value in lora.items() if name != "init"
    }
    changed = {name for name in lora.keys() | full.keys() if lora.get(name) != full.get(name)}
    adapter = {"init", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"}
    assert changed == {"use_peft", "dtype", "learning_rate", "save_steps", *adapter}


# What the real models have


@cache
def registry() -> dict[str, Any]:
    """sae-lens' list of public SAEs."""
    spec = importlib.util.find_spec("sae_lens")
    assert spec is not None
    assert spec.origin is not None
    text = (Path(spec.origin).parent / "pretrained_saes.yaml").read_text()
    return yaml.load(text, Loader=yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader)


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("model", SHAPES)
def test_saes_are_the_papers_and_exist(model: str, method: str) -> None:
    args = parsed(f"{model}/{method}_sails.yaml")
    release = registry()[str(args.sails.sae_release)]
    entries = {entry["id"]: entry for entry in release["saes"]}
    assert args.model.model_name_or_path is not None
    own = args.model.model_name_or_path.rpartition("/")[2]
    assert release["model"].rpartition("/")[2] == own
    assert own.removesuffix("-pt").lower() == model
    assert args.sails.sae_ids is not None
    for layer, sae_id in zip(SAE_LAYERS[model], args.sails.sae_ids, strict=True):
        assert sae_id == SAE_IDS.get(model, "layer_{}/width_16k/canonical").format(layer)
        assert f"/{layer}-" in entries[sae_id]["neuronpedia"]
    paper = PRESETS["paper"]
    assert {name: getattr(args.sails, name) for name in paper} == paper
    assert args.sails.tau == 0.8


@cache
def counted(model: str, method: str) -> tuple[int, int, set[str]]:
    """Parameters, trained ones, and the paths within a block of the modules that have an adapter."""
    built = meta_model(parsed(f"{model}/{method}.yaml"), SHAPES[model])
    assert all(p.device.type == "meta" for p in built.parameters())
    base = built.get_base_model() if isinstance(built, PeftModel) else built
    adapted = {name for name, module in base.named_modules() if hasattr(module, "lora_A")}
    trained = [p.numel() for p in built.parameters() if p.requires_grad]
    return sum(p.numel() for p in built.parameters()), sum(trained), adapted


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", SHAPES)
def test_what_is_trained_of_the_real_model(model: str, method: str) -> None:
    total, trained, adapted = counted(model, method)
    if method.endswith("full"):
        assert total == PARAMETERS[model]
        assert trained == total - NOT_TRAINED.get(model, 0)
        assert not adapted
        return
    assert total - trained == PARAMETERS[model]
    assert f"{trained / PARAMETERS[model]:.2%}" == SHARES[model]
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    layers = range(SHAPES[model].get_text_config().num_hidden_layers)
    decoder = "model.language_model" if model == "gemma-3-4b" else "model"
    assert adapted == {f"{decoder}.layers.{layer}.self_attn.{name}" for layer in layers for name in names}


def test_another_rank_would_not_be_the_papers() -> None:
    args = parsed("gemma-2-2b/sft_sails.yaml", "--lora_r", "8")
    trained = sum(p.numel() for p in meta_model(args, SHAPES["gemma-2-2b"]).parameters() if p.requires_grad)
    assert f"{trained / PARAMETERS['gemma-2-2b']:.2%}" == "0.12%"


@pytest.mark.parametrize("model", SHAPES)
def test_the_subspace_reaches_every_adapter(model: str) -> None:
    """With SAEs at the paper's layers, and their directions in the model's own width."""
    args, config = parsed(f"{model}/sft_sails.yaml"), SHAPES[model]
    basis_DR = torch.eye(config.get_text_config().hidden_size, args.model.lora_r)
    ranks = {layer: torch.ones(args.model.lora_r) for layer in SAE_LAYERS[model]}
    subspace = Subspace(dict.fromkeys(ranks, basis_DR), ranks, provenance={})
    skeleton = meta_model(parsed(f"{model}/sft_full.yaml"), config)
    names = args.model.lora_target_modules
    assert isinstance(names, list)
    assert target_modules_for(skeleton, names, subspace, "nearest") == names
    some = target_modules_for(skeleton, names, subspace, "sae_only")
    assert len(some) == len(names) * len(SAE_LAYERS[model])
    assert {f"self_attn.{name}" for name in names} <= SIDES.keys()
