"""What a training starts from: a model and its tokenizer, and data split into what trains, contrasts and measures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig

from sails_align.core.distributed import from_main
from sails_align.core.errors import InputError
from sails_align.data.options import DataOptions
from sails_align.data.pairs import AlignmentExamples, fingerprint, load_rows, normalize
from sails_align.data.tokens import read_chat_template
from sails_align.data.transforms import transformed
from sails_align.models import load
from sails_align.models.load import load_config
from sails_align.models.spec import identity_of


@dataclass(frozen=True)
class TrainingSource:
    """A model, by what `from_pretrained` takes, and the data."""

    model_name: str
    name: str
    """What the model is called, in messages and by SAEs that were trained on it."""
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
    _identity: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """Kept, since hashing large weights takes minutes."""

    def identity(self) -> dict[str, Any]:
        """What the model is: its commit on the hub, or the hashes of its files, if it is a local folder."""
        if not self._identity:
            commit = getattr(self.model_config, "_commit_hash", None)
            self._identity.update(from_main(lambda: identity_of(self.model_name, commit)))
        return self._identity

    def data_hash(self) -> str:
        """Content hash of the training data."""
        return fingerprint(self.train)


def load_model_config(model_args: ModelConfig, training_args: SFTConfig | DPOConfig) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        InputError: if there is no such model, or it is not cached and the hub cannot be reached.
    """
    name = model_args.model_name_or_path
    assert name is not None
    trust = training_args.trust_remote_code
    return load_config(name, revision=model_args.model_revision, trust_remote_code=trust)


def load_tokenizer(
    model_args: ModelConfig, training_args: SFTConfig | DPOConfig, template: str | None
) -> PreTrainedTokenizerBase:
    """The tokenizer, with the chat template of a Jinja file, if one is given.

    Raises:
        InputError: if it cannot be loaded, or has no chat template.
    """
    name = model_args.model_name_or_path
    assert name is not None
    trust = training_args.trust_remote_code
    tokenizer = load.load_tokenizer(name, revision=model_args.model_revision, trust_remote_code=trust)
    if template is not None:
        tokenizer.chat_template = read_chat_template(template)
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer of {name} has no chat template, so it is not known how a dialogue is to be written;\n"
            "give one with --chat_template_path (human_assistant suits base models)"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_data(
    script_args: ScriptArguments, data_args: DataOptions, seed: int
) -> tuple[Dataset, Dataset | None, Dataset, dict[str, int]]:
    """Safety pairs, helpful examples (if any), held-out pairs, and what was dropped, from the data sets named.

    Held-out pairs are the test split's; where there is no such split, they are taken from the training split.

    Raises:
        InputError: see `data.load_rows` and `data.normalize`; or if nothing is left to train on.
    """
    name = script_args.dataset_name
    if name is None:
        raise InputError("no data: give --dataset_name (a hub id or a local file), or leave --model_name_or_path out")
    if script_args.dataset_streaming:
        raise InputError("dataset_streaming is true, but examples are mixed and split by number; leave it out")
    rows = load_rows(name, config=script_args.dataset_config, split=script_args.dataset_train_split)
    normalized = normalize(rows, name=name, on_bad_rows=data_args.on_bad_rows)  # pyright: ignore[reportArgumentType]
    safety, dropped = normalized.dataset, dict(normalized.dropped)
    try:
        rows = load_rows(name, config=script_args.dataset_config, split=script_args.dataset_test_split)
    except InputError:  # no test split
        if script_args.dataset_test_split != "test":  # one that was asked for
            raise
        n_held_out = min(data_args.eval_examples, len(safety) // 5)
        if n_held_out < 1:
            raise InputError(
                f"{name} has {len(safety)} usable rows; give at least 5, so that some can be held out"
            ) from None
        parts = safety.train_test_split(test_size=n_held_out, seed=seed)
        safety, held_out = parts["train"], parts["test"]
    else:
        normalized = normalize(rows, name=name, on_bad_rows=data_args.on_bad_rows)  # pyright: ignore[reportArgumentType]
        held_out = normalized.dataset
        dropped |= {f"held-out data: {cause}": n for cause, n in normalized.dropped.items()}
        held_out = held_out.shuffle(seed=seed).select(range(min(data_args.eval_examples, len(held_out))))
    helpful = None
    if data_args.helpful_dataset_name is not None:
        rows = load_rows(
            data_args.helpful_dataset_name,
            config=data_args.helpful_dataset_config,
            split=data_args.helpful_dataset_split,
        )
        normalized = normalize(rows, name=data_args.helpful_dataset_name, on_bad_rows=data_args.on_bad_rows)  # pyright: ignore[reportArgumentType]
        helpful = normalized.dataset
        dropped |= {f"helpful data: {cause}": n for cause, n in normalized.dropped.items()}
    return safety, helpful, held_out, dropped


def assemble(
    model_args: ModelConfig,
    training_args: SFTConfig | DPOConfig,
    data_args: DataOptions,
    data: tuple[Dataset, Dataset | None, Dataset, dict[str, int]],
    name: str | None = None,
    chat_template_path: str | None = None,
    transforms: Sequence[Any] = (),
) -> TrainingSource:
    """Put model and data together: cut the safety data to size, and apply the transforms of the data.

    Args:
        model_args: TRL's; names the model.
        training_args: TRL's; of it the seed and whether to trust remote code.
        data_args: how much data.
        data: what `load_data` gives.
        name: what the model is called, if it is not what `from_pretrained` takes.
        chat_template_path: a Jinja file, in place of the tokenizer's own template.
        transforms: options of transforms.
    """
    safety, helpful, held_out, dropped = data
    if data_args.max_train_examples is not None and data_args.max_train_examples < len(safety):
        safety = safety.shuffle(seed=training_args.seed).select(range(data_args.max_train_examples))
    examples = transformed(AlignmentExamples(safety, helpful, train=safety), transforms, training_args.seed)
    assert model_args.model_name_or_path is not None
    return TrainingSource(
        model_name=model_args.model_name_or_path,
        name=name or model_args.model_name_or_path,
        tokenizer=load_tokenizer(model_args, training_args, chat_template_path),
        model_config=load_model_config(model_args, training_args),
        safety=examples.safety,
        helpful=examples.helpful,
        train=examples.train,
        held_out=held_out,
        dropped=dropped,
    )
