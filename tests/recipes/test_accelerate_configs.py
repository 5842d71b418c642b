"""The launch configurations: accelerate reads every key of them, and what they start is what they say."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser
from accelerate.utils import DistributedType
from paths import ROOT
from processes import PATIENCE

FOLDER = ROOT / "accelerate_configs"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
ZERO_STAGES = {"zero1.yaml": 1, "zero2.yaml": 2, "zero3.yaml": 3, "zero3_offload.yaml": 3, "multi_node.yaml": 2}
SCRIPT = """
import sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
print(f"<rank {dist.get_rank()} of {total.item():.0f}{' '.join(['', *sys.argv[1:]])}>", flush=True)
dist.destroy_process_group()
"""


def test_the_files_are_those_that_are_documented() -> None:
    text = (ROOT / "docs" / "fits.md").read_text()
    assert len(FILES) == 9
    assert all(f"`{name}`" in text for name in FILES)


@pytest.mark.parametrize("name", FILES)
def test_accelerate_knows_every_key(name: str) -> None:
    config = read(FOLDER / name)
    assert config.deepspeed_config is not None
    assert config.mixed_precision == "no"  # the recipe's bf16 decides
    assert config.use_cpu is False  # true would start one process
    assert config.num_processes % config.num_machines == 0
    if config.num_processes > 1:
        assert config.main_process_port == (0 if config.num_machines == 1 else 29500)
    assert config.deepspeed_config.get("zero_stage") == ZERO_STAGES.get(name)
    assert (config.distributed_type == DistributedType.DEEPSPEED) == (name in ZERO_STAGES)


@pytest.mark.parametrize("wrong", [{"num_procs": 2}, {"fsdp_config": {"fsdp_wrap": "x"}}])
def test_an_unknown_key_is_found(wrong: dict, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load((FOLDER / "fsdp2.yaml").read_text()) | wrong))
    with pytest.raises((ValueError, AssertionError), match=r"num_procs|fsdp_wrap"):
        read(path)


@pytest.mark.parametrize("name", FILES)
def test_it_starts_the_launcher_it_is_for(name: str) -> None:
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(FOLDER / name), "x"]))
    kinds = {"multi_gpu": args.multi_gpu, "deepspeed": args.use_deepspeed, "fsdp": args.use_fsdp}
    wanted = {"cpu.yaml": "multi_gpu", "multi_gpu.yaml": "multi_gpu", "fsdp2.yaml": "fsdp"}
    assert [kind for kind, on in kinds.items() if on] == (
        ["deepspeed"] if name in ZERO_STAGES else [wanted[name]] if name in wanted else []
    )
    if name == "fsdp2.yaml":
        assert (args.fsdp_version, args.fsdp_auto_wrap_policy) == (2, "TRANSFORMER_BASED_WRAP")
    if name == "zero3_offload.yaml":
        assert (args.offload_optimizer_device, args.offload_param_device) == ("cpu", "cpu")


def read(path: Path) -> ClusterConfig:
    """A configuration; accelerate itself checks the keys at the top only, and ignores unknown ones below them."""
    known = vars(launch_command_parser().parse_args(["script.py"]))
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.deepspeed_config is not None
    assert config.fsdp_config is not None
    for key in (*config.deepspeed_config, *config.fsdp_config):
        assert key in known, f"accelerate has no option {key}"
    return config


# What they start


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "ranks.py").write_text(SCRIPT)
    return tmp_path / "ranks.py"


@pytest.fixture
def port_in_use() -> Iterator[str]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield str(taken.getsockname()[1])


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT, env=env)


def launch(name: str, script: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return run(
        ["accelerate", "launch", "--config_file", str(FOLDER / name), "--num_processes", "2", *more, str(script)]
    )


def ranks(output: str) -> list[str]:
    return sorted(re.findall(r"<(rank .*?)>", output))  # lines of two processes may run together


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["cpu.yaml", "zero2.yaml"])
def test_two_processes(name: str, script: Path) -> None:
    done = launch(name, script)
    assert done.returncode == 0, done.stderr
    assert ranks(done.stdout) == ["rank 0 of 2", "rank 1 of 2"]


@pytest.mark.distributed
def test_a_port_in_use_on_one_machine_is_avoided(script: Path, port_in_use: str) -> None:
    done = launch("multi_gpu.yaml", script, "--main_process_port", port_in_use)
    assert done.returncode == 0, done.stderr
    assert ranks(done.stdout) == ["rank 0 of 2", "rank 1 of 2"]
    assert f"Port `{port_in_use}` is already in use" in done.stderr


def test_a_port_in_use_with_several_machines_is_explained(script: Path, port_in_use: str) -> None:
    options = ["--config_file", str(FOLDER / "multi_node.yaml"), "--main_process_ip", "127.0.0.1"]
    args = launch_command_parser().parse_args([*options, "--main_process_port", port_in_use, str(script)])
    with pytest.raises(ConnectionError) as explained:
        launch_command(args)
    for told in (f"on port `{port_in_use}`", "another process is utilizing it", "--main_process_port"):  # what, why, do
        assert told in str(explained.value)


@pytest.mark.distributed
def test_the_slurm_script_starts_all_machines(script: Path, tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands, which take this machine for two with one GPU each."""
    each = 'SLURM_NODEID=$id "$@" & started="$started $!"'
    stand_ins = {
        "scontrol": "echo 127.0.0.1; sleep 0.1; echo other",
        "srun": f"shift; for id in 0 1; do {each}; done; for process in $started; do wait $process; done",
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join((str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]))
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    command = ["bash", str(FOLDER / "multi_node.slurm"), str(script), "--output_dir", "a b"]
    done = run(command, **slurm, SLURM_JOB_NODELIST="two", PATH=path)
    assert done.returncode == 0, done.stderr
    expected = "--output_dir a b --resume_from_checkpoint true"
    assert ranks(done.stdout) == [f"rank {rank} of 2 {expected}" for rank in (0, 1)]
