"""The command `sails`.

sails discover --help        find and save the safety subspace of a model
sails features --help        say what the features of a run mean, and what training did to them
sails train-sae --help       train SAEs for a model that has no public ones
sails train sft --help       find the subspace, start adapters in it, train them by TRL's SFTTrainer
sails train dpo --help       the same by TRL's DPOTrainer
sails train rlhf --help      the testbed's reference model: all weights, reward by TRL's GRPO
sails merge --help           merge a trained adapter into its model
sails check-adapter --help   say whether vLLM can serve an adapter, and how
sails estimate --help        say what memory a recipe takes, by engine and number of GPUs
sails eval safety --help        safety rate, harmfulness, over-refusal and attack success of a model
sails eval helpfulness --help   how good its answers are, by themselves and against a reference's
sails eval harness --help       its capability, by lm-eval-harness, against its base
sails judge-check --help     a judge's verdicts against labels
sails attack gcg --help         search for adversarial suffixes
sails attack transfer --help    try suffixes on other prompts and models
sails attack wrappers --help    try wrappings known to lead models on
sails compare --help         every method over seeds, and the report
sails report --help          the report of a comparison again
sails testbed build --help   make a testbed: a small world, its base model and its SAEs
sails doctor --help          say what this machine has, and what is missing for which feature
"""

import difflib
import importlib.metadata
import sys
from collections.abc import Sequence

from sails_align.core.errors import InputError, exit_on_input_error

HELP = """usage: sails COMMAND [OPTIONS]

Safety alignment of language models: adapters that start inside a safety subspace found by sparse autoencoders.

commands:
  discover        find and save the safety subspace of a model, and show its features
  features        say what the features of a finished run mean, and what training did to them
  train-sae       train sparse autoencoders on the residual stream of any Hugging Face model
  train sft       the whole job: find the subspace, start LoRA adapters in it, fine-tune, measure
  train dpo       the same by direct preference optimisation
  train rlhf      train the testbed's RLHF reference model
  merge           merge a trained adapter into its model
  check-adapter   say whether vLLM can serve an adapter, and how
  estimate        say what memory a recipe takes, by engine and number of GPUs
  eval safety     judge a model's responses: safety rate, harmfulness, over-refusal, attack success
  eval helpfulness    judge how good its answers are, by themselves and against a reference's
  eval harness    measure its capability by lm-eval-harness, against its base
  judge-check     compare a judge's verdicts with labels
  attack gcg      search for adversarial suffixes
  attack transfer     try suffixes on other prompts and models
  attack wrappers     try wrappings known to lead models on
  compare         train and evaluate every method over seeds, and report
  report          make a comparison's report again
  testbed build   make a testbed from a seed: a small world, its base model and its SAEs
  doctor          say what this machine has, and what is missing for which feature

options:
  -h, --help      show this, or with a command its options
  --version       show the version

Everywhere a model is asked for, `testbed` is the one that ships with the package, and `testbed:N` that of seed N.
Options can be read from a YAML file: --config FILE."""
COMMANDS = ("discover", "features", "train-sae", "train sft", "train dpo", "train rlhf")
COMMANDS += ("merge", "check-adapter", "estimate", "eval safety", "eval helpfulness", "eval harness", "judge-check")
COMMANDS += ("attack gcg", "attack transfer", "attack wrappers", "compare", "report", "testbed build", "doctor")
GROUPS = ("train", "testbed", "eval", "attack")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. Ends the process with exit code 2 on input that cannot be used."""
    with exit_on_input_error():
        dispatch(list(sys.argv[1:] if argv is None else argv))


def dispatch(argv: list[str]) -> None:
    """Hand the options to the command; only that command's libraries are imported.

    Raises:
        InputError: if there is no such command, and from the command.
    """
    match argv:
        case [] | ["-h" | "--help", *_]:
            print(HELP)
        case [group, *rest] if group in GROUPS and (not rest or rest[0] in ("-h", "--help")):
            print(HELP)
        case ["--version", *_]:
            print(f"sails-align {importlib.metadata.version('sails-align')}")
        case ["discover", *options]:
            from sails_align.cli.discover import discover

            discover(options)
        case ["features", *options]:
            from sails_align.cli.features import main as features

            features(options, prog="sails features")
        case ["train-sae", *options]:
            from sails_align.cli.train_sae import main as train_sae

            train_sae(options)
        case ["train", "sft" | "dpo" as method, *options]:
            from sails_align.training.run import main as train

            train(method, options, prog=f"sails train {method}")
        case ["train", "rlhf", *options]:
            from sails_align.training.rlhf.run import main as train_rlhf

            train_rlhf(options, prog="sails train rlhf")
        case ["merge", *options]:
            from sails_align.cli.merge import merge

            merge(options)
        case ["check-adapter", *options]:
            from sails_align.cli.merge import check

            check(options)
        case ["estimate", *options]:
            from sails_align.training.estimate import main as estimate

            estimate(options, prog="sails estimate")
        case ["eval", "safety", *options]:
            from sails_align.evaluation.safety import main as eval_safety

            eval_safety(options, prog="sails eval safety")
        case ["eval", "helpfulness", *options]:
            from sails_align.evaluation.helpfulness import main as eval_helpfulness

            eval_helpfulness(options, prog="sails eval helpfulness")
        case ["eval", "harness", *options]:
            from sails_align.cli.eval_harness import main as eval_harness

            eval_harness(options, prog="sails eval harness")
        case ["judge-check", *options]:
            from sails_align.cli.judge_check import main as judge_check

            judge_check(options, prog="sails judge-check")
        case ["attack", *options]:
            from sails_align.cli.attack import main as attack

            attack(options, prog="sails attack")
        case ["compare", *options]:
            from sails_align.cli.compare import main as compare

            compare(options, prog="sails compare")
        case ["report", *options]:
            from sails_align.cli.compare import report_main

            report_main(options, prog="sails report")
        case ["testbed", "build", *options]:
            from sails_align.cli.discover import build

            build(options)
        case ["doctor", *options]:
            from sails_align.cli.doctor import main as doctor

            doctor(options)
        case [*words]:
            name = " ".join(words[:2] if words[0] in GROUPS else words[:1])
            found = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean sails {found[0]}?" if found else f"commands are {', '.join(COMMANDS)}"
            raise InputError(f"there is no command {name!r}; {hint}")
