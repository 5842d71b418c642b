"""Every command, started again in its folder: the same options reuse what is there, other ones are refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from adapters import save_adapter
from small_comparison import write_comparison
from tiny import Project

from sails_align.cli import compare as comparing
from sails_align.cli import discover, edit, judge_check, reproduce, train_sae
from sails_align.cli.evaluate import attack, harness, helpfulness, safety
from sails_align.core.earlier import RECORD_FILE
from sails_align.core.errors import InputError
from sails_align.core.files import write_json
from sails_align.core.options import all_but
from sails_align.evaluation.judges.options import JudgeArguments, LabelArguments
from sails_align.evaluation.options import NOT_IN_IDENTITY, ComparedArguments, TrackerArguments
from sails_align.experiments.commands import OPTIONS
from sails_align.experiments.options import NOT_IN_IDENTITY as NOT_IN_COMPARISONS
from sails_align.experiments.options import CompareOptions
from sails_align.experiments.reproduction.plan import Reproduction
from sails_align.experiments.studies import CommandLine, read_plans
from sails_align.testbed.build import ASSETS
from sails_align.training import run as align

CLASSES = {
    *(of for classes in OPTIONS.values() for of in classes),
    ComparedArguments,
    LabelArguments,
    TrackerArguments,
}
COUNTED = set(
    """
    apply_chat_template backend category_column clade_oracle dtype fewshot_as_multiturn gate_clamp gate_every gate_high
    gate_high_steps gate_low gate_low_steps gate_prefix gate_prompt guard_family judge judge_backend
    judge_max_new_tokens kind label_column limit max_model_len max_new_tokens n_labels n_prompts num_fewshot on_bad_rows
    part prompt_column prompts seed split steer steer_direction steer_layers steer_strength system_instruction
    system_prompt tasks temperature testbed trust_remote_code
    """.split()  # noqa: SIM905
)
"""Options that make other results. A new option belongs here, or in `NOT_IN_IDENTITY` with the reason."""


def test_each_option_of_an_evaluation_counts_or_is_named_as_harmless() -> None:
    names = {option.name for of in CLASSES for option in fields(of)}
    assert names <= COUNTED ^ NOT_IN_IDENTITY
    assert names | {"suffixes"} == COUNTED | NOT_IN_IDENTITY
    judged = JudgeArguments(["llm"], ["m"], judge_base_url=["http://user:s3cret@x/v1"])
    assert "s3cret" not in json.dumps(all_but(NOT_IN_IDENTITY, judged))


def test_each_option_of_a_comparison_counts_or_is_named_as_harmless() -> None:
    counted = set(
        """
        ablations attacks defences examples first_seed learning_rates n_attacked n_attacked_seeds n_capability
        n_examples methods n_extensions n_prompts n_seeds n_side_seeds n_tuning_seeds relearning runs study tampered
        world worlds
        """.split()  # noqa: SIM905
    )
    assert {option.name for option in fields(CompareOptions)} == counted | set(NOT_IN_COMPARISONS)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(command: Callable[[list[str]], Any], argv: list[str], folder: Path, says: str) -> None:
    """Whatever is in the folder stays as it is, also its log."""
    before = contents(folder)
    with pytest.raises(InputError) as error:
        command(argv)
    message = str(error.value)
    assert says in message
    assert message.splitlines()[-1].endswith(", or replace it with --overwrite_output_dir true")
    assert contents(folder) == before


def quick(folder: Path, *more: str) -> list[str]:
    files = ["--output_dir", str(folder / "out"), "--cache_path", str(folder / "cache.sqlite"), "--progress", "false"]
    return [*files, *more]


EVALUATIONS: dict[str, tuple[Callable[[list[str]], Any], tuple[str, ...], tuple[str, ...], str]] = {
    "safety": (safety, ("--n_prompts", "2"), ("--judge", "rules"), 'judge (null, now ["rules"])'),
    "helpfulness": (helpfulness, ("--n_prompts", "2"), ("--reference", "set"), "different: reference"),
    "attack": (
        lambda argv: attack(["wrappers", *argv]),
        ("--n_prompts", "2"),
        ("--max_new_tokens", "3"),
        "max_new_tokens (null, now 3)",
    ),
    "judge-check": (
        judge_check.main,
        ("--judge", "rules", "--labels", "oracle", "--n_labels", "8"),
        ("--n_labels", "9"),
        "n_labels (8, now 9)",
    ),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations(tmp_path: Path, name: str) -> None:
    command, options, other, says = EVALUATIONS[name]
    argv = quick(tmp_path, *options)
    first = command(argv)
    record = json.loads((tmp_path / "out" / RECORD_FILE).read_text())
    assert record["command"].startswith("sails ")
    assert command([*argv, "--max_unscored", "1"]) == first  # which changes no result
    refused(command, [*argv, *other], tmp_path / "out", says)
    command([*argv, *other, "--overwrite_output_dir", "true"])
    refused(command, argv, tmp_path / "out", "holds other results (different: ")
    (tmp_path / "out" / RECORD_FILE).unlink()
    refused(command, argv, tmp_path / "out", "holds other results (different: options, which were not recorded);")


def test_another_command_in_the_same_folder(tmp_path: Path) -> None:
    argv = quick(tmp_path, "--n_prompts", "2")
    safety(argv)
    says = "holds other results (different: command (sails eval safety, now sails eval helpfulness))"
    refused(helpfulness, argv, tmp_path / "out", says)


def test_a_model_replaced_in_its_folder(tmp_path: Path) -> None:
    shutil.copytree(ASSETS / "model", tmp_path / "model")
    argv = quick(tmp_path, "--n_prompts", "2", "--model", str(tmp_path / "model"))
    safety(argv)
    shutil.copytree(tmp_path / "model", tmp_path / "moved")
    safety([*argv, "--model", str(tmp_path / "moved")])  # which is the same one
    config = tmp_path / "model" / "generation_config.json"
    config.write_text(config.read_text() + "\n")
    refused(safety, argv, tmp_path / "out", "(different: model)")


def test_an_evaluation_that_failed_can_be_corrected(tmp_path: Path) -> None:
    """Nothing finished is there to be lost."""
    argv = quick(tmp_path, "--n_prompts", "2", "--judge", "llm", "--judge_model", "m", "--judge_base_url")
    with pytest.raises(InputError, match="cannot reach"):
        safety([*argv, "http://127.0.0.1:9/v1"])
    safety(quick(tmp_path, "--n_prompts", "2"))


def test_harness(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    argv = ["--limit", "2", "--base", "none", "--output_dir", str(tmp_path / "out")]
    first = harness(argv)
    assert harness([*argv, "--batch_size", "2"]) == first
    assert "holds these results: nothing is done" in capsys.readouterr().out
    refused(harness, [*argv, "--limit", "3"], tmp_path / "out", "limit (2, now 3)")


def test_discovery_and_a_training_in_its_folder(project: Project, tmp_path: Path) -> None:
    argv = project.argv(tmp_path / "out", "--n_texts", "4")
    discover.main(argv)
    discover.main(argv)
    refused(
        discover.main, [*argv, "--top_k", "6"], tmp_path / "out", "holds another subspace (different: top_k (8, now 6))"
    )
    refused(discover.main, [*argv, "--n_texts", "5"], tmp_path / "out", "n_texts (4, now 5)")
    training = project.argv(tmp_path / "out", "--max_steps", "1", "--top_k", "6")
    refused(lambda words: align.main("sft", words), training, tmp_path / "out", "top_k (8, now 6)")
    discover.main([*argv, "--top_k", "6", "--overwrite_output_dir", "true"])
    refused(discover.main, argv, tmp_path / "out", "top_k (6, now 8)")


def test_sae_trainings(tmp_path: Path) -> None:
    sizes = {"n_tokens": 1000, "batch_size": 100, "d_sae": 64, "k": 4, "eval_tokens": 100, "buffer_tokens": 500}
    argv = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    argv += ["--layers", "1", "--output_dir", str(tmp_path / "out")]
    first = train_sae.main(argv)
    assert train_sae.main(argv) == first
    refused(train_sae.main, [*argv, "--k", "5"], tmp_path / "out", "(different: k (4, now 5))")
    train_sae.main([*argv, "--layers", "2", "--k", "5"])  # another layer replaces nothing
    replaced = train_sae.main([*argv, "--k", "5", "--overwrite_output_dir", "true"])
    assert replaced[1].sha256 != first[1].sha256


def test_merges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ASSETS / "model", tmp_path / "base")
    adapter, out = save_adapter(tmp_path / "adapter", tmp_path / "base"), tmp_path / "out"
    argv = ["merge", str(adapter), "--output", str(out)]
    edit.main(argv)
    before = contents(out)
    edit.main([*argv, "--device", "cpu"])
    assert "holds this result: nothing is done" in capsys.readouterr().out
    assert contents(out) == before
    refused(edit.main, [*argv, "--dtype", "bfloat16"], out, 'dtype (null, now "bfloat16")')
    edit.main([*argv, "--dtype", "bfloat16", "--overwrite_output_dir", "true"])
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    refused(edit.main, argv, out, "holds other results (different: dtype")
    before = contents(out)
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="is damaged"):
        edit.main([*argv, "--overwrite_output_dir", "true"])
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_comparisons(tmp_path: Path) -> None:
    """By the record: a whole comparison takes minutes."""
    argv = ["--output_dir", str(tmp_path), "--n_seeds", "2"]
    args, _, studies = read_plans(CommandLine.read(argv), None)
    from dataclasses import asdict

    plan = [asdict(study) for study in studies]
    write_json(
        tmp_path / RECORD_FILE, {"command": "sails compare", "options": all_but(NOT_IN_COMPARISONS, args), "plan": plan}
    )
    write_json(tmp_path / "results.json", {})
    refused(comparing.main, [*argv, "--n_seeds", "3"], tmp_path, "(different: plan, n_seeds (2, now 3))")
    with pytest.raises(InputError, match="there is no cell 'x'"):  # it is the same, and goes on
        comparing.main([*argv, "--cell", "x", "--processes", "1"])


def test_reproductions(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path)
    argv = ["--model", str(folder / "compare.yaml"), "--num_gpus", "0", "--dry_run", "--skip_checks"]
    argv += ["--output_dir", str(folder / "out"), "--steps", "train"]
    plan = read_plans(CommandLine.read(["--config", str(folder / "compare.yaml")]), None)[2][0].plans[0][1]
    assert plan.protocol is not None
    of = Reproduction(plan.runs, plan.protocol, folder / "out", 0, only=("train",))
    (job,) = of.jobs()
    job.finish(job.record or {})
    reproduce.main(argv)
    recipe = yaml.safe_load((folder / "sails.yaml").read_text())
    (folder / "sails.yaml").write_text(yaml.safe_dump({**recipe, "lora_r": 4}))
    refused(reproduce.main, argv, folder / "out", "holds other results (different: train/sft-sails);")
    reproduce.main([*argv, "--overwrite_output_dir", "true"])
    replaced = Reproduction(plan.runs, plan.protocol, folder / "out", 0, only=("train", "evaluate"), overwrite=True)
    assert {step.also for step in replaced.jobs()} == {("--overwrite_output_dir", "true")}
    assert job.also == ()
