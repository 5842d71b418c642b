"""A model as lm-eval-harness runs it: its arguments, exactly one BOS, the right attention, an adapter that is applied.

A missing or doubled BOS moves Gemma's scores by points (lm-evaluation-harness #1854), and adapters have been ignored
without a word (#2432). So both are checked on a real request before anything is measured.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sails_align.core.errors import InputError
from sails_align.evaluation.backends.vllm_options import MAX_LORA_RANKS, NOISE_FACTOR, checkpoint_dtype, max_lora_rank
from sails_align.models.attention import exact_attention
from sails_align.models.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Engine = Literal["hf", "vllm"]
BOS_FAMILIES = ("gemma", "llama")
"""In the names of model types that were pretrained with a BOS before every text, whatever their tokenizer does."""
PROBE = [{"role": "user", "content": "a"}]


def load_config(spec: ModelSpec) -> "PreTrainedConfig":
    """The configuration of the base model.

    Raises:
        InputError: if it cannot be loaded.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(spec.base, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot load the model {spec.base}: {_first_line(error)};\ncheck the name and the connection"
        ) from error


def uses_chat_template(tokenizer: "PreTrainedTokenizerBase", wanted: bool | Literal["auto"]) -> bool:
    """Whether prompts become user turns of the chat template; `auto`: if the tokenizer has one.

    Raises:
        InputError: if it is wanted and there is none.
    """
    if wanted == "auto":
        return tokenizer.chat_template is not None
    if wanted and tokenizer.chat_template is None:
        raise InputError(
            "apply_chat_template is true, but the tokenizer has no chat template;\n"
            "leave it out, or give a model whose tokenizer has one"
        )
    return wanted


def check_system(tokenizer: "PreTrainedTokenizerBase", instruction: str) -> None:
    """See that the chat template takes a system message: lm-eval drops it with a warning where it does not.

    Raises:
        InputError: if it does not.
    """
    from jinja2 import TemplateError

    messages = [{"role": "system", "content": instruction}, *PROBE]
    try:
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError:
        rendered = ""
    if instruction.strip() not in rendered:
        raise InputError(
            "system_instruction is given, but the model's chat template takes no system message;\n"
            "leave it out, or put it into the tasks' description"
        )


def needs_bos(tokenizer: "PreTrainedTokenizerBase", model_type: str) -> bool:
    """Whether texts are to begin with a BOS: the tokenizer or the template puts one, or the family was trained so."""
    if tokenizer.bos_token_id is None:
        return False
    adds = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    writes = tokenizer.chat_template is not None and template_writes_bos(tokenizer)
    return adds or writes or any(family in model_type for family in BOS_FAMILIES)


def template_writes_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether what the chat template makes of a conversation has the BOS in it."""
    ids: Any = tokenizer.apply_chat_template(PROBE, tokenize=True, add_generation_prompt=True, return_dict=False)
    return tokenizer.bos_token_id in ids[:BOS_WITHIN]


BOS_WITHIN = 4
"""Tokens at the beginning of a request that are searched for a second BOS; further on it may be the text's own."""


def add_bos_token(
    tokenizer: "PreTrainedTokenizerBase", model_type: str, *, chat_template: bool, rolling: bool
) -> bool | None:
    """lm-eval's `add_bos_token`: whether the tokenizer is to put a BOS before a request; None: the model has no BOS.

    Args:
        tokenizer: the model's.
        model_type: of its configuration.
        chat_template: whether it is applied; it may write the BOS itself.
        rolling: whether the requests are whole documents (`loglikelihood_rolling`), before which lm-eval puts one.
    """
    if not needs_bos(tokenizer, model_type):
        return None
    return not (rolling or (chat_template and template_writes_bos(tokenizer)))


def model_arguments(
    spec: ModelSpec, engine: Engine, config: "PreTrainedConfig", *, bos: bool | None, seed: int = 0
) -> dict[str, Any]:
    """The keyword arguments of lm-eval's `HFLM` or `VLLM` that say which model, without those of the machine.

    Raises:
        InputError: if vLLM does not take an adapter of this rank.
    """
    arguments: dict[str, Any] = {
        "pretrained": spec.base,
        "tokenizer": spec.tokenizer,
        "trust_remote_code": spec.trust_remote_code,
        "add_bos_token": bos,
    }
    if engine == "hf":
        arguments |= {"revision": spec.revision or "main", "dtype": spec.dtype}
        if attention := exact_attention(config):
            arguments["attn_implementation"] = attention
        return arguments if spec.adapter is None else {**arguments, "peft": spec.adapter}
    arguments |= {"revision": spec.revision, "tokenizer_revision": _revision(spec), "seed": seed}
    arguments["dtype"] = checkpoint_dtype(config) if spec.dtype == "auto" else spec.dtype
    if spec.adapter is not None:
        arguments |= {"lora_local_path": spec.adapter, "max_lora_rank": _max_lora_rank(Path(spec.adapter))}
    return arguments


def check_bos(lm: Any, context: str, *, rolling: bool = False) -> int:
    """Tokenize a request as lm-eval does, and see how it begins.

    Args:
        lm: lm-eval's model.
        context: the text of a request, after templates.
        rolling: whether lm-eval puts a BOS before it.

    Returns:
        How many BOS it begins with: 1 where the model has one.

    Raises:
        InputError: if there is not exactly one.
    """
    ids = [lm.prefix_token_id] * rolling + list(lm.tok_encode(context))
    if hasattr(lm, "tok_batch_encode") and not rolling:  # HFLM's generation goes another way than its likelihoods
        generated = lm.tok_batch_encode([context])[0][0].tolist()
        if generated != ids:
            raise InputError(
                f"lm-eval tokenizes {context[:40]!r} in two ways: {ids[:4]} for likelihoods, {generated[:4]} to "
                "generate;\nuse a tokenizer whose decoded BOS is the BOS"
            )
    bos = lm.tokenizer.bos_token_id
    n_bos = ids[:BOS_WITHIN].count(bos)
    if ids[:1] != [bos] or n_bos != 1:
        raise InputError(
            f"a request begins with {lm.tokenizer.decode(ids[:BOS_WITHIN])!r}: it has {n_bos} BOS tokens there, and "
            "must begin with exactly one;\ncorrect the chat template or the tokenizer of the model"
        )
    return n_bos


def check_adapter(lm: Any, context: str, adapter: str) -> float:
    """See that the adapter changes what the model computes for a request.

    Returns:
        The largest difference it makes: of a logit (hf), or of a prompt token's log-probability (vllm).

    Raises:
        InputError: if it makes none.
    """
    ids = list(lm.tok_encode(context))
    effect = _vllm_effect(lm, ids) if hasattr(lm, "lora_request") else _hf_effect(lm, ids)
    if effect == 0.0:
        raise InputError(
            f"the adapter {adapter} changes nothing in what the model computes: it is untrained, or was not applied;\n"
            "train it, or evaluate its base model itself"
        )
    return effect


def _hf_effect(lm: Any, ids: list[int]) -> float:
    import torch

    input_ids = torch.tensor([ids], device=lm.device)
    with torch.no_grad():
        adapted = lm.model(input_ids=input_ids).logits
        with lm.model.disable_adapter():
            base = lm.model(input_ids=input_ids).logits
    return (adapted - base).abs().max().item()


def _vllm_effect(lm: Any, ids: list[int]) -> float:
    from vllm import SamplingParams, TokensPrompt  # pyright: ignore[reportMissingImports]

    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    found = []
    for request in (lm.lora_request, None, None):  # kernels of 16 bits may give other values when asked again
        (output,) = lm.model.generate([TokensPrompt(prompt_token_ids=ids)], sampling, lora_request=request)
        found.append(
            [of_token[token].logprob for token, of_token in zip(ids, output.prompt_logprobs, strict=True) if of_token]
        )
    adapted, base, again = found
    effect = max(abs(a - b) for a, b in zip(adapted, base, strict=True))
    noise = max(abs(a - b) for a, b in zip(base, again, strict=True))
    return effect if effect > NOISE_FACTOR * noise else 0.0


def _max_lora_rank(adapter: Path) -> int:
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    allowed = max_lora_rank(rank)
    if allowed is None:
        raise InputError(
            f"the adapter {adapter} has rank {rank}, and vLLM takes at most {MAX_LORA_RANKS[-1]};\n"
            "merge it (sails merge), or use --backend hf"
        )
    return allowed


def _revision(spec: ModelSpec) -> str | None:
    """Of the tokenizer: that of the base model, if it is the base model's."""
    return spec.revision if spec.tokenizer == spec.base else None


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
