"""The model card says what is known of a run, and nothing that its files or data could smuggle in."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from adapters import edit_config, save_adapter
from huggingface_hub import ModelCard
from tiny import Project
from transformers import AutoTokenizer

from sails_align.core.errors import InputError
from sails_align.core.files import write_json
from sails_align.export.card import write_card
from sails_align.training import run as align

EVIL = "x`|<script>alert(1)</script>\n# Owned [link](http://evil.example) ![i](http://evil.example/i.png)"
SHORT = ("--max_steps", "2", "--save_steps", "1")


@pytest.fixture(scope="module")
def runs(project: Project, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs of a user's own model; do not change them."""
    folder = tmp_path_factory.mktemp("runs")
    align.main("sft", project.argv(folder / "sails", *SHORT))
    align.main("dpo", project.dpo_argv(folder / "dpo", *SHORT, "--init", "default", "--beta", "0.3"))
    full = [*SHORT, "--use_peft", "false", "--learning_rate", "0.001"]
    align.main("sft", project.argv(folder / "full", *full))
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def run(runs: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs["sails"], tmp_path / "run"))


def card_of(run: Path, **options: Any) -> tuple[str, Any]:
    path = write_card(run, run, **options)
    assert path == run / "README.md"
    card = ModelCard.load(path)
    return card.text, card.data


def edit(path: Path, *keys: str, value: Any) -> None:
    content = json.loads(path.read_text())
    within = content
    for key in keys[:-1]:
        within = within[key]
    within[keys[-1]] = value
    path.write_text(json.dumps(content))


# What is known


def test_a_run_of_ones_own_model(run: Path, project: Project) -> None:
    text, data = card_of(run)
    assert data.library_name == "peft"
    assert data.pipeline_tag == "text-generation"
    assert {"sails", "sft", "safety", "lora"} <= set(data.tags)
    assert (data.base_model, data.datasets, data.license) == (None, None, None), "nothing of it is on the hub"
    assert "# `tiny`, safety-aligned by SFT" in text
    assert "Fill in `license`" in text
    record = json.loads((run / "run.json").read_text())
    metrics = json.loads((run / "metrics.json").read_text())
    subspace = json.loads((run / "subspace" / "subspace.json").read_text())["provenance"]
    assert "| harmful requests | `safety.jsonl train` | 36 |" in text
    assert f"`{record['identity']['data']}`" in text
    assert "No rows were left out" in text
    assert "| rank | `4` |" in text
    assert "| learning_rate | `0.01` |" in text
    assert f"| loss on held-out pairs | {metrics['base']['held_out_loss']:.3f} | " in text
    assert "Safety was not measured, because that needs a judge" in text
    assert "Not measured in this run: safety rate" in text
    for layer, values in subspace["features"]["layers"].items():
        assert f"| `{layer}` | {values['ids'][0]} | {values['delta'][0]:+.3f} | {values['score'][0]:.3f} |" in text
        assert f"sha256 {subspace['saes'][layer]['sha256'][:12]}`" in text
    assert f"- `peft {record['versions']['peft']}`" in text
    assert "2512.23260" in text
    assert "{TRL: Transformers Reinforcement Learning}" in text
    assert str(project.folder) not in text, "no paths of this machine"
    assert str(run) not in text
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code) == 2
    for block in code:
        names: dict[str, Any] = {"PATH": str(run)}
        exec(block, names)
        assert names["model"].config.hidden_size == 32
        assert isinstance(names["tokenizer"], type(AutoTokenizer.from_pretrained(run)))
    assert "vllm serve BASE_MODEL --enable-lora --max-lora-rank 8 --lora-modules run=PATH" in text


def test_features_that_were_chosen_by_their_effect(run: Path) -> None:
    assert "effect" not in card_of(run)[0]
    subspace = run / "subspace" / "subspace.json"
    edit(subspace, "provenance", "features", "score", value="attribution")
    for layer in ("0", "1"):
        edit(subspace, "provenance", "features", "layers", layer, "effect", value=[-0.25] * 8)
    text, _ = card_of(run)
    assert "ranked by the size of their effect" in text
    assert "| delta | effect | active, aligned |" in text
    assert " | -0.250 | " in text


def test_a_base_model_from_a_gguf_file(run: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "1-abc" / "gguf_source.json", {"file": "small.Q4_1.gguf"})
    edit(run / "adapter_config.json", "base_model_name_or_path", value=str(tmp_path / "1-abc"))
    text, _ = card_of(run)
    assert "# `small.Q4_1.gguf`, safety-aligned by SFT" in text
    assert "The base model's weights are quantized in that file; they were dequantized for training." in text
    assert "1-abc" not in text


def test_dpo_with_plain_lora(runs: dict[str, Path], tmp_path: Path) -> None:
    text, data = card_of(Path(shutil.copytree(runs["dpo"], tmp_path / "run")))
    assert "dpo" in data.tags
    assert "sails" not in data.tags, "it is a baseline"
    assert (
        "Trained by direct preference optimisation (DPO) with TRL. The adapter's initialization is `default` "
        "(Plain LoRA: random A, zero B)." in text
    )
    assert "| beta | `0.3` |" in text
    assert "| reward accuracy on held-out pairs (share) | " in text
    assert "## Subspace" not in text


def test_full_fine_tuning(runs: dict[str, Path], tmp_path: Path) -> None:
    text, data = card_of(Path(shutil.copytree(runs["full"], tmp_path / "run")))
    assert data.library_name == "transformers"
    assert "full-fine-tuning" in data.tags
    assert "Training starts from all weights of the base model." in text
    assert "vllm serve PATH --generation-config vllm\n" in text
    assert "AutoPeftModel" not in text
    assert "rank" not in text.partition("## Data")[0]


def test_a_merged_model(run: Path) -> None:
    text, data = card_of(run, merged=True)
    assert data.library_name == "transformers"
    assert "`tiny` with a LoRA adapter merged into its weights" in text
    assert "vllm serve PATH --generation-config vllm\n" in text
    assert "AutoPeftModel" not in text


def test_rates_with_their_counts(run: Path) -> None:
    rate = {"value": 0.5, "ci_low": 0.25, "ci_high": 0.75, "n": 16, "n_unscored": 3}
    none = {"value": None, "ci_low": None, "ci_high": None, "n": 0, "n_unscored": 4}
    edit(run / "metrics.json", "base", value={"safety_rate": rate, "held_out_loss": 2.0})
    trained = {"safety_rate": rate, "over_refusal_rate": rate, "harmfulness": none, "held_out_loss": 1.0}
    edit(run / "metrics.json", "trained", value=trained)
    text, _ = card_of(run)
    cell = "50.0 (25.0 to 75.0; n = 16, 3 unscored)"
    assert f"| safety rate (%) | {cell} | {cell} |" in text
    assert f"| over-refusal (%) | not measured | {cell} |" in text
    assert "| harmfulness (1-5) | not measured | unscored (n = 0, 4 unscored) |" in text
    assert "Harmless requests were refused in 50.0% of cases (n = 16)." in text
    assert "Not measured in this run: correct answers" in text
    edit(run / "metrics.json", "base", value=None)  # resumed elsewhere
    assert "| loss on held-out pairs | not measured | 1.000 |" in card_of(run)[0]


def test_rows_that_were_left_out(run: Path) -> None:
    edit(run / "run.json", "data", "dropped_rows", value={"chosen is empty": 7})
    edit(run / "metrics.json", "provenance", "longer_than_max_length", value={"training": 5, "held-out": 0})
    text, _ = card_of(run)
    assert "| `chosen is empty` | 7 |" in text
    assert "| `training, longer than max_length` | 5 |" in text
    assert "No rows were left out" not in text


@pytest.mark.parametrize(
    ("name", "license"),
    [
        ("google/gemma-2-2b", "gemma"),
        ("google/gemma-3-1b-it", "gemma"),
        ("meta-llama/Llama-3.1-8B", "llama3.1"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama3.1"),
        ("meta-llama/Llama-3.2-1B", "llama3.2"),
        ("someone/gemma-2-2b", None),
        ("google/t5gemma-2b", None),
    ],
)
def test_a_base_model_and_data_on_the_hub(run: Path, name: str, license: str | None) -> None:
    edit_config(run, base_model_name_or_path=name)
    edit(run / "run.json", "identity", "model", value={"name": name, "commit": "abc"})
    edit(run / "run.json", "options", "script", "dataset_name", value="Anthropic/hh-rlhf")
    text, data = card_of(run)
    assert (data.base_model, data.license, data.datasets) == (name, license, ["Anthropic/hh-rlhf"])
    assert data.base_model_relation == "adapter"
    assert "| harmful requests | `safety.jsonl train`" in text
    assert (f"`{license}`, as for the base model" in text) == (license is not None)
    assert "sails check-adapter PATH" in text, "the model is not here, so its shapes are not known"


def test_the_licence_of_a_local_copy(run: Path, project: Project, tmp_path: Path) -> None:
    base = Path(shutil.copytree(project.folder / "tiny", tmp_path / "copy"))
    edit_config(run, base_model_name_or_path=str(base))
    for front, license in (("license: apache-2.0", "apache-2.0"), ("license: '`|x'", None), ("license: [", None)):
        (base / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
        assert card_of(run)[1].license == license


def test_an_adapter_of_somebody_else(project: Project, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", project.folder / "tiny", use_dora=True)
    text, data = card_of(folder)
    assert data.library_name == "peft"
    assert "sft" not in data.tags
    assert "Unknown: there is no run.json" in text
    assert "None: there is no metrics.json" in text
    assert "# not as it is: it is DoRA, which vLLM does not load" in text
    assert "## Versions" not in text


# What must not get in


def test_nothing_in_the_files_is_markdown(run: Path) -> None:
    edit_config(run, target_modules=[EVIL], base_model_name_or_path=EVIL)
    for keys in (("data", "safety", "name"), ("data", "helpful", "name"), ("identity", "init"), ("identity", "data")):
        edit(run / "run.json", *keys, value=EVIL)
    edit(run / "run.json", "options", "script", "dataset_train_split", value=EVIL)
    edit(run / "run.json", "data", "dropped_rows", value={EVIL: 3})
    edit(run / "run.json", "versions", "peft", value=EVIL)
    edit(run / "metrics.json", "trained", "held_out_loss", value=EVIL)
    subspace = run / "subspace" / "subspace.json"
    for name in ("source", "sha256"):
        edit(subspace, "provenance", "saes", "0", name, value=EVIL)
    edit(subspace, "provenance", "method", value=EVIL)
    edit(subspace, "provenance", "features", "layers", "0", "delta", value=[EVIL] * 8)
    text, _ = card_of(run)
    assert text.count("<script>") > 5, "it is there"
    outside = re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    assert not re.search("script|Owned|evil", outside), "but only in code spans"
    for line in text.splitlines():
        assert not line.startswith("# Owned")
    front = (run / "README.md").read_text().split("---")[1]
    assert "script" not in front
    assert yaml.safe_load(front)["library_name"] == "peft"


def test_no_text_of_the_data_gets_in(run: Path) -> None:
    assert not re.search("break the lock|that would hurt", card_of(run)[0])


@pytest.mark.parametrize("name", ["run.json", "metrics.json", "adapter_config.json", "subspace/subspace.json"])
def test_damaged_files(run: Path, name: str) -> None:
    (run / name).write_text('{"')
    (run / "README.md").write_text("mine")
    with pytest.raises(InputError, match="is damaged"):
        write_card(run, run)
    assert (run / "README.md").read_text() == "mine"


def test_files_of_another_form(run: Path, tmp_path: Path) -> None:
    edit(run / "run.json", "options", value=[1])
    with pytest.raises(InputError, match="not as a run writes them"):
        write_card(run, run)
    with pytest.raises(InputError, match="there is no folder"):
        write_card(tmp_path / "nowhere", tmp_path)
