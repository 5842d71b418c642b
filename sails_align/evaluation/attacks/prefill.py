"""Force answers to begin with the first words of a harmful one, and let the model go on.

Whoever runs a model can write the beginning of its answer. Qi et al. 2024 (arXiv 2406.05946, section 3) show that
safety training often protects the first tokens only. The words are those of the testbed's answer to the request, else
of the prompt's `target` (AdvBench and JailbreakBench have one), else of `--target`. Judges are given what the model
adds, without the words that were forced.
"""

import logging
from collections.abc import Sequence

from sails_align.core.errors import InputError
from sails_align.evaluation.attacks import Setting
from sails_align.evaluation.attacks.options import PrefillArguments
from sails_align.evaluation.attacks.wrappers import attacked_prompt
from sails_align.evaluation.records import Prompt

logger = logging.getLogger(__name__)


def attack(options: PrefillArguments, prompts: Sequence[Prompt], setting: Setting) -> list[Prompt]:
    """Return every prompt with each number of forced words that its answer has; raise `InputError` if none has."""
    attacked = []
    answers = [(prompt, harmful_answer(prompt, options.target).split()) for prompt in prompts]
    for n in sorted(set(options.prefill_words)):
        long_enough = [prefilled(prompt, words[:n]) for prompt, words in answers if n <= len(words)]
        if len(long_enough) < len(prompts):
            logger.warning(
                "%d of %d answers have %d words to begin with: the others are left out",
                len(long_enough),
                len(prompts),
                n,
            )
        attacked += long_enough
    if not attacked:
        raise InputError(f"no answer has {min(options.prefill_words)} words; give fewer --prefill_words, or --target")
    return attacked


def prefilled(prompt: Prompt, words: Sequence[str]) -> Prompt:
    """Return a prompt whose answer is forced to begin with words."""
    return attacked_prompt(prompt, prompt.messages, f"prefill_{len(words)}", {"prefill": " ".join(words)})


def harmful_answer(prompt: Prompt, default: str) -> str:
    """Return what is known of a harmful answer to a prompt."""
    request = prompt.meta.get("request") or {}
    return str(request.get("answer") or prompt.meta.get("target") or default)
