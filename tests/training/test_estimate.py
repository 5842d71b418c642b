"""The command `sails estimate`: its figures, what it refuses, and the tables of the documentation made with it."""

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hub_configs import SHAPES
from paths import RECIPES, ROOT
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from processes import PATIENCE
from transformers import AutoModelForCausalLM, LlamaConfig

from sails_align.cli.estimate import main
from sails_align.core.errors import InputError
from sails_align.models.parameters import count_parameters
from sails_align.testbed.build import resolve_testbed
from sails_align.training.dataset import load_source
from sails_align.training.estimate import GIB
from sails_align.training.run import parse, resolved
from sails_align.training.subspace import find_subspace
from sails_align.training.trainer import build_trainer

TINY = LlamaConfig(
    num_hidden_layers=2,
    hidden_size=256,
    intermediate_size=1024,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
)


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configurations of models, whose names are those of the recipes' folders."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in SHAPES.items():
        config.save_pretrained(folder / name)
    TINY.save_pretrained(folder / "tiny")
    return folder


def recipe(model: str, method: str) -> list[str]:
    return ["--config", str(RECIPES / "configs" / model / f"{method}.yaml")]


def test_the_figures_of_a_recipe(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*recipe("gemma-2-9b", "dpo_full"), "--model_name_or_path", str(folder / "gemma-2-9b"), "--num_gpus", "8"]
    result = main([*argv, "--output", str(tmp_path / "out" / "figures.json")])
    assert json.loads((tmp_path / "out" / "figures.json").read_text()) == result
    assert (result["method"], result["start"]) == ("dpo", "full")
    setup = {"rows": 4, "length": 1024, "weight_bytes": 4, "compute_bytes": 2, "adapter": False, "checkpointing": True}
    others = {"stores_scores": True, "reference": "model", "quantized_bytes": None, "averaged": False}
    assert result["setup"] == {**setup, **others}
    P, zero2 = result["shape"]["n_parameters"], result["engines"]["zero2"]
    assert (zero2["weights"], zero2["reference"]) == (2 * P, 2 * P)
    parts = ("weights", "gradients", "optimizer", "reference", "buffers", "activations")
    assert zero2["total"] == sum(zero2[part] for part in parts)
    fits = [engine for engine, values in result["engines"].items() if values["fits"]]
    assert fits == ["zero2", "zero3", "zero3_offload", "fsdp2"]
    printed = capsys.readouterr().out
    assert "9,241,705,984 parameters" in printed
    assert f"{zero2['total'] / GIB:.1f}" in printed


@pytest.mark.parametrize(
    ("more", "changed"),
    [
        (["--precompute_ref_log_probs", "true"], {"reference": "none"}),
        (["--gradient_checkpointing", "false"], {"checkpointing": False}),
        (["--per_device_train_batch_size", "3"], {"rows": 6}),
        (["--bf16", "false"], {"compute_bytes": 4}),
        (["--dtype", "bfloat16"], {"weight_bytes": 2}),
        (["--attn_implementation", "eager"], {"stores_scores": True}),
        (["--use_peft", "true", "--init", "pissa"], {"reference": "adapter", "adapter": True}),
        (["--use_peft", "true", "--init", "guardspace"], {"reference": "adapter", "adapter": True}),
        (["--use_peft", "true", "--init", "sails"], {"reference": "none", "adapter": True}),
    ],
)
def test_options_that_change_the_figures(folder: Path, more: list[str], changed: dict[str, Any]) -> None:
    argv = [*recipe("llama-3.1-8b", "dpo_full"), "--model_name_or_path", str(folder / "tiny"), "--max_length", "4096"]
    plain, other = main(argv), main([*argv, *more])
    assert {name for name in plain["setup"] if plain["setup"][name] != other["setup"][name]} == changed.keys()
    assert {name: other["setup"][name] for name in changed} == changed
    assert plain["engines"] != other["engines"]


def test_the_testbed_and_a_trained_adapter(folder: Path, tmp_path: Path) -> None:
    result = main(["--method", "sft"])
    assert (result["model"], result["start"]) == ("testbed", "sails")
    assert 0 < result["shape"]["n_trainable"] < result["shape"]["n_parameters"]
    adapter = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    get_peft_model(AutoModelForCausalLM.from_config(TINY), adapter).save_pretrained(str(tmp_path))
    argv = ["--method", "dpo", "--model_name_or_path", str(folder / "tiny"), "--adapter_path", str(tmp_path)]
    assert main(argv)["setup"]["reference"] == "adapter"
    assert main(["--method", "sft", "--loss", "constrained"])["setup"]["reference"] == "adapter"


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("sft", []),
        ("sft", ["--layer_map", "sae_only"]),
        ("sft", ["--layer_map", "nearest", "--subspace_mode", "init"]),
        ("sft", ["--subspace_mode", "freeze", "--lora_r", "4", "--lora_target_modules", "q_proj", "down_proj"]),
        ("sft", ["--preset", "paper"]),
        ("sft", ["--init", "mean_diff", "--lora_r", "1"]),
        ("sft", ["--init", "pissa", "--lora_target_modules", "all-linear"]),
        ("sft", ["--use_peft", "false"]),
        ("dpo", ["--init", "orthogonal"]),
        ("dpo", ["--adapter_path", "ADAPTER"]),
    ],
)
def test_as_many_parameters_are_trained_as_in_the_real_training(
    method: Any, more: list[str], tmp_path: Path, adapter_of_testbed: Path
) -> None:
    """The estimate, the trainer's model, and the number that metrics and card take are one."""
    more = [str(adapter_of_testbed) if word == "ADAPTER" else word for word in more]
    small = ["--max_train_examples", "32", "--eval_examples", "4", "--disable_tqdm", "true"]
    shape = main(["--method", method, *small, *more])["shape"]
    args, testbed = resolved(parse(method, [*small, *more, "--output_dir", str(tmp_path)]))
    source = load_source(args, testbed)
    subspace = find_subspace(args, source, tmp_path / "subspace") if args.sails.uses_subspace else None
    model: Any = build_trainer(args, source, subspace).trainer.model
    assert (shape["n_trainable"], shape["n_parameters"]) == count_parameters(model)
    saved = get_peft_model_state_dict(model, adapter_name="default") if args.model.use_peft else model.state_dict()
    n_tied = 0 if args.model.use_peft else model.lm_head.weight.numel()
    assert shape["n_saved"] == sum(tensor.numel() for tensor in saved.values()) - n_tied


@pytest.fixture(scope="module")
def adapter_of_testbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(resolve_testbed(None).model_path)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "o_proj"])).save_pretrained(str(folder))
    return folder


def test_the_example_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    """What `make demo` prints as trainable: the blocks before the onset, and frozen factors, are not trained."""
    main(recipe("testbed", "sft_sails"))
    n_trained, share = re.findall(r"([\d,]+) trained \(([\d.]+%)\)", capsys.readouterr().out)[0]
    assert f"| trainable parameters | | {n_trained} ({share} of this tiny model) |" in (ROOT / "README.md").read_text()


def test_what_only_discovery_decides_is_a_bound(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*recipe("gemma-2-2b", "sft_sails"), "--model_name_or_path", str(folder / "gemma-2-2b")]
    n = {}
    for layer_map in ("nearest", "from_onset", "sae_only"):
        n[layer_map] = main([*argv, "--layer_map", layer_map])["shape"]["n_trainable"]
        assert ("at most " in capsys.readouterr().out) == (layer_map == "from_onset")
    assert n["from_onset"] == n["nearest"]
    # Four layers of 26: o_proj of the SAEs' blocks, and q, k and v of the blocks after them.
    assert n["sae_only"] * 26 == n["nearest"] * 4


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--num_gpus", "0", "--method", "sft"], "num_gpus is 0; choose a value above 0"),
        (["--num_gpus", "many"], "--help lists the options"),
        (["--gpu_memory_gib", "nan", "--method", "sft"], "gpu_memory_gib is nan"),
        ([], "(no --config); pass --method sft or --method dpo"),
        (["--method", "ppo"], "not one of: sft, dpo; did you mean 'dpo'?"),
        (["--method", "sft", "--model_name_or_path", "no/such-model"], "cannot load the model no/such-model"),
        (["--method", "sft", "--use_peft", "false", "--init", "sails"], "--use_peft false trains all weights"),
        (["--method", "sft", "--init", "default", "--adapter_path", "x"], "leave one out"),
        (["--method", "sft", "--adapter_path", "no/adapter"], "there is no folder no/adapter"),
        (["--method", "sft", "--init", "default", "--lora_target_modules", "query"], "see --lora_target_modules"),
        (["--method", "sft", "--optim", "adafactor"], "only AdamW can be estimated"),
        (["--method", "sft", "--num_gpu", "8"], "unknown option '--num_gpu'"),
    ],
)
def test_what_cannot_be_used(argv: list[str], told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)) as refused:
        main(argv)
    assert len(str(refused.value).splitlines()) <= 3


def test_a_configuration_of_unknown_method(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model_name_or_path: testbed\n")
    with pytest.raises(InputError, match=r"mine\.yaml begins with neither sft_ nor dpo_"):
        main(["--config", str(tmp_path / "mine.yaml")])


def test_help_is_quick() -> None:
    code = """
import sys
from sails_align.cli.estimate import main
try:
    main(["--help"])
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "--num_gpus" in done.stdout


# The documentation


FILES = {"single_gpu": "single", "multi_gpu": "ddp", "multi_node": "zero2"}
"""What the estimator calls a launch configuration, where that is not its name."""


@pytest.mark.slow
def test_the_tables_of_the_documentation(folder: Path) -> None:
    @cache
    def engines(model: str, name: str, n: int) -> dict[str, Any]:
        argv = [*recipe(model, name), "--model_name_or_path", str(folder / model), "--num_gpus", str(n)]
        return main(argv)["engines"]

    rows = re.findall(r"^\| (\S+-\S+b) \| (`.*?)\|$", (ROOT / "docs" / "fits.md").read_text(), re.MULTILINE)
    assert len(rows) == 2 * 3 * len(SHAPES)
    columns = ("multi_gpu", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")
    for model, row in rows:
        methods, *cells = (cell.strip() for cell in row.split("|"))
        # Of the adapter recipes one of each trainer and each start.
        for name in ("sft_sails", "dpo_lora") if "*" in methods else (methods.strip("`"),):
            if len(cells) == 3:
                expected = [_best(engines(model, name, n), cell) for n, cell in zip((1, 8, 16), cells, strict=True)]
            else:
                expected = [_figure(engines(model, name, 8)[FILES.get(column, column)]) for column in columns]
            assert cells == expected, f"{model} {name}"


def test_the_figures_of_4_bits_in_the_documentation(folder: Path) -> None:
    """The sentence on a GPU of 24 GB, and that only engines which the recipes take are in the table."""
    text = " ".join((ROOT / "docs" / "fits.md").read_text().split())
    for name in ("sft_sails", "dpo_sails"):
        argv = [
            *recipe("gemma-2-9b", name),
            "--model_name_or_path",
            str(folder / "gemma-2-9b"),
            "--gpu_memory_gib",
            "24",
        ]
        engines = main([*argv, "--load_in_4bit", "true", "--gpu_memory_gib", "24"])["engines"]
        assert engines.keys() == {"single", "ddp"}
        assert engines["single"]["fits"]
        total, weights = (f"{engines['single'][part] / GIB:.1f} GiB" for part in ("total", "weights"))
        assert f"needs {total} in 4 bits, {weights} of it weights" in text


def _best(engines: dict[str, Any], cell: str) -> str:
    """What a cell of the first table is to say, given the file that it names."""
    file = cell.split("`")[1].removesuffix(".yaml")
    values = engines[FILES.get(file, file)]
    assert values["fits"]
    memory = f" (and {values['cpu'] / GIB:.0f} of the machine's memory)" if "offload" in file else ""
    return f"`{file}.yaml` {_figure(values)}{memory}"


def _figure(values: dict[str, Any]) -> str:
    return f"{values['total'] / GIB:.1f}" + ("" if values["fits"] else " (no)")
