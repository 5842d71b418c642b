"""The command `sails`: a list of commands, from which help, errors and shell completion follow.

Each command is a function `main(argv, prog)` in a module of this folder. The module imports only dataclasses of
options; heavy imports follow once the options are checked. Options and files that cannot be used are refused with an
`InputError`.
"""

import importlib.metadata
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from sails_align.core.errors import InputError, exit_on_input_error
from sails_align.core.log import set_up
from sails_align.core.registry import Entry, Registry
from sails_align.core.suggestions import closest
from sails_align.edits import EDITS


@dataclass(frozen=True)
class Command(Entry):
    """Point to the function of a command."""

    arguments: tuple[str, ...] = ()
    """Words that the function is given before those of the user."""

    def __call__(self, argv: Sequence[str], prog: str) -> None:
        """Run the command."""
        self.load()([*self.arguments, *argv], prog=prog)


_COMMANDS = {
    "discover": ("discover:main", "Find the safety subspace of a model, save it, and show its features."),
    "features": ("features:main", "Explain the features of a finished run, and what training did to them."),
    "units": ("units:main", "Find the channels of a model that matter for safety, and for utility."),
    "train-sae": ("train_sae:main", "Train sparse autoencoders (SAEs) for a model."),
    "train sft": ("train:align", "Find the subspace, initialize adapters in it, fine-tune, and measure.", "sft"),
    "train dpo": ("train:align", "The same by direct preference optimization (DPO).", "dpo"),
    "train rlhf": ("train:rlhf", "Train the testbed's RLHF reference model."),
    **{f"edit {name}": ("edit:main", entry.summary, name) for name, entry in EDITS.items()},
    "merge": ("edit:main", "Short for sails edit merge.", "merge"),
    "guard fit": ("guard:fit", "Fit a guard: a small classifier of prompts on a model's hidden states."),
    "guard calibrate": ("guard:calibrate", "Choose a guard's threshold, with bounds on what it gets wrong."),
    "guard check": ("guard:check", "Score prompts with a guard, and compare its errors with its bounds."),
    "guard select": ("guard:select", "Keep the rows of a dataset whose prompts a guard refuses."),
    "check-adapter": ("check_adapter:main", "Check whether vLLM can serve an adapter, and how."),
    "preview": ("preview:main", "Show training examples as tokens, and what of them is trained on."),
    "estimate": ("estimate:main", "Estimate the memory of a training, by engine and number of GPUs."),
    "chat": ("chat:main", "Talk to a model in the terminal, or answer prompts from a pipe."),
    "answer": ("answer:main", "Write a model's own answers to prompts, as rows to train on."),
    "eval safety": ("evaluate:safety", "Measure safety rate, harmfulness, over-refusal and attack success."),
    "eval helpfulness": ("evaluate:helpfulness", "Measure how good the answers are, also against a reference's."),
    "eval divergence": ("evaluate:divergence", "Measure how far a model is from its base, token by token."),
    "eval harness": ("evaluate:harness", "Measure capability with lm-eval-harness, against the base model."),
    "judge-check": ("judge_check:main", "Compare a judge's verdicts with labels."),
    "view": ("view:main", "Make a page to browse the responses and verdicts of one evaluation, or of two."),
    "attack gcg": ("evaluate:attack", "Search for adversarial suffixes.", "gcg"),
    "attack prefill": ("evaluate:attack", "Force answers to begin with harmful words.", "prefill"),
    "attack transfer": ("evaluate:attack", "Try suffixes on other prompts and models.", "transfer"),
    "attack wrappers": ("evaluate:attack", "Try known jailbreak wrappers around prompts.", "wrappers"),
    "compare": ("evaluate:compare", "Train and evaluate every method over seeds, and report."),
    "report": ("evaluate:report", "Make the report of a comparison again."),
    "testbed build": ("testbed_build:main", "Make a testbed from a seed: a small world, its base model and SAEs."),
    "list": ("choices:main", "List what can be chosen: models, SAEs, prompt sets, judges, methods."),
    "doctor": ("doctor:main", "Check this machine: devices, packages, what is missing."),
    "completion": ("completion:main", "Print the completion script of a shell."),
}
COMMANDS = Registry(
    "command",
    {
        name: Command(f"{__name__}.{target}", summary, arguments=tuple(arguments))
        for name, (target, summary, *arguments) in _COMMANDS.items()
    },
)
GROUPS = {name.partition(" ")[0] for name in COMMANDS.names() if " " in name}
HELP_OPTIONS = ("-h", "--help", "--help-all")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. Ends the process with exit code 2 on bad input."""
    set_up()
    with exit_on_input_error():
        dispatch(list(sys.argv[1:] if argv is None else argv))


def dispatch(argv: list[str]) -> None:
    """Run a command; only its libraries are imported.

    Raises `InputError` for an unknown command, and from the command.
    """
    n_words = 2 if argv and argv[0] in GROUPS else 1
    if len(argv) < n_words or argv[n_words - 1] in HELP_OPTIONS:
        print(help_text())
    elif argv[0] == "--version":
        print(f"sails-align {importlib.metadata.version('sails-align')}")
    elif argv[0] == "__complete":  # what the script of `sails completion` calls
        from sails_align.cli.completion import complete

        complete(argv[1:])
    else:
        name = " ".join(argv[:n_words])
        COMMANDS.get(name if name in COMMANDS else _as_meant(argv))(argv[n_words:], prog=f"sails {name}")


def _as_meant(argv: Sequence[str]) -> str:
    """Return the words that are to name a command: two, if the first is like one of a group (`trian sft`)."""
    meant = closest(argv[0], {name.partition(" ")[0] for name in COMMANDS.names()})
    if meant in GROUPS and len(argv) == 1:
        raise InputError(f"there is no command {argv[0]!r}; did you mean {meant!r}?")
    return " ".join(argv[:2] if meant in GROUPS else argv[:1])


def help_text() -> str:
    """Return what `sails --help` prints."""
    width = max(map(len, COMMANDS.names())) + 2
    return "\n".join(
        [
            "usage: sails COMMAND [OPTIONS]",
            "",
            "Safety alignment of language models: adapters initialized in a subspace found by sparse autoencoders.",
            "",
            "commands:",
            *(f"  {name:<{width}}{entry.summary}" for name, entry in COMMANDS.items()),
            "",
            "options:",
            f"  {'-h, --help':<{width}}Show this help; after a command: its options.",
            f"  {'--version':<{width}}Show the version.",
            "",
            "For every model, `testbed` names the one that ships with the package, and `testbed:N` that of seed N.",
            "Options can be read from a YAML file: --config FILE.",
        ]
    )
