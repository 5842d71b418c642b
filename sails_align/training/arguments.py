"""All options of one training, and what follows from them together."""

import json
import logging
from dataclasses import dataclass
from typing import Any

from accelerate.utils import DistributedType, parse_flag_from_env
from transformers.integrations import get_available_reporting_integrations
from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig

from sails_align.config import DataArguments, DPOArguments, Method, SailsArguments, to_json
from sails_align.distributed import process_index
from sails_align.errors import InputError

logger = logging.getLogger(__name__)

CHANGES_BASE = ("pissa", "olora")
"""Initialisations that take the adapter's first product out of the base weights, and so change these."""
NOT_EXACT = (*CHANGES_BASE, "orthogonal")
"""Initialisations whose first forward pass is the base model's only up to rounding, or not with the adapter off."""
NEEDS_WHOLE_WEIGHTS = (*CHANGES_BASE, "eva")


@dataclass
class Arguments:
    """All options of one training."""

    method: Method
    sails: SailsArguments
    data: DataArguments
    script: ScriptArguments
    training: SFTConfig | DPOConfig
    model: ModelConfig
    dpo: DPOArguments
    given: dict[str, Any]
    """The options that were given or have a default of ours, as `--config` takes them."""

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
        training = {name: value for name, value in self.training.to_dict().items() if _is_json(value)}
        parts = {"sails": to_json(self.sails), "data": to_json(self.data), "training": training}
        parts |= {"script": vars(self.script), "model": vars(self.model), "dpo": vars(self.dpo)}
        return {"method": self.method, **parts}

    def settle(self) -> None:
        """Refuse options that contradict each other, and settle those that follow from others.

        Raises:
            InputError: for a contradiction.
        """
        sails = self.sails
        if not self.model.use_peft:
            given = [name for name in ("init", "adapter_path", "subspace_path") if getattr(sails, name) is not None]
            if given:
                raise InputError(
                    f"--use_peft false trains all weights, without an adapter, but --{given[0]} is given;\n"
                    "leave one of them out"
                )
        elif sails.init is None and sails.adapter_path is None:
            sails.init = "sails"
        if self.training.save_total_limit == 1:
            raise InputError(
                "save_total_limit is 1: while a checkpoint is written there is no other whole one;\nchoose 2 or more"
            )
        if self.training.push_to_hub and self.training.hub_strategy != "every_save":  # which is TRL's default
            raise InputError("hub_strategy is given, but only the finished run is pushed; leave it out")
        services = self.training.report_to or []
        missing = [name for name in services if name not in get_available_reporting_integrations()]
        if missing:
            raise InputError(
                f"report_to is {missing[0]}, which is unknown or not installed;\n"
                f"pip install it, or choose one of: {', '.join(get_available_reporting_integrations())}, none"
            )
        self._settle_engine()

    def _settle_engine(self) -> None:
        init, engine = self.sails.init, self.engine
        if self._asks_for_fsdp and engine == "ddp" and process_index() == 0:
            logger.warning("accelerate has no FSDP on CPUs: this runs as DDP")
        if init in NEEDS_WHOLE_WEIGHTS and engine in ("zero3", "fsdp"):
            raise InputError(
                f"--init {init} is computed from whole weights, but {engine} splits them;\n"
                "use ZeRO-2 or DDP (accelerate_configs/zero2.yaml), or another --init"
            )
        if self.sails.uses_subspace and self.sails.subspace_mode == "decay" and engine not in ("single", "ddp"):
            raise InputError(
                f"subspace_mode decay does not work with {engine}, which trains copies or parts of the weights;\n"
                "use subspace_mode init or freeze, or train on one GPU or with DDP"
            )


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
