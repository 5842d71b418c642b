"""The plan of one training: all options, settled together and then left alone."""

import copy
import json
import logging
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import DistributedType, parse_flag_from_env
from transformers.integrations import get_available_reporting_integrations
from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig

from sails_align.core.distributed import process_index
from sails_align.core.errors import InputError
from sails_align.core.options import to_json
from sails_align.data.options import DataOptions
from sails_align.data.transforms import TRANSFORMS
from sails_align.initializers.options import InitializerOptions
from sails_align.subspace.options import PRESETS, DPOOptions, Method
from sails_align.training.callbacks import CALLBACKS
from sails_align.training.losses import LOSSES
from sails_align.training.losses.options import LossOptions

logger = logging.getLogger(__name__)

_TINY = sys.float_info.min
RANGES = {  # option -> smallest value, and the first one that is too large
    "learning_rate": (_TINY, math.inf, "a positive number"),
    "num_train_epochs": (_TINY, math.inf, "a positive number"),
    "beta": (_TINY, math.inf, "a positive number"),
    "max_length": (1, math.inf, "1 or more"),
    "per_device_train_batch_size": (1, math.inf, "1 or more"),
    "per_device_eval_batch_size": (1, math.inf, "1 or more"),
    "gradient_accumulation_steps": (1, math.inf, "1 or more"),
    "lora_r": (1, math.inf, "1 or more"),
    "lora_alpha": (_TINY, math.inf, "a positive number"),
    "lora_dropout": (0, 1, "0 or more, and less than 1"),
    "weight_decay": (0, math.inf, "0 or more"),
    "warmup_steps": (0, math.inf, "0 or more"),
    "max_grad_norm": (0, math.inf, "0 or more"),
    "dataloader_num_workers": (0, math.inf, "0 or more"),
    "adam_beta1": (0, 1, "0 or more, and less than 1"),
    "adam_beta2": (0, 1, "0 or more, and less than 1"),
    "seed": (0, 2**32, "0 or more, and less than 2 to the power of 32"),
}
T = TypeVar("T", bound=SFTConfig | DPOConfig | ModelConfig)
LORA_OPTIONS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")


def changed(options: T, **values: Any) -> T:
    """Copy options of TRL with other values. Their own checks, which might change more, do not run again."""
    copied = copy.copy(options)
    for name, value in values.items():
        assert hasattr(copied, name), name
        setattr(copied, name, value)
    return copied


@dataclass(frozen=True)
class TrainingPlan:
    """All options of one training. What is decided later on makes a new plan (`dataclasses.replace`)."""

    method: Method
    sails: InitializerOptions
    data: DataOptions
    extras: tuple[Any, ...]
    """Options of transforms, callbacks and losses, one of each class in `entry_options`."""
    script: ScriptArguments
    training: SFTConfig | DPOConfig
    model: ModelConfig
    dpo: DPOOptions
    defaults: dict[str, Any]
    """Of ours, in place of TRL's and PEFT's."""
    given: dict[str, Any]
    """The options on the command line and in the file."""

    def of(self, options: type | None) -> Any:
        """The options of an entry, by their class; None of one that has none."""
        return next((each for each in self.extras if options is not None and isinstance(each, options)), None)

    @property
    def loss(self) -> dict[str, Any] | None:
        """The loss that is built on TRL's, with its options; None: TRL's own."""
        name = self.of(LossOptions).loss
        if name is None:
            return None
        own = LOSSES.get(name).options
        return {"name": name, **({} if own is None else to_json(self.of(own)))}

    def make_loss(self) -> Any:
        """The loss that is called in training; None: TRL's own.

        Raises:
            InputError: if there is no loss of that name, or it does not suit the other options.
        """
        name = self.of(LossOptions).loss
        return None if name is None else LOSSES.get(name).load()(self.of(LOSSES.get(name).options), self.training)

    @property
    def start(self) -> str:
        """What training starts from, in one word: the initialisation, `adapter`, or `full` fine-tuning."""
        return self.sails.init or ("adapter" if self.sails.adapter_path is not None else "full")

    @property
    def engine(self) -> str:
        """What holds the weights: `single`, `ddp`, `zero1`, `zero2`, `zero3` or `fsdp`."""
        plugin = self.training.deepspeed_plugin
        if plugin is not None:
            return f"zero{plugin.zero_stage}"
        state = self.training.distributed_state
        assert state is not None
        if self._asks_for_fsdp and state.distributed_type != DistributedType.MULTI_CPU:
            return "fsdp"
        return "single" if state.num_processes == 1 else "ddp"

    @property
    def _asks_for_fsdp(self) -> bool:
        return parse_flag_from_env("ACCELERATE_USE_FSDP") or bool(self.training.fsdp)

    @property
    def chat_template_path(self) -> str | None:
        """The chat template's file; TRL has the option for SFT only."""
        return self.training.chat_template_path if isinstance(self.training, SFTConfig) else self.dpo.chat_template_path

    def to_json(self) -> dict[str, Any]:
        """Every option, resolved. Secrets are masked by transformers."""
        training = {name: _as_json(value) for name, value in self.training.to_dict().items()}
        parts: dict[str, Any] = {"sails": to_json(self.sails), "data": to_json(self.data), "training": training}
        for entries, part in ((TRANSFORMS, "data"), (CALLBACKS, "callbacks")):
            own = [to_json(self.of(entry.options)) for _, entry in entries.items() if entry.options is not None]
            parts[part] = {**parts.get(part, {}), **{name: value for options in own for name, value in options.items()}}
        parts["loss"] = self.loss
        parts |= {"script": vars(self.script), "model": vars(self.model), "dpo": vars(self.dpo)}
        return {"method": self.method, **parts}

    def settled(self) -> "TrainingPlan":
        """Return the plan with what follows from its options decided, once it is checked.

        Raises:
            InputError: for options that contradict each other.
        """
        plan = self
        if self.model.use_peft and self.sails.init is None and self.sails.adapter_path is None:
            plan = replace(self, sails=self.sails.replaced(init="sails"))
        plan._check()
        return plan

    def _check(self) -> None:
        sails = self.sails
        if not self.model.use_peft:
            given = [name for name in ("init", "adapter_path", "subspace_path") if getattr(sails, name) is not None]
            if given:
                raise InputError(
                    f"--use_peft false trains all weights, without an adapter, but --{given[0]} is given;\n"
                    "leave one of them out"
                )
        if sails.subspace_path is not None and not sails.uses_subspace:
            raise InputError(f"--subspace_path is given, but {self.start} uses no subspace; leave one of them out")
        # Not refused: one option is enough to make a baseline of a run whose other options are in a file.
        if (ignored := self._ignored()) and process_index() == 0:
            logger.warning("of no effect with %s: %s", self.start, ", ".join(ignored))
        if self.training.save_total_limit == 1:
            raise InputError(
                "save_total_limit is 1: while a checkpoint is written there is no other whole one;\nchoose 2 or more"
            )
        self._check_values()
        self.make_loss()
        adapter, output_dir = sails.adapter_path, self.training.output_dir
        if adapter is not None and output_dir is not None and Path(adapter).resolve() == Path(output_dir).resolve():
            raise InputError(f"--adapter_path is {adapter}, where the new adapter would go; give another --output_dir")
        for name in ("save_only_model", "sync_ref_model"):
            if getattr(self.training, name, False):
                raise InputError(f"{name} is true, but then a run cannot be resumed without loss; leave it out")
        if self.training.push_to_hub and self.training.hub_strategy != "every_save":  # which is TRL's default
            raise InputError("hub_strategy is given, but only the finished run is pushed; leave it out")
        services = self.training.report_to or []
        missing = [name for name in services if name not in get_available_reporting_integrations()]
        if missing:
            raise InputError(
                f"report_to is {missing[0]}, which is unknown or not installed;\n"
                f"pip install it, or choose one of: {', '.join(get_available_reporting_integrations())}, none"
            )
        self._check_engine()

    def _check_values(self) -> None:
        """Refuse numbers that transformers, PEFT and torch take, or that end in their tracebacks."""
        for options in (self.training, self.model):
            for name, (low, high, why) in RANGES.items():
                value = getattr(options, name, None)
                if isinstance(value, int | float) and not isinstance(value, bool) and not low <= value < high:
                    raise InputError(f"{name} is {value}, but must be {why}")
        if self.training.max_steps == 0:
            raise InputError("max_steps is 0, which trains nothing; leave it out, or choose 1 or more")

    def _ignored(self) -> list[str]:
        """The options given that have nothing to act on."""
        ignored = () if self.sails.uses_subspace else (*PRESETS["default"], "subspace_decay")
        if not self.model.use_peft or self.sails.adapter_path is not None:
            ignored = (*ignored, *LORA_OPTIONS)
        return [name for name in ignored if name in self.given]

    def _check_engine(self) -> None:
        init, engine = self.sails.init, self.engine
        if self._asks_for_fsdp and engine == "ddp" and process_index() == 0:
            logger.warning("accelerate has no FSDP on CPUs: this runs as DDP")
        if self.sails.initializer.needs_whole_weights and engine in ("zero3", "fsdp"):
            raise InputError(
                f"--init {init} is computed from whole weights, but {engine} splits them;\n"
                "use ZeRO-2 or DDP (accelerate_configs/zero2.yaml), or another --init"
            )
        if self.sails.uses_subspace and self.sails.subspace_mode == "decay" and engine not in ("single", "ddp"):
            raise InputError(
                f"subspace_mode decay does not work with {engine}, which trains copies or parts of the weights;\n"
                "use subspace_mode init or freeze, or train on one GPU or with DDP"
            )
        plugin = self.training.deepspeed_plugin
        stage_3 = {} if plugin is None else plugin.deepspeed_config.get("zero_optimization", {})
        if plugin is not None and engine == "zero3" and not stage_3.get("stage3_gather_16bit_weights_on_model_save"):
            raise InputError(
                "the DeepSpeed configuration lacks stage3_gather_16bit_weights_on_model_save: true, without which "
                "ZeRO-3 saves no weights;\nadd it (in accelerate's files: zero3_save_16bit_model: true)"
            )
        if engine == "fsdp" and os.environ.get("FSDP_STATE_DICT_TYPE") != "FULL_STATE_DICT":
            raise InputError(
                "FSDP is to save weights in parts, which nothing else can load;\n"
                "set fsdp_state_dict_type: FULL_STATE_DICT (as accelerate_configs/fsdp2.yaml does)"
            )


def _as_json(value: Any) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value
