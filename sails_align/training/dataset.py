"""Load what a training starts from: a model, its tokenizer, and training, contrast and held-out data."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from sails_align.core.distributed import from_main
from sails_align.core.errors import InputError
from sails_align.data.loading import NoSplitError, cache_errors, load_rows
from sails_align.data.messages import assistant
from sails_align.data.pairs import AlignmentExamples, fingerprint, normalize
from sails_align.data.prefilled import CUT_OFF, PREFILL, TRANSITION, check_transitions, is_prefilled, without_cut
from sails_align.data.splits import split_by_prompt, without_prompts_of
from sails_align.data.tokens import TemplateCheck, as_text, check_chat_template, control_tokens, read_chat_template
from sails_align.data.transforms import transformed
from sails_align.evaluation.options import PromptArguments
from sails_align.evaluation.prompts.load import load_all
from sails_align.initializers.examples import N_EXAMPLES
from sails_align.models import load
from sails_align.models.generation import load_generation_config
from sails_align.models.spec import identity_of
from sails_align.testbed.build import Testbed
from sails_align.testbed.data import alignment_data
from sails_align.training.ends import ResponseEnd, agree_on_end
from sails_align.training.plan import TrainingPlan
from sails_align.training.reader import FrozenBase

logger = logging.getLogger(__name__)

HELD_OUT, HELPFUL = "held-out data: ", "helpful data: "
"""What the causes of dropped rows begin with."""


@dataclass(frozen=True)
class TrainingSource:
    """The model (as `from_pretrained` takes it), its tokenizer and the data of a training."""

    model_name: str
    name: str
    """The name of the model in messages, and in SAEs that were trained on it."""
    tokenizer: PreTrainedTokenizerBase
    model_config: PretrainedConfig
    safety: Dataset
    """Training pairs of harmful requests: the response contrast, and the harmful side of the prompt contrast."""
    helpful: Dataset | None
    """Training examples of harmless requests: the harmless side of the prompt contrast."""
    train: Dataset
    """Both, mixed."""
    held_out: Dataset
    """Examples for the held-out loss."""
    dropped: dict[str, int]
    """Rows that could not be used, counted by cause."""
    end: ResponseEnd
    """What ends a response."""
    harmful_prompts: Dataset | None = None
    """Of `--harmful_prompts`: what an initialization looks at in place of the safety data."""
    n_paired: int = 0
    """Rows labelled bad whose responses are rejected ones."""
    n_quoting: int = 0
    """Training examples whose texts hold special tokens, which were taken apart (`data.tokens.as_text`)."""
    _identity: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """Kept, since hashing large weights takes minutes."""

    def identity(self) -> dict[str, Any]:
        """Return the model's commit on the hub, or the hashes of its files if it is a local folder."""
        if not self._identity:
            commit = getattr(self.model_config, "_commit_hash", None)
            self._identity.update(from_main(lambda: identity_of(self.model_name, commit)))
        return self._identity

    def prefilled(self) -> dict[str, int]:
        """Count the training examples of which not just the response is learned (`data.prefilled`), by their kind."""
        if not is_prefilled(self.train):
            return {}
        kinds = [transition is not None for transition in self.train[TRANSITION]]
        n_read = sum(bool(text) for text in self.train[PREFILL])
        return {"prefix": n_read - sum(kinds), "RTO": sum(kinds)}

    def data_hash(self) -> str:
        """Return the content hash of the training data."""
        return fingerprint(self.train)


def load_model_config(plan: TrainingPlan) -> PretrainedConfig:
    """Load the model's configuration.

    Raises:
        InputError: if there is no such model, or it is not cached and the hub cannot be reached.
    """
    return load.load_config(plan.model_name, **_where(plan))


def _where(plan: TrainingPlan) -> dict[str, Any]:
    return {"revision": plan.model.model_revision, "trust_remote_code": plan.training.trust_remote_code}


def rows_as_text(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, int]:
    """Return normalized rows whose texts hold no special tokens (`data.tokens.as_text`), and how many held some."""
    control = control_tokens(tokenizer)

    def converted(row: dict[str, Any]) -> dict[str, Any]:
        turns = {name: [assistant(row[name])] for name in ("chosen", "rejected") if row.get(name) is not None}
        answers = {name: as_text(messages, control)[0]["content"] for name, messages in turns.items()}
        return {"prompt": as_text(row["prompt"], control), **answers}

    def quotes(row: dict[str, Any]) -> bool:
        texts = (*(message["content"] for message in row["prompt"]), row["chosen"], row.get("rejected") or "")
        return control is not None and any(control.search(text) for text in texts)

    n = sum(map(quotes, rows))  # pyright: ignore[reportArgumentType]
    with cache_errors():
        return (rows.map(converted, desc="Keeping special tokens text"), n) if n else (rows, 0)


def load_tokenizer(plan: TrainingPlan) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with the chat template that the plan names.

    Raises:
        InputError: if it cannot be loaded, or has no chat template or one that fails.
    """
    template = None if plan.chat_template_path is None else read_chat_template(plan.chat_template_path)
    tokenizer = load.load_tokenizer(plan.model_name, **_where(plan), chat_template=template)
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer of {plan.model_name} has no chat template, which says how a dialogue is written;\n"
            "give one with --chat_template_path (human_assistant suits base models)"
        )
    check_chat_template(tokenizer)
    eos = getattr(plan.training, "eos_token", None)
    if eos is not None and eos not in tokenizer.get_vocab():
        raise InputError(f"eos_token is {eos}, which the tokenizer of {plan.model_name} does not have; leave it out")
    if eos is not None:
        tokenizer.eos_token = eos
    return tokenizer


def load_source(plan: TrainingPlan, testbed: Testbed | None) -> TrainingSource:
    """Load model, tokenizer and data of a plan that is `run.resolved`: the testbed's data if no other is named.

    The safety data is cut to size, and the transforms of the data are applied.

    Raises:
        InputError: if one of them cannot be loaded, or a row cannot be used.
    """
    seed, n = plan.training.seed, plan.data.max_train_examples
    counts = _Counts()
    tokenizer, config = load_tokenizer(plan), load_model_config(plan)
    if testbed is None or plan.script.dataset_name is not None:
        safety, helpful, held_out = _load_data(plan, TemplateCheck(tokenizer), counts)
        if n is not None and n < len(safety):
            safety = safety.shuffle(seed=seed).select(range(n))
    else:
        safety = alignment_data(testbed.world, harmful=True, n=n, seed=seed)
        helpful = alignment_data(testbed.world, harmful=False, seed=seed)
        held_out = alignment_data(testbed.world, harmful=True, n=plan.data.eval_examples, part="validation")
    reader = FrozenBase(plan, tokenizer, config)
    examples = transformed(AlignmentExamples(safety, helpful, safety, reader), plan.extras, seed)
    end = agree_on_end(tokenizer, load_generation_config(plan.model_name, **_where(plan)))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    load.check_vocabulary(tokenizer, config)
    train, n_quoting = rows_as_text(examples.train, tokenizer)
    if is_prefilled(train):
        train = _whole_refusals(train, tokenizer, plan, counts)
    if n_quoting:
        logger.warning(
            "%d training examples hold special tokens of the tokenizer in their texts: they stay text", n_quoting
        )
    return TrainingSource(
        model_name=plan.model_name,
        name=plan.name,
        tokenizer=tokenizer,
        model_config=config,
        safety=rows_as_text(examples.safety, tokenizer)[0],
        helpful=None if examples.helpful is None else rows_as_text(examples.helpful, tokenizer)[0],
        train=train,
        held_out=rows_as_text(held_out, tokenizer)[0],
        dropped=counts.dropped,
        end=end,
        harmful_prompts=_harmful_prompts(plan),
        n_paired=counts.n_paired,
        n_quoting=n_quoting,
    )


def _harmful_prompts(plan: TrainingPlan) -> Dataset | None:
    """Load the prompts of `--harmful_prompts`, as messages; of several kinds only the harmful ones."""
    name = plan.sails.harmful_prompts
    if name is None:
        return None
    asked = PromptArguments(prompts=[name], n_prompts=N_EXAMPLES, kind="harmful", part="train")
    prompts = [prompt for prompt in load_all(asked, plan.training.seed) if prompt.kind == "harmful"]
    if not prompts:
        raise InputError(f"harmful_prompts is {name}, which has no harmful prompts; give others")
    return Dataset.from_list([{"prompt": list(prompt.messages)} for prompt in prompts])


def _whole_refusals(
    train: Dataset, tokenizer: PreTrainedTokenizerBase, plan: TrainingPlan, counts: "_Counts"
) -> Dataset:
    """Check rows that `data.prefilled` tokenizes, and leave out those whose refusal would be cut off."""
    check_transitions(train, tokenizer)
    is_cut = plan.training.truncation_mode == "keep_start"
    kept = without_cut(train, tokenizer, plan.training.max_length if is_cut else None)
    if n := len(train) - len(kept):
        counts.dropped[CUT_OFF] = n
        logger.warning("%d training examples are left out: %s %s", n, CUT_OFF, plan.training.max_length)
    return kept


@dataclass
class _Counts:
    """Count rows by what becomes of them."""

    dropped: dict[str, int] = field(default_factory=dict)
    n_paired: int = 0


def _load_data(plan: TrainingPlan, check: TemplateCheck, counts: _Counts) -> tuple[Dataset, Dataset | None, Dataset]:
    """Load safety pairs, helpful examples (if any) and held-out pairs from the data sets named.

    Held-out pairs are the test split's; if there is no such split, they are taken from the training split.

    Args:
        plan: names the data sets.
        check: of the chat template; rows that it refuses cannot be used.
        counts: receives the numbers of unusable rows, and of rows that became rejected responses.
    """
    script, data, seed = plan.script, plan.data, plan.training.seed
    name = script.dataset_name
    if name is None:
        raise InputError("no data: give --dataset_name (a hub id or a local file), or leave --model_name_or_path out")
    if script.dataset_streaming:
        raise InputError("dataset_streaming is true, but examples are mixed and split by number; leave it out")

    def usable(rows: Dataset, name: str, label: str) -> Dataset:
        normalized = normalize(
            rows,
            name=name,
            on_bad_rows=data.on_bad_rows,  # pyright: ignore[reportArgumentType]
            columns=data.columns(helpful=label == HELPFUL),
            pair=data.bad_responses == "pair",
            check=check,
        )
        counts.dropped.update({label + cause: n for cause, n in normalized.dropped.items()})
        counts.n_paired += normalized.n_paired
        return normalized.dataset

    def load(name: str, split: str, config: str | None, label: str) -> Dataset:
        return usable(load_rows(name, config=config, split=split, mark_unreadable=True), name, label)

    safety = load(name, script.dataset_train_split, script.dataset_config, "")
    try:
        rows = load_rows(name, config=script.dataset_config, split=script.dataset_test_split, mark_unreadable=True)
    except InputError as error:
        is_there = Path(name).expanduser().exists() and not isinstance(error, NoSplitError)
        if is_there or script.dataset_test_split != "test":  # it cannot be read, or is another one that was asked for
            raise
        safety, held_out = split_by_prompt(safety, data.eval_examples, seed, name)
    else:
        held_out = without_prompts_of(usable(rows, name, HELD_OUT), safety, name, HELD_OUT, counts.dropped)
        held_out = held_out.shuffle(seed=seed).select(range(min(data.eval_examples, len(held_out))))
    helpful = None
    if (name := data.helpful_dataset_name) is not None:
        helpful = load(name, data.helpful_dataset_split, data.helpful_dataset_config, HELPFUL)
        helpful = without_prompts_of(helpful, held_out, name, HELPFUL, counts.dropped)
    return safety, helpful, held_out
