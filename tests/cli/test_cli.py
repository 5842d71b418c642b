"""The command `sails`: each of its commands on tiny models and the testbed."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer

from sails_align.cli import COMMANDS, main
from sails_align.cli import train_sae as sae_training
from sails_align.core.errors import InputError
from sails_align.data.loading import load_rows
from sails_align.data.pairs import normalize
from sails_align.evaluation.attacks.options import TESTBED_BUDGET
from sails_align.saes.sets import SAESet
from sails_align.saes.source import SAESource
from sails_align.subspace.basis import Subspace
from sails_align.subspace.options import BY_EFFECT
from sails_align.testbed import build
from sails_align.testbed.build import ASSETS, SAE_LAYERS
from sails_align.training import run as align
from sails_align.training.defaults import COMMON, OWN

SAILS = Path(sys.executable).with_name("sails")
TRAIN_SAE = ["--layers", "1", "--n_tokens", "2000", "--batch_size", "100", "--d_sae", "64", "--k", "4"]
PAIRS = [
    {"prompt": f"how do i mend {i} and {i}", "chosen": f"with care {i}", "rejected": f"never mind {i}"}
    for i in range(60)
]


@pytest.fixture(scope="module")
def testbed() -> build.Testbed:
    return build.load_testbed(ASSETS)


def sails(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SAILS, *argv], capture_output=True, text=True)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def data_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


# Finding commands


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["train"], ["testbed", "--help"]])
def test_help_names_every_command(capsys, argv):
    main(argv)
    printed = capsys.readouterr().out
    assert all(f"\n  {command} " in printed for command in COMMANDS.names())


def test_help_is_quick_and_loads_no_torch():
    started = time.perf_counter()
    ended = sails("--help")
    assert ended.returncode == 0
    assert "usage: sails" in ended.stdout
    assert time.perf_counter() - started < 5, "0.05 s on an idle machine; importing torch and TRL takes longer"
    code = "import sys; from sails_align.cli import main; main(['--help']); print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert printed.splitlines()[-1] == "False"


@pytest.mark.parametrize("argv", [["--help"], ["doctor", "--json"]])
def test_nobody_reads_the_output_as_after_head(argv):
    process = subprocess.Popen([SAILS, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert (process.stderr.read(), process.wait()) == ("", 141)


def test_version():
    ended = sails("--version")
    assert ended.returncode == 0
    assert ended.stdout.startswith("sails-align 0.")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian", "sft"], "there is no command 'trian sft'; did you mean 'train sft'?"),
        (["trian"], "there is no command 'trian'; did you mean 'train'?"),
        (["evl", "safety"], "did you mean 'eval safety'?"),
        (["discovr"], "did you mean 'discover'?"),
        (["train", "sfft"], "did you mean 'train sft'?"),
        (["testbed", "build"], "--output"),
        (["testbed", "build", "--output", "x", "--seed", "-1"], "seed is -1"),
        (["testbed", "build", "--output", "x", "--seed", "one"], "invalid int value: 'one'"),
        (["testbed", "build", "--output", "x", "--shared_harm", "2"], "shared_harm is 2.0"),
        (["train-sae", "--n_tokens", "10"], "--layers"),
    ],
)
def test_commands_that_cannot_be_run(capsys, tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert said in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS.names())
def test_help_of_a_command(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    assert f"usage: sails {command}" in capsys.readouterr().out


def texts_of_help(capsys: pytest.CaptureFixture[str], *command: str) -> dict[str, str]:
    """Return what help says of each option, by name."""
    with pytest.raises(SystemExit):
        main([*command])
    entries = re.findall(r"^  --(\w+)(.*?)(?=^  -|^\S|\Z)", capsys.readouterr().out, re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()) for name, text in entries}


def written(value: object) -> str:
    """A default as help writes it."""
    if value is None or isinstance(value, bool):
        return {None: "all", True: "true", False: "false"}[value]
    return f"{value:g}".replace("e-0", "e-")


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("flag", ["--help", "--help-all"])
def test_help_tells_the_defaults_of_the_testbed_from_those_of_all_models(capsys, method, flag):
    texts = texts_of_help(capsys, "train", method, flag)

    def defaults(*argv):
        plan = align.parse(method, argv)
        return {**vars(plan.model), **vars(plan.training), **vars(plan.data)}

    of_models, of_testbed = defaults("--model_name_or_path", "a/model"), defaults()
    names = {*COMMON, *OWN["testbed"]} - {"lora_target_modules"}
    for name in names & texts.keys():
        said = re.search(r"[Dd]efault: (.+?)(, on the testbed (.+?))?\.$", texts[name])
        expected = [written(of_models[name]), written(of_testbed[name])]
        assert [said[1], said[3] or said[1]] == expected, name
    by_model = ((), ("--model_name_or_path", "a/model"))
    rates = {defaults(*of, *more)["learning_rate"] for of in by_model for more in ((), ("--use_peft", "false"))}
    said = re.sub(r"\(.*?\)", "", texts["learning_rate"])  # without the rate after --adapter_path
    assert {float(rate) for rate in re.findall(r"\d+e-\d+", said)} == rates
    assert flag == "--help" or names <= texts.keys()


def test_help_of_a_search_tells_the_testbeds_budget(capsys):
    texts = texts_of_help(capsys, "attack", "gcg", "--help")
    for name, value in TESTBED_BUDGET.items():
        assert f"for the testbed's prompts {value}." in texts[name]
    assert "Default: 500" in texts["n_steps"]


# discover


def test_discover_then_train_finds_the_subspace_there(capsys, tmp_path, testbed):
    """What `discover` saves is what training with the same options starts in; it is not looked for again."""
    options = ["--model_name_or_path", str(testbed.folder), "--output_dir", str(tmp_path), "--top_k", "12"]
    options += ["--disable_tqdm", "true", "--eval_examples", "4", "--max_steps", "1"]
    main(["discover", *options, "--n_shown", "10", "--n_texts", "32"])
    printed = capsys.readouterr().out
    subspace = Subspace.load(tmp_path / "subspace")
    for layer, basis_DR in subspace.bases.items():
        chosen = subspace.provenance["features"]["layers"][str(layer)]
        assert f"layer {layer}: 12 features -> {basis_DR.shape[1]} PCA directions" in printed
        assert f" {chosen['ids'][0]} " in printed
        assert f"{chosen['delta'][0]:+.3f}" in printed
    assert "for modules that write" in printed
    told = json.loads((tmp_path / "discovered.json").read_text())
    assert len(told) == 12 * len(subspace.bases) * 2
    for feature in told:
        assert len(feature["promoted"]) == 6
        if feature["id"] == subspace.provenance["features"]["layers"]["3"]["ids"][0] and feature["layer"] == 3:
            assert " ".join(feature["promoted"][:2]) in printed
            best = feature["contexts"][0]
            assert (
                f"[{best['tokens'][max(range(len(best['tokens'])), key=best['activations'].__getitem__)]}]" in printed
            )
    assert "and 2 more, in discovered.json" in printed
    assert f"{tmp_path}/subspace/" in printed.replace("\n", "")
    before = (tmp_path / "subspace" / "subspace.json").stat().st_mtime_ns
    main(["train", "sft", *options])
    assert (tmp_path / "subspace" / "subspace.json").stat().st_mtime_ns == before
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["provenance"]["options"]["sails"]["top_k"] == 12
    assert "trained" in capsys.readouterr().out


@pytest.mark.parametrize("score", BY_EFFECT)
def test_discover_by_effect(capsys, tmp_path, testbed, score):
    options = ["--model_name_or_path", str(testbed.folder), "--output_dir", str(tmp_path), "--top_k", "12"]
    options += ["--disable_tqdm", "true", "--max_train_examples", "24", "--score", score]
    main(["discover", *options, "--n_texts", "8"])
    printed = capsys.readouterr().out
    first = json.loads((tmp_path / "discovered.json").read_text())[0]

    def expected(effect, delta):
        return abs(effect) if score == "attribution" else pytest.approx(abs(effect) * abs(delta))

    assert first["score"] == expected(first["effect"], first["delta"])
    assert f"{first['effect']:+.3f}" in printed
    assert f"{first['delta']:+.3f}" in printed
    subspace = json.loads((tmp_path / "subspace" / "subspace.json").read_text())["provenance"]
    for about in (subspace, subspace["writers"]):
        assert about["features"]["score"] == score
        for of in about["features"]["layers"].values():
            assert of["score"] == [expected(*values) for values in zip(of["effect"], of["delta"], strict=True)]
            assert of["score"] == sorted(of["score"], reverse=True)


def test_discover_shows_a_baseline(capsys, tmp_path, testbed):
    options = ["--model_name_or_path", str(testbed.folder), "--output_dir", str(tmp_path / "run")]
    main(["discover", *options, "--init", "random_basis"])
    assert "layer 1: 8 directions (random_basis)" in capsys.readouterr().out


def test_a_folder_named_like_markup_is_printed_as_it_is(capsys, tmp_path, testbed):
    output_dir = tmp_path / "[bold]" / "[" / "x]"
    main(
        [
            "discover",
            "--model_name_or_path",
            str(testbed.folder),
            "--init",
            "random_basis",
            "--output_dir",
            str(output_dir),
        ]
    )
    assert f"{output_dir}/subspace/" in capsys.readouterr().out


def test_discover_without_a_subspace(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["discover", "--init", "default", "--output_dir", str(tmp_path / "run")])
    assert "default starts in no subspace; choose --init sails" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# train-sae


def test_train_sae_on_the_testbed(capsys, tmp_path, testbed):
    argv = ["--model_name_or_path", str(testbed.folder), *TRAIN_SAE, "--output_dir", str(tmp_path / "saes")]
    main(["train-sae", *argv])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "saes" / "layer_1" / "report.json").read_text())
    assert f"{report['explained_variance']:.3f}" in printed
    assert "--sae_path" in printed
    model_config = AutoConfig.from_pretrained(testbed.model_path)
    saes = SAESet.load(SAESource(path=str(tmp_path / "saes")), model_config=model_config, model_name="testbed")
    assert {layer: sae.info.d_sae for layer, sae in saes.items()} == {1: 64}
    weights = tmp_path / "saes" / "layer_1" / "sae_weights.safetensors"
    before = weights.stat().st_mtime_ns
    main(["train-sae", *argv])
    assert weights.stat().st_mtime_ns == before, "a finished layer is not trained again"


@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_train_sae_on_data(capsys, tmp_path, testbed, data_cache, kind):
    rows = PAIRS if kind == "pairs" else [{"text": f"{row['prompt']} {row['chosen']}"} for row in PAIRS]
    data, config = tmp_path / "data.jsonl", tmp_path / "options.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.write_text(f"model_name_or_path: {testbed.model_path}\ndataset_name: {data}\nlayers: [0, 2]\nlr: 1e-3\n")
    main(["train-sae", *TRAIN_SAE[2:], "--config", str(config), "--output_dir", str(tmp_path / "saes")])
    assert sorted(path.name for path in (tmp_path / "saes").glob("layer_*")) == ["layer_0", "layer_2"]
    assert "SAEs, on held-out tokens" in capsys.readouterr().out


def test_dialogues_become_token_ids_or_text(tmp_path, testbed, data_cache):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS[:2]))
    args = sae_training.SAEArguments(layers=[0], dataset_name=str(tmp_path / "data.jsonl"))
    tokenizer = AutoTokenizer.from_pretrained(testbed.model_path)
    pair = normalize(load_rows(str(tmp_path / "data.jsonl"))).dataset[0]
    dialogues = [[*pair["prompt"], {"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")]
    ids = list(sae_training.texts_of(args, tokenizer, None))
    assert len(ids) == 4, "both responses of each pair"
    assert ids[:2] == [
        tokenizer.apply_chat_template(dialogue, tokenize=True, return_dict=False) for dialogue in dialogues
    ]
    tokenizer.chat_template = None
    texts = list(sae_training.texts_of(args, tokenizer, None))
    assert texts[:2] == [
        "how do i mend 0 and 0\n\nwith care 0",
        "how do i mend 0 and 0\n\nnever mind 0",
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--k", "65"], "k is 65"),
        (["--architecture", "gated"], "architecture is 'gated', which is not one of"),
        (["--dtype", "int7"], "dtype is 'int7'"),
        (["--lr", "-1"], "lr is -1.0"),
        (["--layers", "1", "1"], "each once"),
        (["--context_size", "1"], "context_size is 1"),
    ],
)
def test_train_sae_options(capsys, tmp_path, testbed, options, said):
    with pytest.raises(SystemExit) as ended:
        main(["train-sae", "--model_name_or_path", str(testbed.folder), *TRAIN_SAE, *options,
              "--output_dir", str(tmp_path / "saes")])  # fmt: skip
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "saes").exists()


def test_train_sae_needs_data(capsys, tmp_path, testbed):
    with pytest.raises(SystemExit):
        main(["train-sae", "--model_name_or_path", testbed.model_path, *TRAIN_SAE, "--output_dir", str(tmp_path / "s")])
    assert "give --dataset_name" in capsys.readouterr().err


# testbed build


def test_testbed_build(capsys, tmp_path, monkeypatch):
    """The whole of it, but a short pretraining and short SAE trainings."""
    short = {"n_steps": 3, "sae_tokens": 2000}
    whole = build.build_testbed
    monkeypatch.setattr(build, "build_testbed", lambda *args: whole(*args, **short))
    main(["testbed", "build", "--seed", "3", "--output", str(tmp_path / "world"), "--shared_harm", "0.25"])
    printed = capsys.readouterr().out
    assert "Testbed of seed 3" in printed
    assert "explained variance" in printed
    built = build.load_testbed(tmp_path / "world")
    assert (built.world.config.seed, built.world.config.shared_harm) == (3, 0.25)
    assert sorted(path.name for path in Path(built.sae_path).iterdir()) == [f"layer_{layer}" for layer in SAE_LAYERS]
    assert {path.name for path in tmp_path.iterdir()} == {"world"}


def test_testbed_build_leaves_other_folders_alone(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        main(["testbed", "build", "--output", str(tmp_path)])
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_texts_that_are_empty_are_counted_and_named_or_left_out(caplog):
    rows = Dataset.from_dict({"text": ["one", "", "three", None]})
    with pytest.raises(InputError, match=r"2 of 4 rows of my data have an empty text or none \(first: \[1, 3\]\)"):
        sae_training._texts(rows, "text", "my data", "error")
    assert list(sae_training._texts(rows, "text", "my data", "skip")) == ["one", "three"]
    assert "2 of 4 rows" in caplog.text


def test_texts_that_cannot_be_read_are_told_by_their_cause(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "x \\ud83d"}\n')
    rows = load_rows(str(tmp_path / "a.jsonl"), mark_unreadable=True)
    with pytest.raises(InputError, match=r"1 of 2 rows of my data cannot be read \(the row has a lone surrogate"):
        sae_training._texts(rows, "text", "my data", "error")
    assert list(sae_training._texts(rows, "text", "my data", "skip")) == ["one"]
    with pytest.raises(InputError, match="1 of 1 rows of my data have a text that is no text"):
        sae_training._texts(Dataset.from_dict({"text": [["a"]]}), "text", "my data", "error")
