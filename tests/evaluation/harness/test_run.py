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
from sails_align.evaluation.harness.model import add_bos_token, check_adapter, check_bos, hf_lm, load_lm
from sails_align.evaluation.harness.options import HarnessArguments
from sails_align.evaluation.harness.run import run_harness, run_in_memory
from sails_align.evaluation.harness.scores import HarnessResult, Score, read_scores
from sails_align.models.load import load_model, load_spec_tokenizer
from sails_align.models.spec import ModelSpec
from sails_align.testbed.build import resolve_testbed
from sails_align.testbed.tasks import CHANCE, write_tasks

pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")

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
    spec = spec_of(folder)
    return hf_lm(load_model(spec), load_spec_tokenizer(spec), add_bos, "1")


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
        check_bos(lm, context)
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
    check_bos(lm, SENTENCES[0], rolling=True)


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
        harness_model.uses_chat_template(tokenizer, "true")


@pytest.mark.parametrize("model", [("gemma", True, "BOS"), ("llama", True, "BOS")], indirect=True)
def test_soft_capped_attention_is_not_left_out(model: Path) -> None:
    spec = spec_of(model)
    expected = "eager" if model_type(model) == "gemma2" else "sdpa"
    with load_lm(spec, HarnessArguments(), load_spec_tokenizer(spec), None) as lm:
        assert lm.model.config._attn_implementation == expected


# -- runs on the testbed --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runs:
    args: HarnessArguments
    tasks: str
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
    args, tasks = HarnessArguments(["testbed"], batch_size="24"), str(folder / "tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        specs = spec_of(path), spec_of(path, adapter), spec_of(folder / "merged")
        yield Runs(args, tasks, *(run_harness(spec, args, [tasks]) for spec in specs), folder)


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


def test_a_model_in_memory_has_the_scores_of_one_that_is_loaded(runs: Runs) -> None:
    """Whatever its generation_config.json says of generating: lm-eval passes on only what a task says."""
    spec = spec_of(runs.folder / "merged")
    model = load_model(spec)
    others = {"repetition_penalty": 9.0, "num_beams": 2, "stop_strings": ["a"], "suppress_tokens": list(range(9, 40))}
    vars(model.generation_config).update(others)
    result = run_in_memory(model, load_spec_tokenizer(spec), runs.args, [runs.tasks])
    assert result.scores == runs.merged.scores
    assert result.setup == runs.merged.setup
    texts = [[sample["resps"] for sample in of.samples["testbed_answers"]] for of in (result, runs.merged)]
    assert texts[0] == texts[1]
    assert model.generation_config.num_beams == 2


def test_the_difference_is_paired(runs: Runs) -> None:
    assert runs.adapted.prompt_hashes == runs.base.prompt_hashes
    drops = []
    for score, base in zip(runs.adapted.scores, runs.base.scores, strict=True):
        assert (score.task, score.name) == (base.task, base.name)
        found = score.minus(base)
        difference = found["difference"]
        assert difference["n"] == 24
        assert difference["value"] == pytest.approx(score.value - base.value)
        assert difference["ci_low"] <= difference["value"] <= difference["ci_high"]
        assert found["is_drop"] == (difference["ci_high"] < 0)
        drops.append(found["is_drop"])
        same = base.minus(base)
        assert not same["is_drop"]
        assert not same["difference"]["value"]
    assert any(drops)


def test_the_chance_is_what_the_task_says(runs: Runs) -> None:
    assert {score.task: score.chance for score in runs.base.scores} == CHANCE


def test_an_adapter_that_does_nothing_is_refused(runs: Runs) -> None:
    path = Path(resolve_testbed(None).model_path)
    folder = runs.folder / "untrained"
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(path), config).save_pretrained(str(folder))
    spec = spec_of(path, folder)
    lm = hf_lm(load_model(spec), load_spec_tokenizer(spec), False, "1")
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
        "testbed_fact": "did you mean 'testbed_facts'",
        "remote": "'nobody/nothing'.*\n.*in the cache or the hub within reach",
    }.items():
        with pytest.raises(InputError, match=message):
            run_harness(spec, replace(runs.args, tasks=[task]), [runs.tasks, str(tmp_path)])
    with pytest.raises(InputError, match="which is no folder"):
        run_harness(spec, runs.args, ["nowhere"])


def test_without_lm_eval_the_extra_is_named(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'sails-align\[harness\]'"):
        run_harness(spec_of(Path("any")), runs.args)


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
        "configs": {"a": {"metadata": {"chance": 0.25}}, "b": {"metadata": {"chance": "1/2"}}},
    }


def test_groups_are_paired_where_they_are_means_over_items() -> None:
    a, b = [1.0, 0.0, 1.0, 1.0], [0.0, 1.0]
    weighted = read_scores(lm_eval_results(a, b, sum(a + b) / 6))
    by_name = {(score.task, score.name): score for score in weighted}
    assert by_name["g", "acc,none"].n == 6
    assert by_name["g", "acc,none"].by_item is not None
    assert by_name["a", "acc,none"].stderr == 0.1
    assert by_name["a", "acc,none"].chance == 0.25
    assert by_name["b", "acc,none"].chance is None  # 1/2 is a text in YAML
    assert by_name["b", "acc,none"].stderr is None
    assert by_name["a", "f1,none"].by_item is None  # of the whole, not of items
    unweighted = read_scores(lm_eval_results(a, b, (0.75 + 0.5) / 2))
    assert {score.task: score.by_item for score in unweighted}["g"] is None
    intervals = {(score.task, score.name): score.minus(score)["difference"]["ci_low"] for score in unweighted}
    assert intervals["g", "acc,none"] is None
    assert intervals["a", "f1,none"] is None
    assert intervals["a", "acc,none"] == pytest.approx(-1.96 / 4.5, abs=0.06)  # no difference on four items


def test_a_drop_is_a_rise_where_lower_is_better() -> None:
    def score(value: float, *, higher_is_better: bool) -> Score:
        return Score("t", "m,none", value, None, higher_is_better, 9, {("t", i): value for i in range(9)})

    for better, drop in ((True, False), (False, True)):
        high, low = (score(value, higher_is_better=better) for value in (1.0, 0.0))
        assert high.minus(low)["is_drop"] == drop
        assert low.minus(high)["is_drop"] != drop
