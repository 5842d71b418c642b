"""A recipe's run as one of several processes, and a record of what went on inside it.

accelerate launch --config_file FILE tests/watched_run.py METHOD FOLDER [options of the recipe]

FOLDER/step             the last optimizer step that was begun
FOLDER/watched.json     losses, how the adapter started, what discovery ran on
FOLDER/start.safetensors   logits before the first step, of the model and with its adapter off
"""

import json
import os
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft import PeftModel
from peft.utils.integrations import gather_params_ctx
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from sails_align.core.errors import exit_on_input_error
from sails_align.core.files import write_text
from sails_align.subspace import discovery as subspaces
from sails_align.training import run as align


class Watch(TrainerCallback):
    """Keeps the record; the main process writes it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.record = folder, {"losses": {}, "start_step": None, "adapter_at_start": None}

    def load_truncated(self, *args: Any, **kwargs: Any) -> Any:
        model = load_truncated(*args, **kwargs)
        self.record["discovery_is_whole"] = all(
            parameter.numel() > 0 and not hasattr(parameter, "ds_id") for parameter in model.parameters()
        )
        return model

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        self.record["start_step"] = state.global_step
        self.record["in_parts"] = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        factors = [parameter for name, parameter in model.named_parameters() if ".default." in name]
        with gather_params_ctx(factors, modifier_rank=None):
            self.record["adapter_at_start"] = [factor.double().abs().sum().item() for factor in factors]
        model.eval()
        ids_BS = torch.arange(4, 44).view(4, 10)
        own = model(input_ids=ids_BS).logits
        with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
            base = model(input_ids=ids_BS).logits
        model.train()
        if state.is_world_process_zero:
            save_file({"own": own.contiguous(), "base": base.contiguous()}, self.folder / "start.safetensors")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_text(self.folder / "step", str(state.global_step))
        time.sleep(float(os.environ.get("PAUSE", "0")))  # for those who want to kill it just now

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.record["losses"][state.global_step] = logs
        if state.is_world_process_zero:
            write_text(self.folder / "watched.json", json.dumps(self.record))


def use_fsdp_on_cpu() -> None:
    """accelerate has FSDP on GPUs only: on the CPU it takes DDP instead. PyTorch's FSDP2 itself works there."""
    parse = align.parse

    def parse_and_pretend(*args: Any, **kwargs: Any) -> Any:
        parsed = parse(*args, **kwargs)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return parsed

    align.parse = parse_and_pretend


def main() -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        use_fsdp_on_cpu()
    method, folder, *options = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    watch = Watch(Path(folder))
    subspaces.load_truncated = watch.load_truncated
    align.build_trainer = partial(align.build_trainer, callbacks=[watch])
    with exit_on_input_error():
        align.main(method, options)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    load_truncated = subspaces.load_truncated
    main()
