"""Show training examples as the model will see them: tokens, roles, what is trained on, and what is cut off.

TRL's trainer tokenizes, truncates and masks them, made as for the training itself; only the model is a tiny stand-in,
on which nothing of this depends.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from rich.text import Text
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from sails_align.core.log import show
from sails_align.core.text import printable
from sails_align.data.messages import Message, assistant
from sails_align.data.prefilled import TRANSITION, response_of
from sails_align.subspace.options import Method
from sails_align.training.dataset import TrainingSource, load_source
from sails_align.training.estimate import as_on_gpu
from sails_align.training.plan import TrainingPlan, changed
from sails_align.training.run import parse, resolved
from sails_align.training.trainer import AlignmentTrainer, option_errors, trl_trainer

TRAINED, CONTEXT, CUT = "trained", "context", "cut off"
STYLES = {TRAINED: "bold green", CONTEXT: "dim", CUT: "red strike"}
CONTEXT_TOKENS = 16
"""Tokens before one that are decoded with it, because decoders join and trim them."""


@dataclass(frozen=True)
class Piece:
    """A token of an example."""

    token_id: int
    text: str
    role: str
    """Of the message that it belongs to; "" if the chat template wrote it."""
    use: str
    """`TRAINED` on, `CUT` off by `max_length`, or `CONTEXT`, which is only read."""


@dataclass(frozen=True)
class PreviewedExample:
    """A sequence of the training: an example of SFT, or one response of a pair of DPO."""

    name: str
    pieces: tuple[Piece, ...]
    left_out: bool
    """Whether the prompt alone fills `max_length`, so that the training leaves the example out."""

    def count(self, use: str) -> int:
        """Return the number of its tokens of a use."""
        return sum(piece.use == use for piece in self.pieces)


def preview(method: Method, argv: Sequence[str], n_examples: int, *, longest: bool = False) -> list[PreviewedExample]:
    """Tokenize some training examples of a training, and print them.

    Args:
        method: of the training.
        argv: the training's options.
        n_examples: how many; the first ones, in the order of the training data.
        longest: the longest ones (in characters) in place of the first.

    Raises:
        InputError: for options or data that the training refuses.
    """
    plan, testbed = resolved(parse(method, as_on_gpu(argv)))
    source = load_source(plan, testbed)
    order = range(len(source.train))
    chosen = sorted(order, key=lambda index: -_n_characters(source.train[index])) if longest else order
    rows = source.train.select(list(chosen)[:n_examples])
    examples = tokenized(plan, replace(source, train=rows, held_out=rows))
    _show(plan, source, examples)
    return examples


def _n_characters(row: Any) -> int:
    texts = (text for text in (row["chosen"], row.get("rejected")) if text is not None)
    return sum(len(message["content"]) for message in row["prompt"]) + sum(map(len, texts))


def tokenized(plan: TrainingPlan, source: TrainingSource) -> list[PreviewedExample]:
    """Tokenize all training examples of a source with TRL's trainer, with and without `max_length`."""
    max_length = plan.training.max_length
    with tempfile.TemporaryDirectory() as folder, option_errors():
        whole, kept = (_sequences(_trainer(plan, source, length, folder)) for length in (None, max_length))
    is_start = plan.training.truncation_mode == "keep_start"
    named = _conversations(source.train, plan.method)
    return [
        _example(name, messages, full, part, is_start, source.tokenizer)
        for (name, messages), (full, part) in zip(named, _grouped(whole, kept, is_start), strict=True)
    ]


TokenSequence = tuple[list[int], list[bool]]
"""Token ids, and whether each is trained on."""


def _trainer(plan: TrainingPlan, source: TrainingSource, max_length: int | None, folder: str) -> AlignmentTrainer:
    options: dict[str, Any] = {"output_dir": folder, "max_length": max_length, "report_to": []}
    options |= {"gradient_checkpointing": False, "use_liger_kernel": False, "torch_compile": False}
    if plan.method == "sft":  # packing joins such examples to rows
        options |= {"packing": False, "eval_packing": False, "padding_free": False}
    else:
        options |= {"precompute_ref_log_probs": False}
    plan = replace(plan, training=changed(plan.training, **options), dpo=replace(plan.dpo, ref_model_name_or_path=None))
    tiny: dict[str, Any] = {"hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(source.tokenizer), **tiny))
    return trl_trainer(plan, source, model, LoraConfig(target_modules=["q_proj"]), [])


def _sequences(trainer: AlignmentTrainer) -> list[TokenSequence]:
    """Return what the model is given of each example, by TRL's own collator; of a pair two sequences."""
    collate: Any = trainer.data_collator
    rows: Any = trainer.train_dataset
    sequences = []
    for row in rows:
        batch = collate([row])
        trained = batch["labels"] != -100 if "labels" in batch else batch["completion_mask"].bool()
        for ids, uses, mask in zip(batch["input_ids"], trained, batch["attention_mask"].bool(), strict=True):
            sequences.append((ids[mask].tolist(), uses[mask].tolist()))
    return sequences


def _grouped(
    whole: list[TokenSequence], kept: list[TokenSequence], is_start: bool
) -> Iterator[tuple[TokenSequence, TokenSequence | None]]:
    """Yield each whole sequence with what is kept of it; None if the example is left out."""
    remaining = list(kept)
    for full in whole:
        n = len(remaining[0][0]) if remaining else 0
        own = full[0][:n] if is_start else full[0][-n:]
        yield full, (remaining.pop(0) if remaining and own == remaining[0][0] else None)


def _conversations(rows: Dataset, method: Method) -> Iterator[tuple[str, list[Message]]]:
    """Yield the conversation of each sequence, in the trainer's order, with its name."""
    row: Any
    for number, row in enumerate(rows, 1):
        if method == "sft":
            taught = f" (each label is the first token of {row[TRANSITION]!r})" if row.get(TRANSITION) else ""
            yield f"example {number}{taught}", [*row["prompt"], assistant(response_of(row))]
            continue
        for column in ("chosen", "rejected"):
            yield f"example {number}, {column}", [*row["prompt"], assistant(row[column])]


def _example(
    name: str,
    messages: list[Message],
    full: TokenSequence,
    kept: TokenSequence | None,
    is_start: bool,
    tokenizer: PreTrainedTokenizerBase,
) -> PreviewedExample:
    ids, _ = full
    uses = [CUT] * len(ids)
    if kept is not None:
        first = 0 if is_start else len(ids) - len(kept[0])
        for position, is_trained in enumerate(kept[1], first):
            uses[position] = TRAINED if is_trained else CONTEXT
    texts = token_texts(tokenizer, ids)
    pieces = map(Piece, ids, texts, _roles(texts, messages), uses)
    return PreviewedExample(name, tuple(pieces), kept is None)


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Return the text that each token adds; that of a character of several tokens is with its last token."""
    texts: list[str] = []
    start, last, shown = 0, 0, ""  # `last`: where the last whole text begins
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))
        if text.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(shown) :])
        shown = text
        if end - start >= CONTEXT_TOKENS:
            start = last
            shown = str(tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))
        last = end
    return texts


def _roles(texts: Sequence[str], messages: Sequence[Message]) -> list[str]:
    """Return the role of the message that each token has a part of, found in the text one after another."""
    text, position = "".join(texts), 0
    of_character = [""] * len(text)
    for message in messages:
        content = message["content"].strip()  # templates trim it
        start = text.find(content, position)
        if start >= 0:
            position = start + len(content)
            of_character[start:position] = [message["role"]] * len(content)
    roles, end = [], 0
    for piece in texts:
        start, end = end, end + len(piece)
        roles.append(next(filter(None, of_character[start:end]), ""))
    return roles


# -- showing -----------------------------------------------------------------------------------------------------------


def _show(plan: TrainingPlan, source: TrainingSource, examples: Sequence[PreviewedExample]) -> None:
    """Print the examples: a line for each part, with its role, its use and its number of tokens."""
    show(f"{plan.method.upper()} of {source.name}: {len(source.train):,} training examples")
    if getattr(plan.training, "packing", False):
        show(f"packing joins such examples to rows of {plan.training.max_length} tokens")
    for example in examples:
        show("", Text(_title(example, plan.training.max_length), style="bold"))
        for (role, use), group in groupby(example.pieces, lambda piece: (piece.role, piece.use)):
            pieces = list(group)
            text = printable("".join(piece.text for piece in pieces)).replace("\n", "\\n").replace("\t", "\\t")
            show(Text.assemble(f"{role or 'template':<10} {use:<8} {len(pieces):>5}  ", (text, STYLES[use])))


def _title(example: PreviewedExample, max_length: int | None) -> str:
    if example.left_out:
        return f"{example.name}: LEFT OUT, since its prompt alone fills max_length {max_length}"
    cut = f", {example.count(CUT)} cut off by max_length {max_length}" if example.count(CUT) else ""
    n_trained, n = example.count(TRAINED), len(example.pieces)
    return f"{example.name}: {n} tokens, {n_trained} of them trained on{cut}"
