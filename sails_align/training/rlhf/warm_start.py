"""Train the model that reinforcement learning starts from: the base, fine-tuned on a few refusals and answers.

<folder>/model.safetensors, config.json, tokenizer.json, ...   the model
<folder>/run.json   what it was made from and the hash of its weights; written last
"""

from pathlib import Path

from sails_align.core.artifacts import content_hash, file_hash
from sails_align.core.distributed import from_main, n_processes
from sails_align.core.errors import InputError
from sails_align.core.files import read_record, write_json
from sails_align.core.log import is_main
from sails_align.models.load import load_tokenizer
from sails_align.testbed.build import Testbed
from sails_align.training import run as align
from sails_align.training.checkpoints import train
from sails_align.training.rlhf.options import WEIGHTS, RlhfPlan
from sails_align.training.save import save_model
from sails_align.training.trainer import build_trainer

BATCH = 16
"""Examples in a batch of all processes."""
NOT_IN_IDENTITY = ("output_dir", "disable_tqdm", "save_strategy")
"""Options that do not change the warm start."""


def warm_start(args: RlhfPlan, testbed: Testbed, folder: Path) -> Path:
    """Return the folder of the model that reinforcement learning starts from.

    It is the one named, or the base fine-tuned on a few refusals and answers, which is not trained again if it is
    complete and was made with the same options. Raises `InputError` if the one named has no tokenizer, or another
    vocabulary than the testbed.
    """
    reference, training = args.reference, args.training
    if reference.warm_start_path is not None:
        _check_vocabulary(Path(reference.warm_start_path), testbed)
        return Path(reference.warm_start_path)
    if reference.warm_start_examples == 0:
        return Path(testbed.model_path)
    options = {
        "model_name_or_path": reference.model_name_or_path or "testbed",
        "use_peft": False,
        "max_train_examples": reference.warm_start_examples,
        "helpful_ratio": reference.warm_start_ratio,
        "num_train_epochs": reference.warm_start_epochs,
        "learning_rate": reference.warm_start_learning_rate,
        "per_device_train_batch_size": max(1, BATCH // n_processes()),
        "seed": training.seed,
        "use_cpu": training.use_cpu,
        "bf16": training.bf16,
        "disable_tqdm": training.disable_tqdm,
        "save_strategy": "no",
        "output_dir": folder,
    }
    made_from = content_hash(
        {name: str(value) for name, value in options.items() if name not in NOT_IN_IDENTITY}
        | {"base": file_hash(Path(testbed.model_path) / WEIGHTS), "n_processes": n_processes()}
    )
    if from_main(lambda: _is_whole(folder, made_from)):
        return folder
    sft = align.parse("sft", [word for name, value in options.items() for word in (f"--{name}", str(value))])
    sft, sft_testbed = align.resolved(sft)
    built = build_trainer(sft, align.load_source(sft, sft_testbed), None)
    train(built.trainer, None)
    save_model(built.plan, built.trainer, folder)
    if is_main():  # last: a folder that has it is complete
        write_json(folder / "run.json", {"made_from": made_from, "sha256": file_hash(folder / WEIGHTS)})
    from_main(lambda: None)  # no process reads before all is written
    return folder


def _is_whole(folder: Path, made_from: str) -> bool:
    """Return whether a warm start is complete and was made from these options."""
    weights = folder / WEIGHTS
    found = read_record(folder / "run.json")
    return weights.is_file() and found == {"made_from": made_from, "sha256": file_hash(weights)}


def _check_vocabulary(folder: Path, testbed: Testbed) -> None:
    if load_tokenizer(str(folder)).get_vocab() != load_tokenizer(testbed.model_path).get_vocab():
        raise InputError(
            f"the warm start {folder} has another vocabulary than the testbed;\n"
            "give a model that was fine-tuned from this testbed's base"
        )
