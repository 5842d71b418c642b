"""Build TRL's SFTTrainer or DPOTrainer from the options, with its adapter initialized."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from sails_align.core.artifacts import content_hash
from sails_align.core.distributed import from_main, n_processes
from sails_align.core.errors import InputError, first_line
from sails_align.core.log import is_main, say
from sails_align.core.templates import TEMPLATE_ERRORS, is_from_template
from sails_align.data.loading import cache_errors
from sails_align.data.pairs import to_preference, to_sft
from sails_align.data.prefilled import is_prefilled, to_tokens
from sails_align.initializers.adapter import AdapterInit, initialize
from sails_align.initializers.difference import load_starts, save_starts, start_from
from sails_align.models.generation import end_generation
from sails_align.models.language_model import freeze_outside_decoder
from sails_align.models.load import check_whole, load_tokenizer, model_errors
from sails_align.models.quantized import is_quantized, train_in_float32, trained_values
from sails_align.subspace.basis import Subspace
from sails_align.training.callbacks import CALLBACKS
from sails_align.training.callbacks.clade import CLASS, class_names
from sails_align.training.callbacks.options import CladeOptions
from sails_align.training.dataset import TrainingSource
from sails_align.training.head import score_labelled_positions_only
from sails_align.training.identity import run_identity
from sails_align.training.losses.compose import Loss, Prepared, with_loss
from sails_align.training.plan import TrainingPlan, changed
from sails_align.training.starts import (
    adopted,
    load_base,
    loaded_model,
    lora_config,
    model_init_kwargs,
    start_examples,
)
from sails_align.training.zeroth_order.options import ZerothOrderOptions
from sails_align.training.zeroth_order.trainer import with_zeroth_order

logger = logging.getLogger(__name__)

AlignmentTrainer = SFTTrainer | DPOTrainer
PAIRS = ".pairs"
"""In the run directory while it trains: DPO's data with the precomputed log-probabilities."""
INITIAL_ADAPTER = "initial_adapter"
"""In the run directory while it trains: what is subtracted at the end, if the initialization changed the base."""
START = "start"
"""In the run directory while it trains: what is subtracted in each forward pass, if the initialization wants that."""


@dataclass(frozen=True, eq=False)
class BuiltTrainer:
    """A trainer that is ready to train."""

    trainer: AlignmentTrainer
    init: AdapterInit | None
    """How the adapter was initialized in the subspace; None without a subspace."""
    plan: TrainingPlan
    """With the adapted modules, and the shape of a trained adapter that training starts from."""
    start: dict[str, Any] | None = None
    """What an initialization that is not in a subspace found in each module, if it reports that."""


def build_trainer(
    args: TrainingPlan,
    source: TrainingSource,
    subspace: Subspace | None,
    callbacks: list[TrainerCallback] | None = None,
) -> BuiltTrainer:
    """Build a TRL trainer whose adapter starts in the subspace (None: where `--init`, `--adapter_path` or PEFT says).

    The reference of DPO is what training starts from: for a new adapter the model with the adapter off, which is the
    untouched base; else a frozen copy. Raises `InputError` if the adapter's modules do not fit the model or the
    subspace, the data does not suit the method, or `max_length` leaves no response.
    """
    score_labelled_positions_only()
    loss = args.make_loss()
    with option_errors(), cache_errors(), model_errors(source.model_name):
        trainer, args = _trainer(args, source, subspace, callbacks or [], loss)
    _check_lengths(trainer, source)
    model: Any = trainer.model
    end_generation(model, source.end.ids)
    if not args.model.use_peft:
        freeze_outside_decoder(model)
    start = _finish_start(args, source, model) if args.sails.initializer.needs_data else None
    if args.sails.initializer.changes_base:
        _keep_initial_adapter(args, model)
    init = None
    if subspace is not None:
        init = initialize(
            model,
            subspace,
            freeze=args.sails.freeze,
            layer_map=args.sails.layer_map,  # pyright: ignore[reportArgumentType] -- checked in InitializerOptions
            fold_norm=bool(args.sails.fold_norm),
            scale=args.sails.init_scale,  # pyright: ignore[reportArgumentType]
            seed=args.training.seed,
        )
    for _, entry in CALLBACKS.items():
        entry.load()(trainer, init, args)
    if isinstance(loss, Prepared):
        loss.prepare(trainer, args, source)
    if loss is not None:
        loss.begin(trainer)
    return BuiltTrainer(trainer, init, args, start)


def _finish_start(args: TrainingPlan, source: TrainingSource, model: PeftModel) -> dict[str, Any] | None:
    """Run examples through the model for an initialization that needs some. Returns what it reports of each module.

    A start that is subtracted is kept in the run directory while it trains: computed again, on another machine or in
    another process, it would differ by rounding, and the trained factors would mean something else.
    """
    entry = args.sails.initializer
    initializer, examples = entry.load(), start_examples(args, source)
    if not entry.trains_difference:
        return initializer.finish(model, examples, args.of(entry.options))
    folder, identity = Path(str(args.training.output_dir)) / START, run_identity(args, source, None)
    del identity["length"]  # a resumed run may train longer
    decides = content_hash(identity)
    if not from_main(lambda: load_starts(folder, decides) is not None):
        report = initializer.finish(model, examples, args.of(entry.options))
        from_main(lambda: save_starts(model, folder, report, decides))
        say(f"    {initializer.summary(report)}")
    kept = load_starts(folder, decides)
    assert kept is not None, "it was just saved or found"
    start_from(model, kept[0], str(args.sails.init))
    return kept[1]


@contextmanager
def option_errors() -> Iterator[None]:
    """Turn errors of TRL's, PEFT's and transformers' own checks of options into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except (*TEMPLATE_ERRORS, ImportError) as error:
        if is_from_template(error):  # the rows were checked, but not what transforms made of them
            raise InputError(
                f"the chat template refuses an example of the data: {first_line(error)};\n"
                "leave such rows out, or give another template with --chat_template_path FILE"
            ) from error
        if not isinstance(error, ValueError | TypeError | ImportError):
            raise
        raise InputError(f"TRL's trainer cannot be made of these options: {first_line(error)}") from error


def _trainer(
    args: TrainingPlan,
    source: TrainingSource,
    subspace: Subspace | None,
    callbacks: list[TrainerCallback],
    loss: Loss | None,
) -> tuple[AlignmentTrainer, TrainingPlan]:
    if getattr(source.model_config, "quantization_config", None) is None:
        trust = args.training.trust_remote_code
        from_main(lambda: check_whole(source.model_name, args.model.model_revision, trust_remote_code=trust))
    config = None
    if args.model.use_peft:
        args, config = lora_config(args, source, subspace)
    model = loaded_model(args, source, config)
    if isinstance(model, PeftModel) and args.sails.adapter_path is not None:
        args = adopted(args, model)
    values = {} if isinstance(model, str) else trained_values(model)
    init_kwargs = model_init_kwargs(args, source) if isinstance(model, str) else None
    trainer = trl_trainer(args, source, model, config, callbacks, init_kwargs, loss)
    trained: Any = trainer.model
    if is_quantized(trained):
        train_in_float32(trained, values)
    return trainer, args


def trl_trainer(
    args: TrainingPlan,
    source: TrainingSource,
    model: PreTrainedModel | PeftModel | str,
    config: PeftConfig | None,
    callbacks: list[TrainerCallback],
    init_kwargs: dict[str, Any] | None = None,
    loss: Loss | None = None,
) -> AlignmentTrainer:
    """Make TRL's trainer, which tokenizes the data; `loss` is built on its own."""
    # We push at the end: TRL would push pickles and every checkpoint, with a card of its own.
    training = changed(args.training, push_to_hub=False, model_init_kwargs=init_kwargs)
    common: dict[str, Any] = {
        "model": model,
        "processing_class": source.tokenizer,
        "peft_config": None if isinstance(model, PeftModel) else config,
        "callbacks": callbacks,
    }
    if isinstance(training, DPOConfig):
        train, held_out = (_preferences(args, source, part) for part in ("train", "held_out"))
        made = with_loss(DPOTrainer, loss)(
            ref_model=_reference_model(args, source),
            args=training,
            train_dataset=train,
            eval_dataset=held_out,
            **common,
        )
        return _with_lengths(made)
    training = changed(training, chat_template_path=None)  # it is in the tokenizer already
    train, held_out = (_sft_rows(source, rows) for rows in (source.train, source.held_out))
    if args.clade:
        train = train.add_column(CLASS, class_names(source.train, args.of(CladeOptions)))  # pyright: ignore[reportCallIssue]
    made = with_loss(SFTTrainer, loss)
    if args.of(ZerothOrderOptions).zeroth_order:
        made = with_zeroth_order(made)
    return made(args=training, train_dataset=train, eval_dataset=held_out, **common)


def _with_lengths(trainer: DPOTrainer) -> DPOTrainer:
    """Give pairs a column of lengths (tokens of the prompt and of the longer response), if batches are made by it.

    transformers' samplers look for `input_ids`, which TRL's pairs do not have, and raise a `ValueError`.
    """
    args = trainer.args
    if args.train_sampling_strategy not in ("group_by_length", "batch_rebalance"):
        return trainer

    def length(pair: dict[str, list[int]]) -> dict[str, int]:
        return {name: len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))}

    name = args.length_column_name
    trainer.train_dataset = trainer.train_dataset.map(length, desc="Measuring lengths")
    if isinstance(trainer.eval_dataset, Dataset):
        trainer.eval_dataset = trainer.eval_dataset.map(length, desc="Measuring lengths")
    trainer._set_signature_columns_if_needed()  # columns that it does not list are removed before sampling
    trainer._signature_columns = [*trainer._signature_columns, name]
    return trainer


def _sft_rows(source: TrainingSource, rows: Dataset) -> Dataset:
    """Return rows in TRL's form, tokenized if the training rows have labels of their own."""
    return to_tokens(rows, source.tokenizer) if is_prefilled(source.train) else to_sft(rows)


def _preferences(args: TrainingPlan, source: TrainingSource, part: str) -> Dataset:
    """Return a part of the data in TRL's preference form. DPO needs pairs, of harmless requests as well."""
    rows: Dataset = getattr(source, part)
    if "rejected" not in rows.column_names:
        lacking = args.data.helpful_dataset_name or args.script.dataset_name
        raise InputError(
            f"DPO compares chosen with rejected responses, and {lacking} has no rejected ones;\n"
            "give preference data (the helpful data, too), leave the helpful data out of training (--helpful_ratio 0), "
            "or use SFT"
        )
    pairs = to_preference(rows)
    if n_processes() == 1 or not getattr(args.training, "precompute_ref_log_probs", False):
        return pairs
    # TRL's main process writes what it computes next to the data, for the others to read; ours is in memory.
    folder = Path(str(args.training.output_dir)) / PAIRS / part

    def write() -> None:
        # Under ZeRO-3 TRL's key for it does not depend on the weights: results of an earlier run must not be there.
        shutil.rmtree(folder, ignore_errors=True)
        pairs.save_to_disk(folder)

    from_main(write)
    return Dataset.load_from_disk(folder)


def _reference_model(args: TrainingPlan, source: TrainingSource) -> PreTrainedModel | None:
    """Load DPO's reference, if it is not what training starts from."""
    name, trust = args.dpo.ref_model_name_or_path, args.training.trust_remote_code
    if name is None:
        return None
    from_main(lambda: check_whole(name, trust_remote_code=trust))
    tokenizer = load_tokenizer(name, trust_remote_code=trust)
    if tokenizer.get_vocab() != source.tokenizer.get_vocab():
        raise InputError(
            f"the reference model {name} has another vocabulary ({len(tokenizer)} tokens) than {source.name} "
            f"({len(source.tokenizer)});\ngive a reference of the same family, or leave --ref_model_name_or_path out"
        )
    return load_base(args, source, name)


def _keep_initial_adapter(args: TrainingPlan, model: PeftModel) -> None:
    """Save the initial adapter. The adapter saved at the end is the difference from it, a plain LoRA adapter."""
    config = model.peft_config["default"]
    config.init_lora_weights = True  # pyright: ignore[reportAttributeAccessIssue]
    if is_main():
        folder = Path(str(args.training.output_dir)) / INITIAL_ADAPTER
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(str(folder), selected_adapters=["default"])
    # For checkpoints, so that loading one changes the base weights as training did.
    config.init_lora_weights = args.sails.init  # pyright: ignore[reportAttributeAccessIssue]


def left_out(trainer: AlignmentTrainer, source: TrainingSource) -> dict[str, int]:
    """Count the examples of each part of the data that TRL drops, because their prompts alone fill `max_length`.

    A part that is packed is left out: TRL's rows are not examples then.
    """
    kept: dict[str, Any] = {"training": trainer.train_dataset, "held-out": trainer.eval_dataset}
    packed = {"training": False, "held-out": False}
    if isinstance(trainer.args, SFTConfig):
        packing, eval_packing = trainer.args.packing, trainer.args.eval_packing
        packed = {"training": packing, "held-out": packing if eval_packing is None else eval_packing}
    return {part: len(rows) - len(kept[part]) for part, rows in _parts(source).items() if not packed[part]}


def _parts(source: TrainingSource) -> dict[str, Dataset]:
    return {"training": source.train, "held-out": source.held_out}


def _check_lengths(trainer: AlignmentTrainer, source: TrainingSource) -> None:
    """Refuse a `max_length` that leaves no example, and warn of the examples that it leaves out."""
    max_length = trainer.args.max_length  # pyright: ignore[reportAttributeAccessIssue]
    for part, n in left_out(trainer, source).items():
        n_given = len(_parts(source)[part])
        what = f"the prompts alone of {n} of {n_given} {part} examples fill max_length {max_length}"
        if n == n_given:
            raise InputError(f"{what}: no response is left;\nchoose a larger --max_length")
        if n:
            logger.warning("%s: they are left out (a larger --max_length keeps them)", what)
