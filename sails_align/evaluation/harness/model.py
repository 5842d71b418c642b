"""A model as lm-eval-harness runs it, with exactly one BOS and an adapter that is applied.

A missing or doubled BOS moves Gemma's scores by points (lm-evaluation-harness #1854), and adapters have been ignored
silently (#2432). Both are checked on a real request before anything is measured.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sails_align.core.errors import InputError
from sails_align.data.tokens import check_chat_template, render
from sails_align.evaluation.backends.local_model import decode_response
from sails_align.evaluation.backends.stops import stops_of
from sails_align.evaluation.backends.vllm_options import adapter_effect, cannot_start, engine_options
from sails_align.evaluation.harness.options import HarnessArguments
from sails_align.evaluation.reasoning import answer_of, marks_of, opening_of
from sails_align.models.generation import neutral_generation, say_what_is_left_out
from sails_align.models.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BOS_FAMILIES = ("gemma", "llama")
"""In the names of model types that were pretrained with a BOS before every text, whatever their tokenizer does."""
BOS_WITHIN = 4
"""Tokens at the beginning of a request that are searched for a second BOS; a later one may be the text's own."""
PROBE = [{"role": "user", "content": "a"}]


def uses_chat_template(tokenizer: "PreTrainedTokenizerBase", wanted: str) -> bool:
    """Return whether prompts become user turns of the chat template; `auto`: if the tokenizer has one.

    Raises `InputError` if it is wanted and there is none, or it fails.
    """
    if wanted != "false" and tokenizer.chat_template is not None:
        check_chat_template(tokenizer)
    if wanted == "auto":
        return tokenizer.chat_template is not None
    if wanted == "true" and tokenizer.chat_template is None:
        raise InputError(
            "apply_chat_template is true, but the tokenizer has no chat template;\n"
            "leave it out, or give a model whose tokenizer has one"
        )
    return wanted == "true"


def check_system(tokenizer: "PreTrainedTokenizerBase", instruction: str) -> None:
    """Check that the chat template takes a system message; otherwise lm-eval drops it with a warning.

    Raises `InputError` if it does not.
    """
    messages = [{"role": "system", "content": instruction}, *PROBE]
    try:
        rendered = render(tokenizer, messages, add_generation_prompt=True)
    except InputError:
        rendered = ""
    if instruction.strip() not in rendered:
        raise InputError(
            "system_instruction is given, but the model's chat template takes no system message;\n"
            "leave it out, or put it into the tasks' description"
        )


def add_bos_token(
    tokenizer: "PreTrainedTokenizerBase", model_type: str, *, chat_template: bool, rolling: bool
) -> bool | None:
    """Return lm-eval's `add_bos_token`: whether the tokenizer adds a BOS to requests; None: the model has no BOS.

    Args:
        tokenizer: the model's.
        model_type: of its configuration.
        chat_template: whether it is applied; it may write the BOS itself.
        rolling: whether the requests are whole documents (`loglikelihood_rolling`), to which lm-eval adds one.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    try:
        text = render(tokenizer, PROBE, add_generation_prompt=True)
    except InputError:  # there is no template, or it fails where it is not asked for
        text = ""
    by_template = bos in tokenizer(text, add_special_tokens=False)["input_ids"][:BOS_WITHIN]
    by_tokenizer = tokenizer("a")["input_ids"][:1] == [bos]
    if not (by_tokenizer or by_template or any(family in model_type for family in BOS_FAMILIES)):
        return None
    return not (rolling or (chat_template and by_template))


def hf_lm(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", bos: bool | None, batch_size: str) -> Any:
    """Make lm-eval's `HFLM` of a loaded model; `bos` is the result of `add_bos_token`."""
    from lm_eval.models.huggingface import HFLM

    if tokenizer.pad_token is None and tokenizer.eos_token is None and tokenizer.unk_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)  # masked: lm-eval would add a token without embedding
    if bos:
        tokenizer.add_bos_token = True  # lm-eval passes it only to tokenizers that it loads itself
    log = logging.getLogger("lm_eval.models.huggingface")
    log.addFilter(lambda record: "`pretrained`" not in str(record.msg))  # it warns of every model that is loaded
    options: dict[str, Any] = {"pretrained": model, "tokenizer": tokenizer, "add_bos_token": bos}
    lm: Any = HFLM(**options, batch_size=batch_size)  # pyright: ignore[reportCallIssue] -- its decorator hides them
    if marks_of(tokenizer.all_special_tokens):
        decode = lm.tok_decode
        lm.tok_decode = lambda tokens, skip_special_tokens=True: (
            decode_response(tokenizer, tokens) if skip_special_tokens else decode(tokens, skip_special_tokens=False)
        )
    return lm


@contextmanager
def neutral_lm(lm: Any, tasks: Sequence[Any]) -> Iterator[None]:
    """Let the tasks alone say how lm-eval's `HFLM` generates within the block (vLLM's model is loaded so)."""
    if hasattr(lm, "lora_request"):
        yield
        return
    config = lm.model.generation_config
    ends = stops_of(lm.tokenizer, config).ids
    say_what_is_left_out(config, lm.tokenizer, ends)
    # Only where a task draws: transformers warns of it elsewhere. Its default, 50, is not vLLM's.
    draws = any((task.config.generation_kwargs or {}).get("do_sample") for task in tasks)
    with neutral_generation(lm.model, ends, **({"top_k": 0} if draws else {})):
        yield


@contextmanager
def load_lm(
    spec: ModelSpec, args: HarnessArguments, tokenizer: "PreTrainedTokenizerBase", bos: bool | None
) -> Iterator[Any]:
    """Load lm-eval's model. vLLM's processes end with the block, so that the base model gets their memory.

    Raises `InputError` if it cannot be loaded.
    """
    if args.backend == "hf":
        from sails_align.models.load import load_model

        yield hf_lm(load_model(spec, args.device), tokenizer, bos, args.batch_size)
        return
    from lm_eval.models.vllm_causallms import VLLM

    options = engine_options(spec) | {
        "pretrained": spec.base,
        "lora_local_path": spec.adapter,
        "add_bos_token": bos,
        "seed": args.seed,
        "tensor_parallel_size": args.tensor_parallel_size,
        "max_model_len": args.max_model_len,
        "batch_size": args.batch_size,
    }
    try:
        lm: Any = VLLM(**options)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise cannot_start(spec.base, error) from error
    try:
        yield lm
    finally:
        lm.model.llm_engine.engine_core.shutdown()


def give_answers(lm: Any) -> Counter[str]:
    """Let lm-eval score generated answers without the reasoning before them; one whose reasoning does not end is empty.

    Returns:
        The number of those under `n_unfinished_reasoning`, once tasks have been run.
    """
    counted: Counter[str] = Counter()
    generate = lm.generate_until

    def generate_until(requests: Sequence[Any], **options: Any) -> list[str]:
        texts = generate(requests, **options)
        openings = [opening_of(str(request.args[0])) for request in requests]
        answers = [answer_of(opening + text) for opening, text in zip(openings, texts, strict=True)]
        counted["n_unfinished_reasoning"] += answers.count(None)
        return [answer or "" for answer in answers]

    lm.generate_until = generate_until
    return counted


def check_bos(lm: Any, context: str, *, rolling: bool = False) -> None:
    """Tokenize a request as lm-eval does, and check that it begins with exactly one BOS.

    Args:
        lm: lm-eval's model.
        context: the text of a request, after templates.
        rolling: whether lm-eval puts a BOS before it.

    Raises:
        InputError: if it does not.
    """
    ids = [lm.prefix_token_id] * rolling + list(lm.tok_encode(context))
    if hasattr(lm, "tok_batch_encode") and not rolling:  # HFLM tokenizes in another way to generate
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


def check_adapter(lm: Any, context: str, adapter: str) -> float:
    """Check that the adapter changes what the model computes for a request.

    Returns:
        The largest difference: of a logit (hf), or of a prompt token's log-probability (vllm).

    Raises:
        InputError: if there is none.
    """
    ids = list(lm.tok_encode(context))
    effect = adapter_effect(lm.model, [ids], lm.lora_request) if hasattr(lm, "lora_request") else _hf_effect(lm, ids)
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
