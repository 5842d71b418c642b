"""An adapter's files: what is read, and what is refused."""

import json
from pathlib import Path

import pytest
from adapters import (
    CONFIG,
    WEIGHTS,
    edit_config,
    edit_weights,
    empty_tensor,
    lose_tensor,
    nan_tensor,
    other_rank,
    save_adapter,
)
from safetensors.torch import load_file
from tiny import save_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from sails_align.core.errors import InputError
from sails_align.models.adapters import check_complete, expected_shapes, load_base_config, read_adapter
from sails_align.models.load import load_model
from sails_align.models.resolve import resolve_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    save_model(folder)
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base)


VARIANTS = {
    "plain": {},
    "mlp": {"target_modules": ["gate_proj", "down_proj"]},
    "pattern": {"target_modules": r".*layers\.[02]\.self_attn\.(q|o)_proj"},
    "some layers": {"layers_to_transform": [1]},
    "rank pattern": {"rank_pattern": {"k_proj": 2}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_what_is_expected_is_what_peft_saves(base: Path, tmp_path: Path, options: dict) -> None:
    folder = save_adapter(tmp_path / "adapter", base, **options)
    saved = {name: tuple(tensor.shape) for name, tensor in load_file(folder / WEIGHTS).items()}
    saved.pop("base_model.model.model.embed_tokens.base_layer.weight", None)  # a copy that PEFT adds
    assert expected_shapes(read_adapter(folder).config, AutoConfig.from_pretrained(base)) == saved
    check_complete(folder)


def test_what_is_read(adapter: Path, base: Path) -> None:
    files = read_adapter(adapter)
    assert files.config.r == 4
    assert files.tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"] == ("F32", (4, 32))
    assert files.record == files.identity == {}
    assert files.revision is None
    (adapter / "run.json").write_text(
        json.dumps({"identity": {"seed": 1}, "options": {"model": {"model_revision": "v2"}}})
    )
    files = read_adapter(adapter)
    assert (files.identity, files.revision) == ({"seed": 1}, "v2")
    (adapter / "run.json").write_text(json.dumps({"seed": 2}))  # as in a checkpoint
    assert read_adapter(adapter).identity == {"seed": 2}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lose_tensor, "1 tensor is missing (base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight)"),
        (empty_tensor, "1 tensor is empty"),
        (nan_tensor, "1 tensor is not finite"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors) if "lora_B" in name], "12 tensors are missing"),
        (lambda tensors: tensors.clear(), "24 tensors are missing"),
    ],
)
def test_tensors_that_are_lost(adapter: Path, change, said: str) -> None:
    edit_weights(adapter, change)
    with pytest.raises(InputError, match="is not whole") as caught:
        check_complete(adapter)
    assert said in str(caught.value)


def test_ranks_that_differ(adapter: Path) -> None:
    edit_weights(adapter, other_rank)
    with pytest.raises(InputError, match=r"o_proj.lora_A.weight: \(3, 32\), the model implies \(4, 32\)"):
        check_complete(adapter)


def test_another_model(adapter: Path, tmp_path: Path, base: Path) -> None:
    config = AutoConfig.from_pretrained(base)
    wider = LlamaConfig(**{**config.to_dict(), "hidden_size": 48})
    with pytest.raises(InputError, match="does not fit the model: 12 tensors are of another shape"):
        check_complete(adapter, wider)
    config.num_hidden_layers = 2
    with pytest.raises(InputError, match="does not fit the model: 8 tensors are not of this model"):
        check_complete(adapter, config)
    config.num_hidden_layers = 4
    with pytest.raises(InputError, match="8 tensors are missing"):
        check_complete(adapter, config)
    edit_config(adapter, target_modules=["query", "key"])
    with pytest.raises(InputError, match=r"does not fit the model .*Target modules"):
        check_complete(adapter)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / CONFIG).unlink(), "holds no adapter"),
        (lambda folder: (folder / CONFIG).write_text("{"), "adapter_config.json is damaged"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "no mapping"),
        (lambda folder: edit_config(folder, peft_type="IA3"), "of the kind 'IA3'"),
        (lambda folder: edit_config(folder, layers_pattern="x", layer_replication="y", r=None), "damaged"),
        (lambda folder: edit_config(folder, lora_alpha=None), "lora_alpha is None"),
        (lambda folder: edit_config(folder, base_model_name_or_path=5), "base_model_name_or_path is 5"),
        (lambda folder: edit_config(folder, rank_pattern=5), "rank_pattern is 5"),
        (lambda folder: edit_config(folder, target_modules=5), "target_modules is 5"),
        (lambda folder: (folder / WEIGHTS).unlink(), "adapter_model.safetensors is missing"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "is a pickle, which is not read"),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:900]), "is damaged"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), "is damaged"),
        (lambda folder: (folder / "run.json").write_bytes(b"\xff"), "run.json is damaged"),
    ],
)
def test_files_that_cannot_be_used(adapter: Path, change, said: str) -> None:
    change(adapter)
    with pytest.raises(InputError) as caught:
        check_complete(adapter)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_folders_without_adapter(tmp_path: Path, base: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds a whole model, and no adapter"):
        read_adapter(base)


def test_base_models_that_are_not_there(adapter: Path, base: Path, tmp_path: Path) -> None:
    assert load_base_config(read_adapter(adapter))[0] == str(base)
    for name, said in (
        (str(tmp_path / "moved"), "if it was moved, give its folder with --base_model"),
        ("someone/unknown-model", "cannot load the model someone/unknown-model"),
        (None, "does not name the base model"),
    ):
        edit_config(adapter, base_model_name_or_path=name)
        with pytest.raises(InputError, match=said):
            load_base_config(read_adapter(adapter))
        assert load_base_config(read_adapter(adapter), str(base))[1].hidden_size == 32
    with pytest.raises(InputError, match="cannot load the model"):
        load_base_config(read_adapter(adapter), str(tmp_path))


def test_values_are_read_only_where_they_are_asked_for(adapter: Path) -> None:
    edit_weights(adapter, nan_tensor)
    check_complete(adapter, read_values=False)  # as `load_model` does, after `resolve_model` has looked at the values
    edit_weights(adapter, lose_tensor)
    with pytest.raises(InputError, match="1 tensor is missing"):
        check_complete(adapter, read_values=False)


def test_nothing_of_the_model_is_loaded(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    check_complete(adapter)


@pytest.mark.parametrize("linked", [False, True])
def test_a_base_named_by_a_relative_path_is_found_from_elsewhere(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    """The path begins in the folder where the training ran, which is above the adapter's."""
    project = tmp_path / "project"
    (project / "models").mkdir(parents=True)
    (project / "models" / "base").symlink_to(base)
    adapter = save_adapter(project / "runs" / "mine", base)
    edit_config(adapter, base_model_name_or_path="models/base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    if linked:
        (tmp_path / "elsewhere" / "link").symlink_to(adapter)
        adapter = Path("link")
    assert load_base_config(read_adapter(adapter))[0] == str(project / "models" / "base")
    check_complete(adapter)
    spec = resolve_model(str(adapter))
    assert spec.base == str(project / "models" / "base")
    assert load_model(spec).num_parameters() > 0
    edit_config(adapter, base_model_name_or_path="./models/gone")
    with pytest.raises(InputError, match=r"there is no model ./models/gone, .*\n.*give its folder with --base_model"):
        resolve_model(str(adapter))
