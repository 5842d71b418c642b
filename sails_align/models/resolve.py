"""What a user calls a model -> what is loaded: a hub id, a folder, a GGUF file, `testbed`, or an adapter's folder."""

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from sails_align.core.artifacts import file_hash
from sails_align.core.errors import InputError
from sails_align.core.options import HUB_ID
from sails_align.models import DTYPES, resolver_of
from sails_align.models.adapters import check_complete, load_base_config, read_adapter
from sails_align.models.load import check_whole, load_config
from sails_align.models.loading import model_errors
from sails_align.models.spec import ModelSpec, identity_of, is_gguf, model_path

ALSO_DECIDE = ("chat_template.jinja", "tokenizer_config.json", "tokenizer.model", "generation_config.json")


def resolve_model(
    name: str,
    base_model: str | None = None,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ModelSpec:
    """Find a model and what it is.

    Args:
        name: `testbed`, `testbed:N`, a local folder (of a model, a finished run, or an adapter), a GGUF file, or a
            hub id.
        base_model: of an adapter, if it is not where the adapter says.
        dtype: of the weights.
        revision: branch, tag or commit of a model on the hub.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: if there is no such model, weights are missing, or the adapter does not fit its model.
    """
    of_config = (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError)
    with model_errors(base_model or name, *of_config):
        return _resolved(name, base_model, dtype, revision, trust_remote_code)


def _resolved(
    name: str, base_model: str | None, dtype: str, revision: str | None, trust_remote_code: bool
) -> ModelSpec:
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, which is not one of: {', '.join(DTYPES)}")
    folder = Path(name)
    if resolver_of(name) is not None or is_gguf(name):
        return _plain(name, model_path(name), dtype, None, trust_remote_code)
    if (folder / "adapter_config.json").is_file():
        base = None if base_model is None else model_path(base_model)
        return _adapted(folder, base, dtype, trust_remote_code)
    if base_model is not None:
        raise InputError(f"--base_model is given, but {name} is no folder with an adapter; leave it out")
    # A path into a folder that is here is no id of the hub, which would be asked again and again.
    is_path = folder.is_dir() or (len(folder.parts) > 1 and Path(folder.parts[0]).is_dir())
    if not (folder / "config.json").is_file() and (is_path or not HUB_ID.fullmatch(name)):
        raise InputError(
            f"{name} holds neither a model (config.json) nor an adapter (adapter_config.json);\n"
            "give testbed, a model's folder, a GGUF file, the folder of a finished run, or the id of a model on the hub"
        )
    return _plain(name, name, dtype, revision, trust_remote_code)


def _plain(name: str, path: str, dtype: str, revision: str | None, trust_remote_code: bool) -> ModelSpec:
    check_whole(path, revision, trust_remote_code=trust_remote_code)
    identity = model_identity(path, revision, trust_remote_code=trust_remote_code)
    return ModelSpec(name, path, None, path, identity, dtype, revision, trust_remote_code)


def _adapted(folder: Path, base_model: str | None, dtype: str, trust_remote_code: bool) -> ModelSpec:
    adapter = read_adapter(folder)
    base, base_config = load_base_config(adapter, base_model)
    check_complete(folder, base_config)
    revision = None if base_model else adapter.revision
    check_whole(base, revision, trust_remote_code=trust_remote_code)
    tokenizer = str(folder) if (folder / "tokenizer_config.json").is_file() else base
    identity = {
        "base": model_identity(base, revision, trust_remote_code=trust_remote_code),
        "adapter": _files(folder),
    }
    return ModelSpec(str(folder), base, str(folder), tokenizer, identity, dtype, revision, trust_remote_code)


def _files(folder: Path) -> dict[str, str]:
    """Hashes of all files that decide a response: besides weights, the template, and where a response ends."""
    hashes = {name: file_hash(folder / name) for name in ALSO_DECIDE if (folder / name).is_file()}
    return {**identity_of(str(folder))["files"], **hashes}


def model_identity(path: str, revision: str | None = None, *, trust_remote_code: bool = False) -> dict[str, object]:
    """Hashes of a local model's files, wherever it is; name and commit of one on the hub."""
    if Path(path).is_dir():
        return {"files": _files(Path(path))}
    config = load_config(path, revision=revision, trust_remote_code=trust_remote_code)
    return identity_of(path, getattr(config, "_commit_hash", None))
