"""Help, versions, misspelt commands and options, and shell completion import no torch."""

import json
import shutil
import subprocess
import sys

import pytest

from sails_align.cli import COMMANDS
from sails_align.cli.completion import SCRIPTS
from sails_align.edits import EDITS

HEAVY = ("torch", "transformers", "peft", "datasets", "sae_lens", "accelerate", "scipy", "matplotlib")
PROBE = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from sails_align.cli import main
printed = []
for argv in json.loads(sys.argv[1]):
    text, code = io.StringIO(), 0
    with redirect_stdout(text), redirect_stderr(text):
        try:
            main(argv)
        except SystemExit as ended:
            code = ended.code
    heavy = sorted(set(json.loads(sys.argv[2])) & sys.modules.keys())
    printed.append([code, text.getvalue(), heavy])
print(json.dumps(printed))
"""


def run(*commands: list[str]) -> list[tuple[int, str, list[str]]]:
    """Exit code, text, and heavy modules imported so far of each command line, run one after another."""
    argv = [sys.executable, "-c", PROBE, json.dumps(commands), json.dumps(HEAVY)]
    return json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)


def test_help_of_every_command():
    names = COMMANDS.names()
    for name, (code, text, heavy) in zip(names, run(*([*name.split(), "--help"] for name in names)), strict=True):
        assert code == 0
        assert text.startswith(f"usage: sails {name} ")
        assert heavy == [], name


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["discovr"], "did you mean 'discover'?"),
        (["train", "sft", "--learning_rat", "1"], "did you mean --learning_rate?"),
        (["train", "dpo", "--gradient_chekpointing", "1"], "did you mean --gradient_checkpointing?"),
        (["train", "sft", "--tau", "2"], "tau is 2.0"),
        (["train", "sft", "--top_k", "many"], "invalid int value: 'many'"),
        (["discover", "--config", "nowhere.yaml"], "cannot read the configuration nowhere.yaml"),
        (["train", "rlhf", "--helpful_ratio", "-1"], "helpful_ratio is -1.0"),
        (["chat", "--temperature", "-1"], "temperature is -1.0"),
        (["eval", "safety", "--compair", "base"], "did you mean --compare?"),
        (["eval", "safety", "--juge", "rules"], "did you mean --judge?"),
        (["eval", "harness", "--batch_size", "none"], "batch_size is 'none'"),
        (["attack", "gcg", "--n_step", "3"], "did you mean --n_steps?"),
        (["compare", "--n_seeds", "few"], "invalid int value: 'few'"),
        (["features", "--n_texts", "0"], "n_texts is 0"),
        (["merge"], "the following arguments are required: run, --output"),
        (["edit", "merge", "run"], "the following arguments are required: --output"),
        (["edit", "merg", "run"], "did you mean 'edit merge'?"),
        (["train", "sft", "--init", "sail"], "did you mean 'sails'?"),
        (["train", "sft", "--contrast", "promt"], "did you mean 'prompt'?"),
        (["train", "sft", "--subspace_mode", "frezze"], "did you mean 'freeze'?"),
        (["train", "dpo", "--dtype", "bfloat"], "did you mean 'bfloat16'?"),
        (["eval", "safety", "--judge", "rule"], "did you mean 'rules'?"),
        (["eval", "safety", "--backend", "vlm"], "did you mean 'vllm'?"),
        (["eval", "safety", "--no_progres"], "did you mean --no_progress?"),
        (["completion", "bsh"], "did you mean 'bash'?"),
        (["train-sae", "--layers", "1", "--architecture", "top_k"], "did you mean 'topk'?"),
        (["edit", "merge", "run", "--output", "x", "--dtype", "float6"], "did you mean 'float16'?"),
        (["train", "sft", "--config", "recipes/configs/testbed/sft_sail.yaml"], "sft_sails.yaml'?"),
    ],
)
def test_mistakes_are_found_at_once(argv, said):
    ((code, text, heavy),) = run(argv)
    assert code == 2
    assert said in text
    assert heavy == []


def test_completion():
    answers = run(
        ["__complete", "tr"],
        ["__complete", "train", "s"],
        ["__complete", "train", "sft", "--lea"],
        ["__complete", "train", "sft", "--sae_allow_mismatch", ""],
        ["__complete", "merge", "--dtype", "float"],
        ["__complete", "nothing", "x"],
        ["__complete", "edit", ""],
        ["__complete", "edit", "merge", "--dtype", "b"],
        ["__complete"],
    )
    words = [text.split() for _, text, _ in answers]
    assert words[:3] == [["train-sae", "train"], ["sft"], ["--learning_rate"]]
    assert words[3:6] == [["true", "false"], ["float32", "float16"], []]
    assert words[6:8] == [list(EDITS.names()), ["bfloat16"]]
    assert {"discover", "train", "eval", "doctor"} <= set(words[8])
    assert answers[-1][2] == []


@pytest.mark.parametrize("shell", SCRIPTS)
def test_completion_scripts(shell, tmp_path):
    """Each is accepted by its shell, where that is installed; bash's completes."""
    ((code, script, _),) = run(["completion", shell])
    assert code == 0
    assert "sails __complete" in script
    if shutil.which(shell) is None:
        return
    (tmp_path / "script").write_text(script)
    subprocess.run([shell, "-n", tmp_path / "script"], check=True)
    if shell == "bash":
        code = f'sails() {{ {sys.executable} -m sails_align "$@"; }}; {script}\n'
        code += 'COMP_WORDS=(sails train d); COMP_CWORD=2; _sails; echo "${COMPREPLY[@]}"'
        assert subprocess.run(["bash", "-c", code], capture_output=True, text=True).stdout == "dpo\n"
