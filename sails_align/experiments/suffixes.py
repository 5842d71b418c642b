"""Find adversarial suffixes by GCG, with the testbed's budget: one search per prompt, the same for every model."""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sails_align.evaluation.attacks.options import TESTBED_BUDGET, GcgOptions
from sails_align.evaluation.attacks.wrappers import with_suffix
from sails_align.evaluation.records import Prompt

GCG_OPTIONS = ("n_steps", "search_width", "topk", "suffix_length")


def with_suffixes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], seed: int
) -> list[Prompt]:
    """Return the prompts, each with the suffix that makes the model's harmful answer to it most likely."""
    from sails_align.evaluation.attacks.gcg import search

    options = GcgOptions(**{name: TESTBED_BUDGET[name] for name in GCG_OPTIONS})  # pyright: ignore[reportArgumentType] -- ints
    attacked = []
    for prompt in prompts:
        found = search(model, tokenizer, [(prompt, str(prompt.meta["target"]))], options, seed=seed)
        attacked.append(with_suffix(prompt, found.suffix, "gcg"))
    return attacked
