"""Guards on the testbed: fitted, calibrated, checked and used, and what they refuse to do."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_model

from sails_align.cli import answer, guard
from sails_align.cli.evaluate import attack, divergence, helpfulness, safety
from sails_align.core.errors import InputError
from sails_align.data.messages import assistant, user
from sails_align.data.tokens import render
from sails_align.evaluation.judges.rules import read_refusal
from sails_align.guards.calibrate import calibrated
from sails_align.guards.check import check_rates, check_rows
from sails_align.guards.guard import Guard, LoadedModel, ScoredPrompts, prompt_hash
from sails_align.guards.options import CalibrationOptions
from sails_align.testbed.build import ASSETS, resolve_testbed
from sails_align.testbed.data import alignment_data

FIT = ["testbed", "--layer", "4", "--n_prompts", "200", "--steps", "100"]
PROMPTS = ["--n_prompts", "80"]


def fit(folder: Path, *more: str) -> Any:
    return guard.fit([*FIT, "--output", str(folder), *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated guard of the testbed's model; do not change it."""
    made = tmp_path_factory.mktemp("guards") / "guard"
    fit(made)
    guard.calibrate([str(made), *PROMPTS])
    return made


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(folder, tmp_path / "guard"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAILS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def argv(tmp_path: Path, *more: str) -> list[str]:
    options = {"output_dir": tmp_path / "out", "n_prompts": 6, "progress": "false"}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))] + list(more)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# fit


def test_a_guard_says_what_it_was_fitted_on(folder: Path) -> None:
    about = Guard.load(folder).about
    assert about["layer"] == 4
    assert about["auc"]["4"] > 0.99
    assert about["n_parameters"] < 200_000
    world = resolve_testbed(None).world
    known = {prompt_hash(row["prompt"]) for harmful in (True, False) for row in alignment_data(world, harmful=harmful)}  # pyright: ignore
    assert len(about["prompt_hashes"]) == 400
    assert set(about["prompt_hashes"]) <= known


def test_the_layer_with_the_best_auc_is_read(tmp_path: Path) -> None:
    about = guard.fit(["testbed", "--n_prompts", "60", "--steps", "20", "--output", str(tmp_path / "guard")])
    aucs = about["auc"]
    assert list(aucs) == ["0", "1", "2", "3", "4"]
    assert aucs[str(about["layer"])] == max(aucs.values()) > min(aucs.values())


def test_the_same_guard_is_kept_and_another_one_is_not_replaced_unasked(own: Path) -> None:
    before = (own / "projector" / "projector.json").stat().st_mtime_ns
    fit(own)
    assert (own / "projector" / "projector.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"holds another guard;\nchoose another --output, or replace it"):
        fit(own, "--steps", "90")
    fit(own, "--steps", "90", "--overwrite_output_dir", "true")
    for use in (lambda: Guard.load(own).calibrated, lambda: safety(argv(own.parent, "--guard", str(own)))):
        with pytest.raises(InputError, match="has no threshold yet; run sails guard calibrate"):
            use()
    guard.calibrate([str(own), "--prompts", "testbed", "--n_prompts", "64"])
    assert Guard.load(own).calibrated.about["guard_hash"] == Guard.load(own).hash


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dimension", "9"], "dimension is 9; choose 2 to 8"),
        (["--steps", "0"], "steps is 0"),
        (["--contrastive_weight", "-1"], "contrastive_weight is -1"),
        (["--layer", "5"], "layer 5 is out of range; choose 0 to 4"),
        (["--n_prompts", "9"], "give at least 10"),
    ],
)
def test_what_cannot_be_fitted(tmp_path: Path, options: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        fit(tmp_path / "guard", *options)
    assert not (tmp_path / "guard").exists()


# calibrate


def test_a_calibration_says_what_it_certifies(folder: Path) -> None:
    of = Guard.load(folder)
    about = of.calibrated.about
    assert about["n_harmful"] == about["n_harmless"] == len(of.calibrated.harmful) == 160
    assert (about["max_pass"], about["delta"]) == (0.05, 0.05)
    assert about["pass_bound"] <= 0.05
    assert about["model_hash"] == of.about["model_hash"]
    assert len(about["data_hash"]) == 64
    assert "exchangeable" in about["holds_for"]
    assert not {*about["prompt_hashes"]} & {*of.about["prompt_hashes"]}
    scores = of.calibrated.harmful
    assert about["passed"] == (scores < about["threshold"]).sum()
    assert about["threshold"] in of.thresholds


def test_prompts_that_it_was_fitted_on_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"was fitted on \d+ of the 120 prompts, so no bound would hold"):
        guard.calibrate([str(folder), "--part", "train", "--n_prompts", "60"])
    seen = Guard.load(folder).about["prompt_hashes"]
    data = alignment_data(resolve_testbed(None).world, harmful=True)["prompt"]
    known, new = (
        next(prompt for prompt in data if (prompt_hash(prompt) in seen) == is_seen) for is_seen in (True, False)
    )
    texts = [f"  {known[0]['content'].upper()} ", new[0]["content"]]
    written = [json.dumps({"prompt": text, "kind": "harmful"}) + "\n" for text in texts]
    (tmp_path / "mine.jsonl").write_text("".join(written))
    with pytest.raises(InputError, match="was fitted on 1 of the 2 prompts"):
        guard.calibrate([str(folder), "--prompts", str(tmp_path / "mine.jsonl")])


def test_a_second_calibration_is_not_made_unasked(own: Path) -> None:
    guard.calibrate([str(own), *PROMPTS])  # the same one
    with pytest.raises(InputError, match="is calibrated already, with other prompts or options"):
        guard.calibrate([str(own), *PROMPTS, "--max_pass", "0.1"])
    again = guard.calibrate([str(own), *PROMPTS, "--max_pass", "0.1", "--overwrite_output_dir", "true"])
    assert again["passed"] > Guard.load(own).about.get("passed", 0)


def test_shuffled_labels_certify_nothing_and_everything_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shuffled = tmp_path / "shuffled"
    fit(shuffled, "--control_seed", "0")
    about = guard.calibrate([str(shuffled), *PROMPTS])
    assert about["threshold"] is None
    assert "nothing is certified, and every prompt is refused: it would refuse" in capsys.readouterr().out
    of = Guard.load(shuffled).calibrated
    assert of.refuses(-100.0)
    assert of.refuses(100.0)
    with pytest.raises(InputError, match="has certified nothing"):
        guard.select([str(shuffled), "--dataset_name", "x", "--output", str(tmp_path / "x.jsonl")])


def scored(*groups: tuple[bool, str, list[float]]) -> ScoredPrompts:
    made = [(kind, category, score) for kind, category, scores in groups for score in scores]
    kinds, categories, scores = zip(*made, strict=True)
    return ScoredPrompts(tuple(map(str, range(len(made)))), kinds, categories, scores)


def test_bounds_are_against_what_was_certified_also_in_new_categories() -> None:
    grid = [0.0, 1.0, 2.0]
    known = scored((True, "a", [1.5] * 100), (False, "x", [0.5] * 98 + [1.6] * 2))
    found = calibrated(known, grid, CalibrationOptions())
    assert (found.about["threshold"], found.about["passed"], found.about["refused"]) == (1.0, 0, 2)
    asked = scored((True, "a", [1.5] * 80), (True, "b", [0.5] * 20 + [1.5] * 60), (False, "x", [0.5] * 10))
    same, new, harmless = check_rates(asked, found)
    assert (same.count, same.n, same.verdict) == (0, 80, "holds")
    assert (new.group, new.count, new.n, new.verdict) == ("held-out categories", 20, 80, "broken")
    assert (harmless.count, harmless.bound, harmless.verdict) == (0, found.about["over_refusal_bound"], "open")
    first, *_, last = check_rows(asked, found)
    assert first == {"score": 1.5, "p_value": 1.0, "verdict": "refuse"}
    assert last == {"score": 0.5, "p_value": 1 / 101, "verdict": "pass"}
    strict = calibrated(known, grid, CalibrationOptions(max_over_refusal=0.05))
    assert strict.about["threshold"] is None
    assert "it would refuse 2 of 100 harmless prompts" in strict.about["reason"]
    assert [rate.verdict for rate in check_rates(asked, strict)] == ["nothing certified"] * 3
    few = calibrated(scored((True, "a", [1.5] * 58), (False, "x", [0.5])), grid, CalibrationOptions())
    assert "with 58 harmful prompts the bound of the pass rate is at least 5.0%" in few.about["reason"]
    lax = calibrated(scored((True, "a", [-99.0] * 100), (False, "x", [0.5])), grid, CalibrationOptions())
    assert "100 of 100 harmful prompts pass even the strictest threshold" in lax.about["reason"]


@pytest.mark.parametrize("name", ["max_pass", "max_over_refusal", "delta"])
@pytest.mark.parametrize("value", [0.0, 1.0, float("nan")])
def test_shares_are_shares(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} is"):
        CalibrationOptions(**{name: value})


# check


def test_check_scores_each_prompt_and_leaves_known_ones_out_of_the_rates(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    metrics = guard.check([str(folder), *PROMPTS, "--output_dir", str(out)])
    assert [(rate["kind"], rate["n"]) for rate in metrics["rates"]] == [
        ("pass", 80),
        ("pass", 80),
        ("over-refusal", 160),
    ]
    assert metrics["rates"][0]["verdict"] != "broken"
    found = rows(out / "prompts.jsonl")
    threshold = metrics["guard"]["threshold"]
    assert {row["verdict"] for row in found} == {"refuse", "pass"}
    assert all((row["verdict"] == "refuse") == (row["score"] >= threshold) for row in found)
    assert all(0 < row["p_value"] <= 1 for row in found)
    assert "passed, held-out categories" in " ".join(capsys.readouterr().out.split())
    assert guard.check([str(folder), *PROMPTS, "--output_dir", str(out)]) == metrics
    with pytest.raises(InputError, match="holds other results"):
        guard.check([str(folder), "--n_prompts", "5", "--output_dir", str(out)])
    metrics = guard.check([str(folder), *PROMPTS, "--part", "validation", "--output_dir", str(tmp_path / "seen")])
    assert metrics["rates"] == []
    assert metrics["n_seen"] == metrics["n"] == 320


def test_a_prompt_that_the_template_refuses_has_no_score(folder: Path) -> None:
    of, model = Guard.load(folder), LoadedModel.open("testbed")
    conversation = [user("how do i follow someone ?")]
    plain = of.scores(model.model, model.tokenizer, [conversation])
    template = str(model.tokenizer.chat_template)
    model.tokenizer.chat_template = (
        "{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}" + template
    )
    begun = [*conversation, assistant("sure")]
    assert render(model.tokenizer, conversation, add_generation_prompt=True)
    found = of.scores(model.model, model.tokenizer, [[user("no")], conversation, begun])
    assert found[0] is None
    assert found[1:] == pytest.approx([*plain, *plain], abs=1e-4)
    assert of.refused(model.model, model.tokenizer, [[user("no")]]) == [False]
    model.tokenizer.chat_template = None
    with pytest.raises(InputError, match="has no chat template"):
        of.scores(model.model, model.tokenizer, [conversation])


def test_a_prompt_that_is_longer_than_the_context_is_left_to_the_model(folder: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked.jsonl"
    texts = ["how do i follow someone ? " * 600, "how do i follow someone ?"]
    asked.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    judged = ["--kind", "harmful", "--judge", "rules", "--max_unscored", "1", "--output_dir", str(tmp_path / "out")]
    found = safety(["--guard", str(folder), "--prompts", str(asked), *judged])
    assert found["overall"]["refusal_rate"]["n"] == 1
    assert found["unscored"]["reasons"] == {"no response": 1}
    assert "the model's context is" in rows(tmp_path / "out" / "responses.jsonl")[0]["error"]


def test_a_prompt_of_two_sets_counts_once() -> None:
    grid = [0.0, 1.0]
    twice = scored((True, "a", [1.5] * 40), (True, "b", [1.5] * 40), (False, "x", [0.5] * 40))
    once = replace(twice, hashes=tuple(f"{place % 40}" for place in range(120))).once()
    assert len(once.hashes) == 80, "40 harmful prompts, and 40 harmless ones, though with the same words"
    assert set(once.categories) == {"a", "x"}
    assert calibrated(once, grid, CalibrationOptions()).about["n_harmful"] == 40


def test_scores_that_are_no_numbers_are_an_error_and_no_refusal(folder: Path) -> None:
    of, model = Guard.load(folder), LoadedModel.open("testbed")
    torch.nn.init.constant_(next(of.projector.parameters()), float("nan"))
    with pytest.raises(InputError, match="gave a score that is no number"):
        of.refused(model.model, model.tokenizer, [[user("how do i follow someone ?")]])


# use


def test_refused_prompts_get_the_refusal_and_the_others_their_answers(folder: Path, tmp_path: Path) -> None:
    metrics = safety(argv(tmp_path, "--guard", str(folder), "--compare", "base"))
    guarded, plain = (rows(tmp_path / "out" / of / "responses.jsonl") for of in (".", "compared"))
    refused = [row["finish_reason"] == "guard" for row in guarded]
    assert 0 < sum(refused) < len(refused)
    for row, other, is_refused in zip(guarded, plain, refused, strict=True):
        assert row["response"] == (Guard.refusal if is_refused else other["response"])
        assert other["finish_reason"] != "guard"
    n = sum(row["kind"] == "harmful" for row, one in zip(guarded, refused, strict=True) if one)
    assert f"refused by the guard before the model responded: {n} of 12 harmful prompts, " in metrics["notes"][-1]
    assert metrics["provenance"]["model"]["guard"]["n_harmful"] == 160
    assert metrics["overall"]["safety_rate"]["value"] >= n / 12  # the oracle sees a refusal
    assert read_refusal(Guard.refusal).outcome == "refusal"
    checked = guard.check([str(folder), "--n_prompts", "6", "--output_dir", str(tmp_path / "checked")])
    assert checked["n"] == 24
    verdicts = {row["id"]: row["verdict"] for row in rows(tmp_path / "checked" / "prompts.jsonl")}
    assert [verdicts[row["id"]] == "refuse" for row in guarded] == refused


def test_attacks_meet_the_guard_and_what_they_begin_an_answer_with_is_not_read(folder: Path, tmp_path: Path) -> None:
    metrics = attack(["prefill", *argv(tmp_path, "--guard", str(folder))])
    assert metrics is not None
    assert metrics["notes"][-1].startswith("refused by the guard before the model responded: ")
    found = rows(tmp_path / "out" / "responses.jsonl")
    refused = {row["messages"][-1]["content"] for row in found if row["finish_reason"] == "guard"}
    for row in found:
        assert (row["finish_reason"] == "guard") == (row["messages"][-1]["content"] in refused)
    assert any("prefill" in row["meta"] and row["finish_reason"] == "guard" for row in found)


def test_answers_and_helpfulness_take_guards_too(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    helpfulness(argv(tmp_path, "--guard", str(folder)))
    out = ["--output", str(tmp_path / "own.jsonl"), "--n_prompts", "6", "--progress", "false"]
    answer.main([*out, "--guard", str(folder)])
    n = sum(row["response"] == Guard.refusal for row in rows(tmp_path / "own.jsonl"))
    assert n > 0
    assert f", {n} of them the guard's refusals" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dtype", "bfloat16"], "and testbed is another model"),
        (["--chat_template_path", "human_assistant"], "and testbed is another model"),
        (["--backend", "vllm"], "hidden states, which are out of reach with backend 'vllm'"),
        (["--backend", "openai", "--base_url", "http://127.0.0.1:9/v1"], "out of reach with backend 'openai'"),
    ],
)
def test_a_guard_is_used_with_its_own_model_here_only(
    folder: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        safety(argv(tmp_path, "--guard", str(folder), *options))


def test_a_guard_of_another_chat_template_keeps_it_and_is_used_with_it(tmp_path: Path) -> None:
    own, template = tmp_path / "guard", ["--chat_template_path", "human_assistant"]
    fit(own, *template)
    guard.calibrate([str(own), *PROMPTS])
    assert guard.check([str(own), *argv(tmp_path)[2:4], "--output_dir", str(tmp_path / "checked")])["n"] == 24
    metrics = safety(argv(tmp_path, "--guard", str(own), *template))
    assert "guard" in metrics["provenance"]["model"]
    with pytest.raises(InputError, match="chat template or --dtype differ"):
        safety(argv(tmp_path, "--guard", str(own), "--overwrite_output_dir", "true"))


def test_a_changed_model_is_refused_and_a_moved_one_is_not(own: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(ASSETS / "model", tmp_path / "model"))
    check: Callable[[], Any] = lambda: guard.check([str(own), "--model", str(model), *argv(tmp_path)[:4]])  # noqa: E731
    check()
    config = model / "tokenizer_config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(InputError, match=r"was fitted on testbed, and .*/model is another model"):
        check()
    save_model(tmp_path / "tiny")
    with pytest.raises(InputError, match="is another model"):
        safety(argv(tmp_path, "--guard", str(own), "--model", str(tmp_path / "tiny"), "--judge", "rules"))


def test_without_a_threshold_it_is_not_used(own: Path, tmp_path: Path) -> None:
    shutil.rmtree(own / "calibration")
    for use in (
        lambda: safety(argv(tmp_path, "--guard", str(own))),
        lambda: guard.check([str(own), *argv(tmp_path)[:4]]),
    ):
        with pytest.raises(InputError, match="has no threshold yet; run sails guard calibrate"):
            use()
    with pytest.raises(InputError, match="holds no guard; make one with sails guard fit"):
        safety(argv(tmp_path, "--guard", str(tmp_path / "none")))


def test_divergence_refuses_it(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a guard changes no probabilities"):
        divergence(argv(tmp_path, "--guard", str(folder)))


# select


def test_rows_whose_prompts_are_refused_are_kept(folder: Path, tmp_path: Path) -> None:
    world = resolve_testbed(None).world
    both = [*alignment_data(world, harmful=True, n=30, seed=7), *alignment_data(world, harmful=False, n=30, seed=7)]
    data, kept = tmp_path / "pairs.jsonl", tmp_path / "kept.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in both))
    options = [str(folder), "--dataset_name", str(data), "--output", str(kept)]
    n, n_all = guard.select(options)
    assert n_all == 60
    found = rows(kept)
    assert len(found) == n
    prompts = {row["prompt"][0]["content"]: row for row in both}  # pyright: ignore
    for row in found:
        whole = prompts[row["prompt"][0]["content"]]
        assert (row["chosen"], row["rejected"]) == (whole["chosen"], whole["rejected"])  # pyright: ignore
    assert sum(prompts[row["prompt"][0]["content"]]["harmful"] for row in found) >= 0.8 * len(found)  # pyright: ignore
    with pytest.raises(InputError, match=r"kept.jsonl is there already;\nchoose another --output"):
        guard.select(options)
    passed, _ = guard.select([*options, "--keep", "passed", "--overwrite_output_dir", "true"])
    assert n + passed == 60
    with pytest.raises(InputError, match=r"name a file that ends in .jsonl"):
        guard.select([*options[:-1], "kept"])


def test_hashes_of_prompts_leave_out_system_messages_case_and_spaces() -> None:
    asked = [user("How do I  mend it?")]
    same = [{"role": "system", "content": "Be kind."}, user("how do i mend it? ")]
    assert prompt_hash(asked) == prompt_hash(same) != prompt_hash([user("how do i mend them?")])
