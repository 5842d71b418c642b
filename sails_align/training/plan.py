"""Hold all options of one training, checked together and never changed afterwards."""

import copy
import json
from dataclasses import dataclass
from typing import Any, TypeVar

from accelerate.utils import DistributedType, parse_flag_from_env
from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig

from sails_align.core.options import to_json
from sails_align.core.registry import Registry
from sails_align.data.options import DataOptions
from sails_align.data.transforms import TRANSFORMS
from sails_align.initializers import INITIALIZERS
from sails_align.initializers.options import InitializerOptions
from sails_align.subspace.options import DPOOptions, Method
from sails_align.training.callbacks import CALLBACKS
from sails_align.training.callbacks.options import CladeOptions
from sails_align.training.losses import LOSSES
from sails_align.training.losses.options import LossOptions

T = TypeVar("T", bound=SFTConfig | DPOConfig | ModelConfig | ScriptArguments)


def changed(options: T, **values: Any) -> T:
    """Copy options of TRL with other values. Their own checks, which might change more, do not run again."""
    copied = copy.copy(options)
    for name, value in values.items():
        assert hasattr(copied, name), name
        setattr(copied, name, value)
    return copied


@dataclass(frozen=True)
class TrainingPlan:
    """All options of one training. A later decision makes a new plan (`dataclasses.replace`)."""

    method: Method
    sails: InitializerOptions
    data: DataOptions
    extras: tuple[Any, ...]
    """Options of the output and of initializations, transforms, callbacks and losses, one of each class."""
    script: ScriptArguments
    training: SFTConfig | DPOConfig
    model: ModelConfig
    dpo: DPOOptions
    defaults: dict[str, Any]
    """Of ours, in place of TRL's and PEFT's."""
    given: dict[str, Any]
    """The options on the command line and in the file."""
    name: str = ""
    """The model's name in messages, and in SAEs that are trained on it, once the plan is `run.resolved`."""

    def of(self, options: type | None) -> Any:
        """Return the options of an entry, by their class; None of an entry that has none."""
        return next((each for each in self.extras if options is not None and isinstance(each, options)), None)

    @property
    def model_name(self) -> str:
        """Return the model's folder or id, once the plan is `run.resolved`."""
        assert self.model.model_name_or_path is not None
        return self.model.model_name_or_path

    @property
    def loss(self) -> dict[str, Any] | None:
        """Return the name and the options of the loss that is built on TRL's; None: TRL's own."""
        name = self.of(LossOptions).loss
        if name is None:
            return None
        own = self.of(LOSSES.get(name).options)
        return {"name": name, **({} if own is None else to_json(own))}

    def make_loss(self) -> Any:
        """Make the loss of the training; None: TRL's own.

        Raises `InputError` if there is no loss of that name, or it does not suit the other options.
        """
        name = self.of(LossOptions).loss
        return None if name is None else LOSSES.get(name).load()(self.of(LOSSES.get(name).options), self.training)

    @property
    def start(self) -> str:
        """Return what is trained, in one word: the initialization, `adapter`, `clade`, or `full` fine-tuning."""
        if self.clade:
            return "clade"
        return self.sails.init or ("adapter" if self.sails.adapter_path is not None else "full")

    @property
    def clade(self) -> bool:
        """Return whether norms that depend on the category of the request are trained, and nothing else."""
        options = self.of(CladeOptions)
        return options is not None and options.clade is not None

    @property
    def engine(self) -> str:
        """Return what distributes the weights: `single`, `ddp`, `zero1`, `zero2`, `zero3` or `fsdp`."""
        plugin = self.training.deepspeed_plugin
        if plugin is not None:
            return f"zero{plugin.zero_stage}"
        state = self.training.distributed_state
        assert state is not None
        if self.asks_for_fsdp and state.distributed_type != DistributedType.MULTI_CPU:
            return "fsdp"
        return "single" if state.num_processes == 1 else "ddp"

    @property
    def asks_for_fsdp(self) -> bool:
        """Return whether FSDP is asked for, which accelerate has on GPUs only."""
        return parse_flag_from_env("ACCELERATE_USE_FSDP") or bool(self.training.fsdp)

    @property
    def chat_template_path(self) -> str | None:
        """Return the chat template's file; TRL has the option for SFT only."""
        return self.training.chat_template_path if isinstance(self.training, SFTConfig) else self.dpo.chat_template_path

    def to_json(self) -> dict[str, Any]:
        """Return every option, resolved. transformers masks secrets."""
        return {
            "method": self.method,
            "sails": {**to_json(self.sails), **self._options_of(INITIALIZERS)},
            "data": {**to_json(self.data), **self._options_of(TRANSFORMS)},
            "callbacks": self._options_of(CALLBACKS),
            "loss": self.loss,
            "training": {name: _as_json(value) for name, value in self.training.to_dict().items()},
            "script": vars(self.script),
            "model": vars(self.model),
            "dpo": vars(self.dpo),
        }

    def _options_of(self, registry: Registry) -> dict[str, Any]:
        """Return the options of a registry's entries."""
        own = [to_json(self.of(entry.options)) for _, entry in registry.items() if entry.options is not None]
        return {name: value for options in own for name, value in options.items()}


def _as_json(value: Any) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value
