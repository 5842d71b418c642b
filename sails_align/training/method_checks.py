"""Refuse options of single methods (losses, callbacks, data transforms), given without them or of no use to them."""

from dataclasses import fields

from trl import SFTConfig

from sails_align.core.errors import InputError
from sails_align.data.options import CurriculumOptions, DertaOptions, NearestRefusalOptions
from sails_align.training.callbacks.options import CladeOptions, FreezeUnitsOptions, SiftOptions
from sails_align.training.losses.options import LossOptions, RedundancyOptions
from sails_align.training.plan import TrainingPlan


def check_loss(args: TrainingPlan) -> None:
    """Refuse a loss that does not suit what is trained."""
    name = args.of(LossOptions).loss
    if name == "redundancy" and not args.model.use_peft:
        raise InputError("loss is redundancy, which is of an adapter, but use_peft is false; leave one of them out")
    if name == "redundancy" and args.sails.adapter_path is None:
        groups, rank = args.of(RedundancyOptions).redundancy_groups, args.model.lora_r
        if groups > rank:
            raise InputError(f"redundancy_groups is {groups}, but lora_r is {rank}; choose at most that")
    if name == "sspu" and args.start not in ("default", "gaussian"):
        raise InputError(
            f"loss is sspu, which finds its own subspace for a new adapter, but training starts from {args.start};\n"
            "add --init default"
        )
    is_base = args.model.use_peft and args.sails.adapter_path is None and args.sails.initializer.exact
    if name == "crisp" and not is_base:
        raise InputError(
            f"loss is crisp, which compares with the base model, but training starts from {args.start};\n"
            "add --init default"
        )


def check_units(args: TrainingPlan) -> None:
    """Refuse to freeze units that are not there, or that the start of the training does not leave frozen."""
    options, sails = args.of(FreezeUnitsOptions), args.sails
    given = [name for name in ("frozen_units", "trained_units") if name in args.given]
    if options.freeze_units is None:
        if given:
            raise InputError(f"{given[0]} is given without freeze_units; add --freeze_units, or leave it out")
        return
    if options.trained_units is not None and len(given) == 2:
        raise InputError("frozen_units and trained_units are both given; leave one of them out")
    start = "adapter_path" if sails.adapter_path is not None else "use_dora" if args.model.use_dora else None
    if (
        start is None
        and args.model.use_peft
        and (sails.initializer.changes_base or sails.initializer.trains_difference)
    ):
        start = f"init {sails.init}"
    if start is not None:
        raise InputError(
            f"freeze_units does not work with {start}: the adapter would change the frozen units;\n"
            "start with a new adapter (after sails merge, if there is a trained one), or with --use_peft false"
        )


def check_sift(args: TrainingPlan) -> None:
    """Refuse options of SIFT without it, and what it cannot be used with."""
    options = args.of(SiftOptions)
    given = [option.name for option in fields(SiftOptions) if option.name in args.given]
    if options.sift_rate is None:
        if given:
            raise InputError(f"{given[0]} is given without sift_rate; add --sift_rate, or leave it out")
        return
    if args.model.use_peft:
        raise InputError(
            f"sift_rate is {options.sift_rate}, which trains few entries of all weights, and an adapter is few weights "
            "already;\nadd --use_peft false, or leave it out"
        )
    if args.of(FreezeUnitsOptions).freeze_units is not None:
        raise InputError("sift_rate and freeze_units both choose what is frozen; leave one of them out")
    if "sift_forbidden" in given and options.sift_safety_dataset_name is None:
        raise InputError(
            "sift_forbidden is given without sift_safety_dataset_name, which says what it protects; give both"
        )


def check_prefilled(args: TrainingPlan) -> None:
    """Refuse what cannot work with examples that have labels of their own, as DeRTa's."""
    options, training = args.of(DertaOptions), args.training
    if options is None or options.used is None:
        return
    given = f"{options.used} is {getattr(options, options.used)}"
    if not isinstance(training, SFTConfig):
        raise InputError(f"{given}, but DPO compares whole responses; leave it out, or use SFT")
    if training.assistant_only_loss:
        raise InputError(
            f"{given} and assistant_only_loss is true, but these examples have labels of their own;\n"
            "leave one of them out"
        )
    if training.completion_only_loss is False:
        raise InputError(f"{given}, but completion_only_loss false trains on the harmful words, too; leave it out")
    if (training.packing or training.eval_packing) and training.packing_strategy != "bfd":
        raise InputError(
            f"{given}, but packing_strategy {training.packing_strategy} parts examples from their requests;\n"
            "use bfd, TRL's default"
        )


def check_stages(args: TrainingPlan) -> None:
    """Refuse what would part or shuffle the stages of a curriculum, which one epoch goes through in their order."""
    options, training = args.of(CurriculumOptions), args.training
    if options is None or options.refusal_stages is None:
        return
    given = f"refusal_stages is {options.refusal_stages}"
    if not args.of(NearestRefusalOptions).nearest_refusal:
        raise InputError(f"{given} without nearest_refusal, by which examples are ordered; add --nearest_refusal true")
    if training.train_sampling_strategy != "sequential":
        raise InputError(
            f"{given}, but train_sampling_strategy {training.train_sampling_strategy} changes the order of examples;\n"
            "add --train_sampling_strategy sequential (each stage is shuffled)"
        )
    if isinstance(training, SFTConfig) and training.packing:
        raise InputError(f"{given}, but packing changes the order of examples; leave one of them out")
    if training.max_steps <= 0 and training.num_train_epochs != 1:
        raise InputError(
            f"{given}, and num_train_epochs is {training.num_train_epochs:g}, but all stages together are one epoch;\n"
            "add --num_train_epochs 1, and choose the number of stages"
        )


def check_clade(args: TrainingPlan) -> None:
    """Refuse what cannot work with norms that are told the class of each row, and all else that is trained."""
    training = args.training
    if not args.clade:
        if "clade_layer" in args.given:
            raise InputError("clade_layer is given without clade; add --clade categories, or leave it out")
        return
    given = f"clade is {args.of(CladeOptions).clade}"
    if not isinstance(training, SFTConfig):
        raise InputError(f"{given}, which is for SFT only; leave it out, or use sails train sft")
    if args.model.use_peft:
        raise InputError(f"{given}, which trains norms and no LoRA adapter; add --use_peft false")
    used = {
        "packing": training.packing or training.eval_packing,
        "padding_free": training.padding_free,
        "torch_compile": training.torch_compile,
        "freeze_units": args.of(FreezeUnitsOptions).freeze_units is not None,
        "sift_rate": args.of(SiftOptions).sift_rate is not None,
        str(args.of(DertaOptions).used): args.of(DertaOptions).used is not None,
    }
    if option := next((name for name, is_used in used.items() if is_used), None):
        raise InputError(f"{given}, which does not work with {option}; leave one of them out")
