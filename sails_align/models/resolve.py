"""Find what a user calls a model: a hub id, a folder, a GGUF file, `testbed`, or an adapter's folder."""

from dataclasses import replace
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from sails_align.core.artifacts import file_hash
from sails_align.core.errors import InputError
from sails_align.core.options import HUB_ID, check_choice
from sails_align.models import DTYPES, clade, resolver_of, similar
from sails_align.models.adapters import check_complete, found_from, load_base_config, read_adapter
from sails_align.models.load import check_whole, load_config, model_errors
from sails_align.models.spec import ModelSpec, deciding_files, identity_of, is_gguf, model_path

ALSO_DECIDE = ("chat_template.jinja", "generation_config.json")
"""Files that decide a response, besides those that decide what a model computes."""


def resolve_model(
    name: str,
    base_model: str | None = None,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ModelSpec:
    """Find a model and what it is.

    It is `testbed`, `testbed:N`, a local folder (of a model, a finished run, or an adapter), a GGUF file, or a hub id;
    `base_model` is that of an adapter, if it is not where the adapter says. Raises `InputError` if there is no such
    model, weights are missing, or the adapter does not fit its model.
    """
    check_choice("dtype", dtype, DTYPES)
    folder = Path(name)
    of_config = (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError)
    with model_errors(base_model or name, *of_config):
        if resolver_of(name) is not None or is_gguf(name):
            return _plain(name, model_path(name), dtype, None, trust_remote_code)
        if (folder / "adapter_config.json").is_file():
            base = None if base_model is None else model_path(base_model)
            return _adapted(folder, base, dtype, trust_remote_code)
        if (folder / clade.CONFIG).is_file():
            base = None if base_model is None else model_path(base_model)
            return _conditional(folder, base, dtype, trust_remote_code)
        if base_model is not None:
            raise InputError(f"--base_model is given, but {name} is no folder with an adapter; leave it out")
        # A path into a folder that is here is no id of the hub, which would be asked again and again.
        is_path = folder.is_dir() or (len(folder.parts) > 1 and Path(folder.parts[0]).is_dir())
        if not (folder / "config.json").is_file() and (is_path or not HUB_ID.fullmatch(name)):
            raise InputError(
                f"{name} holds neither a model (config.json) nor an adapter (adapter_config.json)"
                f"{similar(name) or ';'}\ngive testbed, a model's folder, a GGUF file, the folder of a finished "
                "run, or the id of a model on the hub"
            )
        return _plain(name, name, dtype, revision, trust_remote_code)


def without_adapter(spec: ModelSpec) -> ModelSpec:
    """Return the base of an adapter's model, with the adapter's tokenizer and chat template."""
    assert spec.adapter is not None, f"{spec.name} has no adapter"
    others = {name: value for name, value in spec.identity.items() if name != "adapter"}
    tokenizer = {
        name: value for name, value in spec.identity["adapter"].items() if not name.startswith(("adapter_", "clade."))
    }
    return replace(spec, name=spec.base, adapter=None, identity={**others, "tokenizer": tokenizer})


def _plain(name: str, path: str, dtype: str, revision: str | None, trust_remote_code: bool) -> ModelSpec:
    identity = _checked_identity(path, revision, trust_remote_code)
    return ModelSpec(name, path, None, path, identity, dtype, revision, trust_remote_code)


def _adapted(folder: Path, base_model: str | None, dtype: str, trust_remote_code: bool) -> ModelSpec:
    adapter = read_adapter(folder)
    base, base_config = load_base_config(adapter, base_model)
    check_complete(folder, base_config)
    revision = None if base_model else adapter.revision
    return _on_base(folder, base, revision, dtype, trust_remote_code)


def _conditional(folder: Path, base_model: str | None, dtype: str, trust_remote_code: bool) -> ModelSpec:
    config = clade.load_clade(folder).config
    base = base_model or found_from(folder, config.base_model) or config.base_model
    return _on_base(folder, base, None if base_model else config.revision, dtype, trust_remote_code)


def _on_base(folder: Path, base: str, revision: str | None, dtype: str, trust_remote_code: bool) -> ModelSpec:
    tokenizer = str(folder) if (folder / "tokenizer_config.json").is_file() else base
    identity = {"base": _checked_identity(base, revision, trust_remote_code), "adapter": _hashes(folder)}
    return ModelSpec(str(folder), base, str(folder), tokenizer, identity, dtype, revision, trust_remote_code)


def _checked_identity(path: str, revision: str | None, trust_remote_code: bool) -> dict[str, object]:
    """Refuse missing weights; return the hashes of a local model's files, or a hub model's name and commit."""
    check_whole(path, revision, trust_remote_code=trust_remote_code)
    if Path(path).is_dir():
        return {"files": _hashes(Path(path))}
    config = load_config(path, revision=revision, trust_remote_code=trust_remote_code)
    return identity_of(path, getattr(config, "_commit_hash", None))


def _hashes(folder: Path) -> dict[str, str]:
    return {file.name: file_hash(file) for file in deciding_files(folder, ALSO_DECIDE)}
