"""Push a finished run, or a merged model, to the hub: only the files that others need.

`Trainer.push_to_hub` is not used: it overwrites README.md with a model card of its own, and pushes the whole folder,
including the pickle training_args.bin and judged responses.
"""

import glob
import re
import shlex
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from sails_align.core.errors import InputError, first_line

HubConnectionError: type[Exception] = HfHubHTTPError.__bases__[0]
"""What the hub's client raises without a connection: of httpx, and from huggingface_hub 2 on of httpx2."""

FILES = (
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "clade.json",
    "clade.safetensors",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "sparse_delta.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "run.json",
    "config.yaml",
    "metrics.json",
    "subspace/subspace.json",
    "subspace/subspace.safetensors",
)
"""Patterns of the files that are pushed."""
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
"""A token of the hub."""


def push(
    folder: Path, repo_id: str, *, private: bool | None = None, revision: str | None = None, token: str | None = None
) -> str:
    """Upload a finished run, or a merged model, in one commit. Returns the address of the repository.

    Args:
        folder: with its model card.
        repo_id: `user/name`; without a user, the token's. It is created if it does not exist.
        private: of a new repository; None: as the account has it.
        revision: branch, created if it does not exist; None: `main`.
        token: None: the one of `hf auth login`, or HF_TOKEN.

    Raises:
        InputError: if the folder has no model, a file contains a token, or the hub cannot be reached or refuses.
    """
    files = sorted(files_to_push(folder))
    if not any(name.endswith(".safetensors") for name in files):
        raise InputError(f"{folder} holds no adapter and no model to push; give the folder of a finished run")
    _refuse_tokens(folder, files, token or get_token())
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            revision=revision,
            commit_message="Finished run of sails-align",
            allow_patterns=[glob.escape(name) for name in files],
        )
    except (OSError, RuntimeError, ValueError, HubConnectionError) as error:  # each is raised by the hub's client
        raise InputError(
            f"cannot push to {repo_id}: {first_line(error)}\n"
            f"everything is saved in {folder}; check the connection, the name and the token, then push it with\n"
            f"{upload_command(folder, repo_id, files, private=private, revision=revision)}"
        ) from error
    return str(repo)


def files_to_push(folder: Path) -> Iterator[str]:
    """Yield the paths within the folder of the files that are pushed."""
    for path in (path for path in (*folder.glob("*"), *folder.glob("subspace/*")) if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if any(fnmatch(name, pattern) for pattern in FILES):
            yield name


def upload_command(folder: Path, repo_id: str, files: list[str], *, private: bool | None, revision: str | None) -> str:
    """Return the command that pushes the same files later."""
    words = ["hf", "upload", repo_id, str(folder), "."]
    words += ["--private"] * bool(private) + (["--revision", revision] if revision is not None else [])
    patterns = [name for name in files if "/" not in name and not fnmatch(name, "model-*-of-*.safetensors")]
    patterns += ["model-*.safetensors"] * any(fnmatch(name, "model-*-of-*.safetensors") for name in files)
    patterns += ["subspace/*"] * any("/" in name for name in files)
    return shlex.join([*words, *(word for pattern in patterns for word in ("--include", pattern))])


def _refuse_tokens(folder: Path, files: list[str], token: str | None) -> None:
    """Refuse files with a token: run.json has it if it was given within another option (such as model_init_kwargs)."""
    for name in (name for name in files if not name.endswith((".safetensors", ".model"))):
        text = (folder / name).read_text(encoding="utf-8", errors="replace")
        if TOKEN.search(text) or (token and token in text):
            raise InputError(
                f"{folder / name} holds a token of the hub, which everybody could read there; nothing was pushed.\n"
                "Take it out of the file, and give it by `hf auth login` or HF_TOKEN instead"
            )
