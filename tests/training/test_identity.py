"""What makes two trainings the same run: every option counts, except those that are named as harmless."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tiny import Project, build
from trl import DPOConfig, GRPOConfig, ModelConfig, ScriptArguments, SFTConfig

from sails_align.core.errors import InputError
from sails_align.core.log import LOG_FILE
from sails_align.core.options import all_but
from sails_align.training import run as align
from sails_align.training.earlier import clear
from sails_align.training.identity import DECIDES_BEST, NOT_IN_IDENTITY, differences, option_values
from sails_align.training.options import own_options
from sails_align.training.rlhf.options import RlhfOptions

HARMLESS = frozenset().union(*NOT_IN_IDENTITY.values())
COUNTED = set(
    """
    benign_whitening center contrast fold_norm guard_energy guard_tokens init init_scale layer_map
    max_discovery_examples prompt_tokens
    sae_allow_mismatch sae_ids sae_release sc_lora_beta score subspace_mode tau top_k weighting
    bad_responses chosen_column eval_examples good_labels helpful_chosen_column helpful_dataset_config
    helpful_dataset_split helpful_label_column helpful_prompt_column label_column max_train_examples on_bad_rows
    prompt_column rejected_column contamination helpful_ratio
    derta_prefix_share derta_empty_share derta_rto_share derta_refusal
    nearest_refusal refusal_tokens refusal_control_seed refusal_stages
    loss subspace_decay ema_half_life frozen_units trained_units clade clade_layer
    sift_rate sift_select_steps sift_modules sift_entries sift_forbidden
    zeroth_order zo_eps zo_directions dp_epsilon dp_sigma dp_clip dp_delta dp_batch_size dp_noise_seed
    first_tokens first_tokens_weight constrained_first_betas constrained_beta
    redundancy_weight redundancy_groups redundancy_form redirection_weight redirection_layer
    redirection_control_seed sspu_control_seed crisp_control_seed
    sspu_features sspu_layer sspu_scale sspu_retain_weight sspu_vector sspu_lambda
    crisp_features crisp_ratio crisp_retain_weight
    eval_part warm_start_epochs warm_start_examples warm_start_learning_rate warm_start_ratio
    """.split()  # noqa: SIM905 -- a list of strings would be three times as long
)
"""Our options that make another run. A new option belongs here, or in `identity.NOT_IN_IDENTITY` with the reason."""
OURS = (*own_options("dpo"), RlhfOptions)
LIBRARIES = (SFTConfig, DPOConfig, GRPOConfig, ModelConfig, ScriptArguments)


@pytest.mark.parametrize("options", OURS)
def test_each_option_of_ours_is_in_one_of_the_two_lists(options: type) -> None:
    names = {field.name for field in fields(options) if field.name != "given"}
    assert names <= COUNTED ^ HARMLESS, "say of each new option whether a run with another value is another run"


def test_no_list_names_options_that_are_gone() -> None:
    ours = {field.name for options in OURS for field in fields(options)}
    assert ours >= COUNTED
    newer = {"dataloader_multiprocessing_context"}  # than the oldest transformers that is supported
    assert ours | newer | {field.name for options in LIBRARIES for field in fields(options)} >= HARMLESS


OTHER_VALUES: dict[str, Any] = {bool: True, int: 7, float: 0.25, str: "other"}


@pytest.mark.parametrize("options", LIBRARIES)
def test_every_option_of_a_library_counts_unless_it_is_harmless(tmp_path: Path, options: type) -> None:
    """Also one that a new version adds: there is nothing to keep up to date."""
    where = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False} if hasattr(options, "to_dict") else {}
    made, training = options(**where), SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)

    def values() -> dict[str, Any]:
        return option_values(made) if hasattr(made, "to_dict") else option_values(training, made)

    before = values()
    names = {field.name for field in fields(options)}
    assert names - before.keys() <= HARMLESS
    for name in names - HARMLESS:
        kept = getattr(made, name)
        setattr(made, name, OTHER_VALUES.get(type(kept), "other") if kept is not True else False)
        changed = {each for each, value in values().items() if value != before.get(each)}
        assert changed - DECIDES_BEST == {name}, name
        setattr(made, name, kept)


def test_what_decides_the_best_checkpoint_counts_if_that_is_the_result(tmp_path: Path) -> None:
    common: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "eval_strategy": "steps"}
    assert not DECIDES_BEST & option_values(SFTConfig(**common)).keys()
    assert option_values(SFTConfig(**common, load_best_model_at_end=True)).keys() >= DECIDES_BEST


def test_a_file_of_options_counts_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text('{"stage": 2}')
    assert all_but((), ScriptArguments(dataset_name=str(path)))["dataset_name"] == {"stage": 2}


def test_what_a_loss_or_a_callback_reads_counts_by_its_content(project: Project, tmp_path: Path) -> None:
    """The harmless data has no rejected responses, so that the training rows have none, either."""
    other = tmp_path / "other.jsonl"
    other.write_text((project.folder / "safety.jsonl").read_text().replace("you can", "with glue you can"))
    uses = [
        (["--init", "default", "--loss", "redirection"], "dataset_name", "texts"),
        (["--use_peft", "false", "--sift_rate", "0.1"], "sift_safety_dataset_name", "protected"),
    ]
    for number, (options, named, part) in enumerate(uses):
        one, two = (
            build(project.argv(tmp_path / f"{number}-{path.stem}", *options, f"--{named}", str(path))).identity()
            for path in (project.folder / "safety.jsonl", other)
        )
        assert one["data"] == two["data"]
        assert one[part] != two[part]


# Runs


@pytest.fixture(scope="module")
def finished(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("finished") / "run"
    align.main("sft", project.argv(folder, "--init", "default"))

    def times() -> dict[Path, int]:
        files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOG_FILE)
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    yield folder
    assert times() == before  # nothing was lost, or written but for the log


CHANGES = [
    ("loss_type", "dft", '"nll", now "dft"'),
    ("data_seed", "3", "null, now 3"),
    ("label_smoothing_factor", "0.1", "0.0, now 0.1"),
    ("neftune_noise_alpha", "5", "null, now 5.0"),
    ("lr_scheduler_type", "cosine", '"linear", now "cosine"'),
    ("optim", "adafactor", '"adamw_torch_fused", now "adafactor"'),
    ("learning_rate", "0.02", "0.01, now 0.02"),
    ("warmup_steps", "3", "0.1, now 3.0"),
    ("max_grad_norm", "0.5", "1.0, now 0.5"),
    ("completion_only_loss", "false", "null, now false"),
    ("use_rslora", "true", "false, now true"),
    ("eval_examples", "5", "4, now 5"),
    ("first_tokens", "3", "5, now 3"),
]


@pytest.mark.parametrize(("name", "value", "said"), CHANGES)
@pytest.mark.parametrize("resume", ["false", "true", "checkpoint"])
def test_a_run_with_another_option_is_refused(
    project: Project, finished: Path, tmp_path: Path, name: str, value: str, said: str, resume: str
) -> None:
    if resume == "checkpoint":
        if (name, value) not in (("loss_type", "dft"), ("data_seed", "3"), ("optim", "adafactor")):
            pytest.skip("one of each kind is enough")
        finished, resume = tmp_path / "run", str(finished / "checkpoint-6")
    options = ["--init", "default", f"--{name}", value, "--resume_from_checkpoint", resume]
    with pytest.raises(InputError, match=r"another run \(different: ") as refused:
        align.main("sft", project.argv(finished, *options))
    assert f"{name} ({said})" in str(refused.value)


def test_a_finished_run_is_not_done_again(project: Project, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harmless = ["--logging_steps", "3", "--save_steps", "4", "--run_name", "other", "--eval_strategy", "epoch"]
    for more in ([], ["--resume_from_checkpoint", "true"], harmless):
        metrics = align.main("sft", project.argv(finished, "--init", "default", *more))
        assert metrics == json.loads((finished / "metrics.json").read_text())
        assert f"{finished} holds this run, finished: nothing is done" in capsys.readouterr().out


def test_a_finished_run_is_trained_further_only_on_request(project: Project, finished: Path) -> None:
    with pytest.raises(InputError, match=r"a finished run \(different: max_steps \(6, now 8\)\)"):
        align.main("sft", project.argv(finished, "--init", "default", "--max_steps", "8"))


def test_a_finished_run_is_replaced_as_a_whole(project: Project, finished: Path, tmp_path: Path) -> None:
    """Of the old run nothing is left that would be taken for a part of the new one."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    options = ["--use_peft", "false", "--max_steps", "2", "--overwrite_output_dir", "true"]
    align.main("sft", project.argv(run, *options))
    names = {path.name for path in run.iterdir()}
    assert {"model.safetensors", "config.json", "checkpoint-2"} <= names
    assert not {"adapter_config.json", "adapter_model.safetensors", "checkpoint-6"} & names
    assert json.loads((run / "run.json").read_text())["identity"]["init"] == "full"
    assert "overwrite" not in (run / "config.yaml").read_text()
    align.main("sft", project.argv(run, *options, "--resume_from_checkpoint", "true"))  # as a job script would


@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_what_is_read_is_not_replaced(project: Project, finished: Path, tmp_path: Path, overwrite: str) -> None:
    base = Path(shutil.copytree(project.folder / "tiny", tmp_path / "base"))
    options = ["--overwrite_output_dir", overwrite, "--use_peft", "false", "--model_name_or_path", str(base)]
    (tmp_path / "link").symlink_to(base)
    for folder in (base, tmp_path / "link"):
        with pytest.raises(InputError, match=r"is also an input .*; choose another --output_dir"):
            align.main("sft", project.argv(folder, *options))
    (tmp_path / "run").symlink_to(finished)
    options = ["--overwrite_output_dir", overwrite, "--adapter_path", str(tmp_path / "run")]
    with pytest.raises(InputError, match=r"is also an input|where the new adapter would go"):
        align.main("sft", project.argv(finished, *options))


def test_a_model_of_unknown_origin_is_not_replaced(project: Project, tmp_path: Path) -> None:
    shutil.copytree(project.folder / "tiny", tmp_path / "other")
    with pytest.raises(InputError, match=r"holds a model .*, and no run.json says how it was made"):
        align.main("sft", project.argv(tmp_path / "other"))


def test_a_record_without_an_identity_is_not_replaced(project: Project, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"versions": {}}')
    with pytest.raises(InputError, match=r"holds a run.json that does not say how it was made;\n.*overwrite"):
        align.main("sft", project.argv(tmp_path / "run"))


def test_only_what_is_there_is_said_to_be_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clear(tmp_path / "new")
    assert not caplog.records
    (tmp_path / "checkpoint-1").mkdir()
    clear(tmp_path)
    assert "is replaced" in caplog.text
    assert not (tmp_path / "checkpoint-1").exists()


def test_a_known_subspace_is_compared_instead_of_its_source() -> None:
    made, given = {"saes": ["an SAE"], "subspace": "a"}, {"saes": {"subspace": "of the file"}, "subspace": "a"}
    rest = {"options": {}, "length": {}}
    assert differences({**given, **rest}, {**made, **rest}) == []
    assert differences({**given, **rest, "subspace": "b"}, {**made, **rest}) == ["subspace"]
    assert differences({**given, **rest, "subspace": None}, {**made, **rest}) == ["saes", "subspace"]
