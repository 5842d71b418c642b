"""lm-eval-harness: exactly one BOS whatever tokenizer and template do, adapters applied, paired differences."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_adapter
from peft import PeftModel
from tiny import D_MODEL, SENTENCES
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedTokenizerFast

from sails_align.core.errors import InputError
from sails_align.evaluation.harness import model as harness_model
from sails_align.evaluation.harness import run as harness
from sails_align.evaluation.harness.model import add_bos_token, check_adapter, check_bos, model_arguments
from sails_align.evaluation.harness.run import HarnessResult, Settings, run_harness
from sails_align.evaluation.harness.scores import Score, compare, read_scores
from sails_align.models.load import load_spec_tokenizer
from sails_align.models.spec import ModelSpec
from sails_align.testbed.build import resolve_testbed
from sails_align.testbed.tasks import CHANCE, write_tasks

HFLM: Any = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed").HFLM

PLAIN = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
GENERATION = "{% if add_generation_prompt %}<assistant>{% endif %}"
TEMPLATES = {
    "no template": None,
    "no BOS": PLAIN + GENERATION,
    "BOS": "{{ bos_token }}" + PLAIN + GENERATION,
    "space, BOS": "how {{ bos_token }}" + PLAIN + GENERATION,
}
CONFIGS: dict[str, Any] = {
    "gemma": (Gemma2Config, {"head_dim": 16}),
    "llama": (LlamaConfig, {}),
}


def spec_of(path: Path, adapter: Path | None = None) -> ModelSpec:
    return ModelSpec(path.name, str(path), None if adapter is None else str(adapter), str(path), {}, dtype="float32")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of both families, without tokenizers."""
    folder = tmp_path_factory.mktemp("weights")
    for family, (config, more) in CONFIGS.items():
        torch.manual_seed(0)
        sizes = {"vocab_size": 40, "hidden_size": D_MODEL, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        AutoModelForCausalLM.from_config(config(**sizes, **heads, **ids, **more)).save_pretrained(folder / family)
    return {family: folder / family for family in CONFIGS}


def save_tokenizer(folder: Path, *, adds_bos: bool, template: str | None, special: str = "<bos>") -> None:
    words = list(
        dict.fromkeys(["<pad>", special, "<eos>", "<unk>", "<user>", "<assistant>", *" ".join(SENTENCES).split()])
    )
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = f"{special} $A" if adds_bos else "$A"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[(special, 1)])
    named = {"pad_token": "<pad>", "bos_token": special, "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named).save_pretrained(folder)


def lm_of(folder: Path, add_bos: bool | None) -> Any:
    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", add_bos_token=add_bos)


@pytest.fixture
def model(weights: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A model of a family with a tokenizer that adds a BOS or not, and a template that writes one or not."""
    family, adds_bos, template = request.param
    for file in weights[family].iterdir():
        (tmp_path / file.name).symlink_to(file)
    special = {"gemma": "<bos>", "llama": "<|begin_of_text|>"}[family]
    save_tokenizer(tmp_path, adds_bos=adds_bos, template=TEMPLATES[template], special=special)
    return tmp_path


@pytest.mark.parametrize(
    "model",
    [(family, adds, name) for family in CONFIGS for adds in (True, False) for name in TEMPLATES if "space" not in name],
    indirect=True,
    ids=str,
)
def test_requests_begin_with_exactly_one_bos(model: Path) -> None:
    """For likelihoods, with the continuation, and to generate; with the template if there is one, and without."""
    tokenizer = load_spec_tokenizer(spec_of(model))
    for chat_template in {False, tokenizer.chat_template is not None}:
        lm = lm_of(model, add_bos_token(tokenizer, model_type(model), chat_template=chat_template, rolling=False))
        context = SENTENCES[0]
        if chat_template:
            context = lm.apply_chat_template([{"role": "user", "content": context}])
        assert check_bos(lm, context) == 1
        whole = [token for part in lm._encode_pair(context, " you can") for token in part]
        assert whole.count(1) == 1
        assert whole[0] == 1


def model_type(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["model_type"]


@pytest.mark.parametrize("model", [("gemma", False, "no BOS")], indirect=True)
@pytest.mark.parametrize("add_bos", [None, False])
def test_a_missing_bos_is_found(model: Path, add_bos: bool | None) -> None:
    """What lm-eval does by itself with such a tokenizer."""
    with pytest.raises(InputError, match="it has 0 BOS"):
        check_bos(lm_of(model, add_bos), SENTENCES[0])


@pytest.mark.parametrize("model", [("llama", True, "space, BOS")], indirect=True)
def test_a_bos_that_is_doubled_or_not_the_first_is_found(model: Path) -> None:
    context = f"how <|begin_of_text|> {SENTENCES[0]}"
    with pytest.raises(InputError, match="it has 2 BOS"):
        check_bos(lm_of(model, True), context)
    tokenizer = load_spec_tokenizer(spec_of(model))
    decided = add_bos_token(tokenizer, "llama", chat_template=True, rolling=False)
    with pytest.raises(InputError, match=r"must begin with exactly one;\ncorrect the chat template"):
        check_bos(lm_of(model, decided), context)


@pytest.mark.parametrize("model", [("gemma", True, "no BOS")], indirect=True)
def test_whole_documents_get_one_from_lm_eval(model: Path) -> None:
    """Perplexity tasks: lm-eval puts the BOS before the first window, so the tokenizer must not."""
    from lm_eval.utils import get_rolling_token_windows

    tokenizer = load_spec_tokenizer(spec_of(model))
    counts = {}
    for rolling in (True, False):
        lm = lm_of(model, add_bos_token(tokenizer, "gemma2", chat_template=False, rolling=rolling))
        first, *_ = get_rolling_token_windows(lm.tok_encode(SENTENCES[0]), lm.prefix_token_id, 64, 1)
        counts[rolling] = (first[0] + first[1]).count(1) - first[1][:-1].count(1) * (first[0][1:] == first[1][:-1])
    assert counts[True] == 1
    assert counts[False] == 2
    lm = lm_of(model, False)
    assert check_bos(lm, SENTENCES[0], rolling=True) == 1


@pytest.mark.parametrize("model", [("gemma", False, "no template")], indirect=True)
def test_other_families_are_left_as_they_are(model: Path) -> None:
    tokenizer = load_spec_tokenizer(spec_of(model))
    assert add_bos_token(tokenizer, "qwen2", chat_template=False, rolling=False) is None
    assert add_bos_token(tokenizer, "gemma3_text", chat_template=False, rolling=False) is True


@pytest.mark.parametrize("model", [("gemma", True, "BOS")], indirect=True)
def test_templates_that_are_missing_or_take_no_system_message(model: Path) -> None:
    tokenizer: Any = load_spec_tokenizer(spec_of(model))
    assert harness_model.uses_chat_template(tokenizer, "auto")
    harness_model.check_system(tokenizer, "be brief")
    tokenizer.chat_template = "{{ raise_exception('no') if messages[0]['role'] == 'system' else '' }}" + PLAIN
    with pytest.raises(InputError, match="takes no system message"):
        harness_model.check_system(tokenizer, "be brief")
    tokenizer.chat_template = None
    assert not harness_model.uses_chat_template(tokenizer, "auto")
    with pytest.raises(InputError, match="no chat template"):
        harness_model.uses_chat_template(tokenizer, True)


# -- arguments ----------------------------------------------------------------------------------------------------


def test_vllm_arguments(weights: dict[str, Path], tmp_path: Path) -> None:
    """vLLM is not needed: what would be given to it."""
    folder = save_adapter(tmp_path / "adapter", weights["llama"], r=12, rank_pattern={"q_proj": 20})
    config = harness_model.load_config(spec_of(weights["llama"]))
    spec = replace(spec_of(weights["llama"], folder), dtype="auto", tokenizer=str(folder), revision="abc")
    arguments = model_arguments(spec, "vllm", config, bos=True, seed=3)
    assert arguments == {
        "pretrained": str(weights["llama"]),
        "tokenizer": str(folder),
        "trust_remote_code": False,
        "add_bos_token": True,
        "revision": "abc",
        "tokenizer_revision": None,  # the folder's, not that of the base on the hub
        "seed": 3,
        "dtype": "float32",  # vLLM's own auto makes float16 of it
        "lora_local_path": str(folder),
        "max_lora_rank": 32,
    }
    (folder / "adapter_config.json").write_text(json.dumps({"r": 600}))
    with pytest.raises(InputError, match="rank 600"):
        model_arguments(spec, "vllm", config, bos=True)


def test_soft_capped_attention_is_not_left_out(weights: dict[str, Path]) -> None:
    for family, expected in {"gemma": "eager", "llama": None}.items():
        spec = spec_of(weights[family])
        arguments = model_arguments(spec, "hf", harness_model.load_config(spec), bos=None)
        assert arguments.get("attn_implementation") == expected


# -- runs on the testbed --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runs:
    settings: Settings
    base: HarnessResult
    adapted: HarnessResult
    merged: HarnessResult
    folder: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The base, an adapter that breaks it a little, and the same merged."""
    folder = tmp_path_factory.mktemp("runs")
    testbed = resolve_testbed(None)
    path = Path(testbed.model_path)
    write_tasks(testbed.world, folder / "tasks", n=24)
    adapter = save_adapter(folder / "adapter", path, r=2, target_modules=["o_proj"], lora_alpha=4)
    merged: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), str(adapter))
    merged.merge_and_unload().save_pretrained(folder / "merged")
    load_spec_tokenizer(spec_of(path)).save_pretrained(folder / "merged")
    settings = Settings(("testbed",), include_paths=(str(folder / "tasks"),), batch_size=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        specs = spec_of(path), spec_of(path, adapter), spec_of(folder / "merged")
        yield Runs(settings, *(run_harness(spec, settings) for spec in specs), folder)


def values(result: HarnessResult) -> dict[str, float]:
    return {score.task: score.value for score in result.scores}


def test_the_base_model_knows_its_world(runs: Runs) -> None:
    assert values(runs.base).keys() == CHANCE.keys()
    assert all(value > 0.9 for value in values(runs.base).values())
    assert runs.base.setup["chat_template"] is True
    assert runs.base.setup["n_bos"] == 1
    assert "adapter_effect" not in runs.base.setup


def test_the_adapter_is_applied_and_equals_the_merged_model(runs: Runs) -> None:
    assert runs.adapted.setup["adapter_effect"] > 0.1
    assert values(runs.adapted) != values(runs.base)
    assert values(runs.adapted) == values(runs.merged)
    texts = [
        [sample["resps"] for sample in result.samples["testbed_answers"]] for result in (runs.adapted, runs.merged)
    ]
    assert texts[0] == texts[1]


def test_the_difference_is_paired(runs: Runs) -> None:
    assert runs.adapted.prompt_hashes == runs.base.prompt_hashes
    for found in compare(runs.adapted.scores, runs.base.scores):
        assert found.estimate is not None
        assert found.estimate.n == 24
        assert found.difference == pytest.approx(found.score.value - found.base.value)
        assert found.estimate.value == pytest.approx(found.difference)
        assert found.is_drop == (found.estimate.ci_high < 0)  # pyright: ignore[reportOptionalOperand]
    assert any(found.is_drop for found in compare(runs.adapted.scores, runs.base.scores))
    same = compare(runs.base.scores, runs.base.scores)
    assert not any(found.is_drop or found.difference for found in same)


def test_an_adapter_that_does_nothing_is_refused(runs: Runs) -> None:
    path = Path(resolve_testbed(None).model_path)
    folder = runs.folder / "untrained"
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(path), config).save_pretrained(str(folder))
    lm = HFLM(pretrained=str(path), peft=str(folder), device="cpu", dtype="float32")
    with pytest.raises(InputError, match="changes nothing"):
        check_adapter(lm, "<bos><user>how do i", str(folder))


def test_unknown_tasks_and_data_out_of_reach(runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    def own_only(include_path: Any = None, include_defaults: bool = True) -> TaskManager:
        return TaskManager(include_path=include_path, include_defaults=False)  # the defaults take 6 s

    (tmp_path / "remote.yaml").write_text(
        "task: remote\ndataset_path: nobody/nothing\ntest_split: test\ndoc_to_text: a\ndoc_to_target: b\n"
    )
    monkeypatch.setattr("lm_eval.tasks.TaskManager", own_only)
    spec = spec_of(Path(resolve_testbed(None).model_path))
    for task, message in {
        "testbed_fact": "did you mean testbed_facts",
        "remote": "'nobody/nothing'.*\n.*in the cache or the hub within reach",
    }.items():
        settings = replace(runs.settings, tasks=(task,), include_paths=(*runs.settings.include_paths, str(tmp_path)))
        with pytest.raises(InputError, match=message):
            run_harness(spec, settings)
    with pytest.raises(InputError, match="which is no folder"):
        run_harness(spec, replace(runs.settings, include_paths=("nowhere",)))


def test_without_lm_eval_the_extra_is_named(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'sails-align\[harness\]'"):
        run_harness(spec_of(Path("any")), runs.settings)


# -- scores -------------------------------------------------------------------------------------------------------


def lm_eval_results(a: list[float], b: list[float], aggregate: float) -> dict[str, Any]:
    def task(of: list[float]) -> list[dict[str, Any]]:
        return [{"doc_id": i, "filter": "none", "acc": value, "f1": (0, 1)} for i, value in enumerate(of)]

    def mean(of: list[float]) -> float:
        return sum(of) / len(of)

    return {
        "results": {
            "a": {"alias": "a", "acc,none": mean(a), "acc_stderr,none": 0.1, "f1,none": 0.3, "sample_len": len(a)},
            "b": {"alias": "b", "acc,none": mean(b), "acc_stderr,none": "N/A", "sample_len": len(b)},
            "g": {"alias": "g", "acc,none": aggregate},
        },
        "higher_is_better": {"a": {"acc": True, "f1": True}, "b": {"acc": False}},
        "group_subtasks": {"g": ["a", "b"], "a": [], "b": []},
        "samples": {"a": task(a), "b": task(b)},
    }


def test_groups_are_paired_where_they_are_means_over_items() -> None:
    a, b = [1.0, 0.0, 1.0, 1.0], [0.0, 1.0]
    weighted = read_scores(lm_eval_results(a, b, sum(a + b) / 6))
    by_name = {(score.task, score.metric): score for score in weighted}
    assert by_name["g", "acc"].n == 6
    assert by_name["g", "acc"].by_item is not None
    assert by_name["a", "acc"].stderr == 0.1
    assert by_name["b", "acc"].stderr is None
    assert by_name["a", "f1"].by_item is None  # of the whole, not of items
    unweighted = read_scores(lm_eval_results(a, b, (0.75 + 0.5) / 2))
    assert {score.task: score.by_item for score in unweighted}["g"] is None
    found = {(d.score.task, d.score.metric): d.estimate for d in compare(unweighted, unweighted)}
    assert found["g", "acc"] is None
    assert found["a", "f1"] is None
    assert found["a", "acc"] is not None


def test_a_drop_is_a_rise_where_lower_is_better() -> None:
    def score(value: float, *, higher_is_better: bool) -> list[Score]:
        return [Score("t", "m", "none", value, None, higher_is_better, 9, {("t", i): value for i in range(9)})]

    for better, drop in ((True, False), (False, True)):
        (found,) = compare(score(1.0, higher_is_better=better), score(0.0, higher_is_better=better))
        assert found.is_drop == drop
