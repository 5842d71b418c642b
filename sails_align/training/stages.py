"""Name the stages of a training, and describe in one line what each works on."""

from pathlib import Path

from transformers import Trainer

from sails_align.core.distributed import n_processes
from sails_align.core.log import LOG_FILE, say
from sails_align.subspace.basis import Subspace
from sails_align.training.dataset import TrainingSource
from sails_align.training.plan import TrainingPlan


def stages_of(args: TrainingPlan) -> list[str]:
    """Return the names of a training's stages, in order."""
    return [
        "model",
        "data",
        *["subspace"] * args.sails.uses_subspace,
        (args.model.use_peft and "adapter") or "weights",
        "training",
        "evaluation",
    ]


def say_start(args: TrainingPlan, output_dir: Path) -> None:
    """Say what is trained, and where the results go."""
    steps = "supervised fine-tuning" if args.method == "sft" else "preference optimization (DPO)"
    say(f"{steps} (start: {args.start}); output: {output_dir}/ (all lines: {LOG_FILE})")


def model_line(args: TrainingPlan) -> str:
    """Describe the model, and what it is trained on."""
    bits = "4 bits" if args.model.load_in_4bit else "8 bits" if args.model.load_in_8bit else args.model.dtype
    device, n = str(args.training.device).partition(":")[0], n_processes()
    where = f"{device}, {n} processes ({args.engine})" if n > 1 else device
    return f"{args.model.model_name_or_path or 'testbed'}, {bits or 'float32'}, on {where}"


def data_line(args: TrainingPlan) -> str:
    """Name the data sets."""
    safety, helpful = args.script.dataset_name, args.data.helpful_dataset_name
    if safety is None:
        return "the testbed's"
    return f"{safety}" if helpful is None else f"{safety}; harmless requests: {helpful}"


def say_data(source: TrainingSource) -> None:
    """Say how many examples there are."""
    helpful = "" if source.helpful is None else f" and {len(source.helpful):,} harmless ones"
    n_dropped, n_paired = sum(source.dropped.values()), source.n_paired
    left_out = f", {n_dropped:,} rows left out" * bool(n_dropped)
    paired = f", {n_paired:,} rows labelled bad are rejected responses" * bool(n_paired)
    kinds = "".join(f", {n:,} of them {kind} examples" for kind, n in source.prefilled().items())
    say(
        f"    {len(source.train):,} examples to train on{kinds}, {len(source.held_out):,} held out; "
        f"from {len(source.safety):,} harmful requests{helpful}{left_out}{paired}"
    )


def subspace_line(args: TrainingPlan) -> str:
    """Name what the subspace is found with."""
    if args.sails.subspace_path is not None:
        return f"from {args.sails.subspace_path}"
    source = args.sails.saes()
    return f"{args.sails.init}" + (f", SAEs {source.release or source.path}" if source.named else "")


def say_subspace(subspace: Subspace) -> None:
    """Say how many directions each layer has."""
    by_layer = ", ".join(f"{basis_DR.shape[1]} in layer {layer}" for layer, basis_DR in subspace.bases.items())
    say(f"    directions: {by_layer}")


def training_line(trainer: Trainer, checkpoint: str | None) -> str:
    """Describe the size of the training."""
    args = trainer.args
    batch = trainer.get_total_train_batch_size(args)
    length = f"{args.max_steps:,} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    resumed = "" if checkpoint is None else f", resumed from {checkpoint}"
    return f"{length} in batches of {batch} examples, learning rate {args.learning_rate:g}{resumed}"
