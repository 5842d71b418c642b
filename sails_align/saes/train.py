"""Train SAEs on the residual stream of any Hugging Face causal language model (`sails train-sae`).

    texts -> token windows -> hidden states of all layers wanted, from one forward pass, a buffer at a time
          -> one step of each layer's SAE on each batch -> <output_dir>/layer_<l>/ + report.json

A layer whose report has the same input hash is not trained again. The state is saved to
`<output_dir>/.layer_<l>.checkpoint/`; an interrupted training continues from there and ends with the same weights.
"""

import json
import math
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sails_align.core.artifacts import content_hash, file_hash, load_artifact, read_header, save_artifact, tensors_hash
from sails_align.core.errors import InputError
from sails_align.core.files import atomic_folder, disk_errors, write_json
from sails_align.core.progress import progress_bar
from sails_align.models.hooks import check_layers, decoder_layers, evaluation_mode
from sails_align.saes.files import WEIGHTS
from sails_align.saes.layer_trainer import LayerTrainer
from sails_align.saes.load import residual_sae
from sails_align.saes.options import SAETrainingOptions
from sails_align.saes.quality import SAEQuality, evaluate_sae
from sails_align.saes.token_stream import TokenCorpus, buffers, hidden_states_of, read_corpus, split_windows

REPORT, CHECKPOINT = "report.json", "sae_checkpoint"


@dataclass(frozen=True)
class SAEReport(SAEQuality):
    """An SAE's quality on held-out tokens, and how it was trained."""

    layer: int
    d_sae: int
    k: int
    architecture: str
    tokens_trained: int
    seconds: float
    """Of the training steps, and of the forward passes, which layers trained together share equally."""
    input_hash: str
    """Of all that decides the result: model weights, tokens, options."""
    sha256: str
    """Of the weights' file."""


def train_saes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str] | Iterable[Sequence[int]],
    layers: Sequence[int],
    *,
    output_dir: str | Path,
    model_name: str | None = None,
    dataset_name: str | None = None,
    progress: bool = True,
    **options: Any,
) -> dict[int, SAEReport]:
    """Train one SAE for each layer, on the outputs of the blocks at content tokens (no special tokens, no padding).

    Memory: the token ids (4 bytes each), one buffer of hidden states for each layer, and the SAEs with Adam's state.

    Args:
        model: a causal language model; not changed.
        tokenizer: of the model. BOS, if it has one, is put in front of every window of text.
        texts: strings, or sequences of token ids (taken as they are); may be endless. Texts that hold fewer than
            `n_tokens` are repeated, in another order each time.
        layers: l for the output of block l (0-based).
        output_dir: each SAE goes to `layer_<l>/` there, in sae-lens' format, which `load_saes` reads.
        model_name: the name in the SAE's configuration, which `load_saes` compares with the model; None: the model's.
        dataset_name: the name in the SAE's configuration.
        progress: show a bar with an estimate of the time left.
        options: of `SAETrainingOptions`, such as `d_sae`, `k`, `architecture`, `n_tokens`, `lr`, `seed`.

    Returns:
        The report of each layer, also in `<output_dir>/layer_<l>/report.json`.

    Raises:
        InputError: if an option is out of range, a layer is not in the model, there is no text or too little, or
            `output_dir` cannot be written or holds something else.
    """
    chosen = SAETrainingOptions(**options).for_width(model.config.get_text_config().hidden_size)
    folders = {layer: Path(output_dir) / f"layer_{layer}" for layer in layers}
    _check(model, layers, folders)
    with evaluation_mode(model), progress_bar(progress) as bar:
        wanted = chosen.n_tokens + chosen.eval_tokens
        task = bar.add_task("reading text", total=wanted)
        corpus = read_corpus(
            texts, tokenizer, n_tokens=wanted, context_size=chosen.context_size, advance=partial(bar.advance, task)
        )
        bar.update(task, total=int(corpus.content.sum()))
        train_W, held_out = split_windows(
            corpus, eval_tokens=chosen.eval_tokens, least=chosen.batch_size, seed=chosen.seed
        )
        metadata = {
            "model_name": model.config.name_or_path if model_name is None else model_name,
            "prepend_bos": corpus.prepend_bos,
            "context_size": chosen.context_size,
            "dataset_path": dataset_name,
            "exclude_special_tokens": True,
        }
        with disk_errors(Path(output_dir)):
            Path(output_dir).mkdir(parents=True, exist_ok=True)
        inputs = _inputs(model, corpus, train_W, chosen, metadata)
        reports: dict[int, SAEReport] = {}
        jobs: list[_Job] = []
        for layer, folder in folders.items():
            input_hash = content_hash(inputs | {"layer": layer})
            report = _finished(folder, input_hash)
            if report is None:
                jobs.append(_job(model, layer, folder, input_hash, chosen, metadata))
            else:
                reports[layer] = report
        if jobs:
            _train(jobs, model, corpus, train_W, chosen, bar)
            bar.add_task("measuring SAEs", total=None)
        for job in jobs:
            reports[job.layer] = _finish(job, model, corpus, held_out)
    return dict(sorted(reports.items()))


@dataclass(frozen=True)
class _Job:
    """One layer's training."""

    layer: int
    folder: Path
    input_hash: str
    trainer: LayerTrainer

    @property
    def checkpoint(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}.checkpoint")


def _check(model: PreTrainedModel, layers: Sequence[int], folders: dict[int, Path]) -> None:
    check_layers(model, layers)
    if not layers or len(folders) < len(layers):
        raise InputError(f"layers {list(layers)}: give at least one, each once")
    for folder in folders.values():
        if folder.exists() and not (folder / REPORT).is_file():
            raise InputError(f"{folder} exists, but was not written here; choose another --output_dir")


def _inputs(
    model: PreTrainedModel, corpus: TokenCorpus, train_W: Tensor, options: SAETrainingOptions, metadata: dict[str, Any]
) -> dict[str, Any]:
    """Return all that decides the SAEs and their reports (JSON-able), but for the layer."""
    tokens = {"ids": corpus.ids, "content": corpus.content, "ends": corpus.ends, "train": train_W}
    deciding = {name: value for name, value in asdict(options).items() if name != "checkpoint_steps"}
    hashes = {"model": tensors_hash(model.state_dict()), "tokens": tensors_hash(tokens)}
    return {**deciding, **hashes, "metadata": metadata}


def _finished(folder: Path, input_hash: str) -> SAEReport | None:
    """Return the report of a layer that was trained before with the same inputs.

    Raises:
        InputError: if it is damaged, or the weights are not those it reports on.
    """
    path = folder / REPORT
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["input_hash"] != input_hash:
            return None
        intact = file_hash(folder / WEIGHTS) == report["sha256"]
    except (json.JSONDecodeError, KeyError, FileNotFoundError):
        intact = False
    if not intact:
        raise InputError(f"{folder} is damaged; delete the folder to train the SAE again")
    return SAEReport(**report)


def _job(
    model: PreTrainedModel,
    layer: int,
    folder: Path,
    input_hash: str,
    options: SAETrainingOptions,
    metadata: dict[str, Any],
) -> _Job:
    """Make a layer's trainer, continued from its checkpoint if there is one with the same inputs."""
    d_model = model.config.get_text_config().hidden_size
    device = str(next(decoder_layers(model)[layer].parameters()).device)
    hook = {"hook_name": f"blocks.{layer}.hook_resid_post"}
    job = _Job(layer, folder, input_hash, LayerTrainer(d_model, options, device, metadata | hook))
    header = read_header(job.checkpoint, CHECKPOINT)
    if header is not None and header["input_hash"] == input_hash:
        tensors, header = load_artifact(job.checkpoint, CHECKPOINT)
        job.trainer.load_state(tensors, header["provenance"])
    return job


def _train(
    jobs: Sequence[_Job],
    model: PreTrainedModel,
    corpus: TokenCorpus,
    train_W: Tensor,
    options: SAETrainingOptions,
    bar: Progress,
) -> None:
    """Train the layers together on one stream of hidden states."""
    task = bar.add_task("training SAEs", total=options.n_steps * len(jobs))
    tokens = max(options.batch_size, min(options.buffer_tokens, options.n_tokens))
    start = min(job.trainer.next_buffer for job in jobs)
    stream = islice(buffers(corpus, train_W, tokens, options.seed), start, None)
    for index, windows in enumerate(stream, start):
        bar.update(task, completed=sum(job.trainer.steps for job in jobs))
        unfinished = [job for job in jobs if not job.trainer.done]
        if not unfinished:
            break
        # Layers are apart if the last run ended while their checkpoints were being written.
        due = [job for job in unfinished if job.trainer.next_buffer == index]
        began = time.perf_counter()
        hidden = hidden_states_of(model, [job.layer for job in due], corpus.sequences(windows))
        shared = (time.perf_counter() - began) / len(due)
        for job in due:
            began, steps = time.perf_counter(), job.trainer.steps
            job.trainer.train(hidden.pop(job.layer))
            job.trainer.seconds += time.perf_counter() - began + shared
            bar.update(task, completed=sum(job.trainer.steps for job in jobs))
            is_due = job.trainer.steps // options.checkpoint_steps > steps // options.checkpoint_steps
            if is_due and not job.trainer.done:
                tensors, counters = job.trainer.state()
                save_artifact(job.checkpoint, CHECKPOINT, tensors, counters, job.input_hash)


def _finish(job: _Job, model: PreTrainedModel, corpus: TokenCorpus, held_out: Sequence[int]) -> SAEReport:
    """Write a trained layer's SAE and its report, measured on what was written; delete its checkpoint."""
    from sae_lens import SAE

    options = job.trainer.options
    with atomic_folder(job.folder) as temporary:
        job.trainer.save_sae(temporary)
        sae = SAE.load_from_disk(temporary, device=str(job.trainer.trainer.sae.device))
        quality = evaluate_sae(model, residual_sae(str(temporary), sae), corpus.sequences(held_out))
        if not math.isfinite(quality.explained_variance):
            raise InputError(f"the SAE of layer {job.layer} diverged at lr {options.lr}; choose a smaller lr")
        assert options.d_sae is not None
        report = SAEReport(
            **asdict(quality),
            layer=job.layer,
            d_sae=options.d_sae,
            k=options.k,
            architecture=options.architecture,
            tokens_trained=job.trainer.steps * options.batch_size,
            seconds=job.trainer.seconds,
            input_hash=job.input_hash,
            sha256=file_hash(temporary / WEIGHTS),
        )
        write_json(temporary / REPORT, asdict(report))
    shutil.rmtree(job.checkpoint, ignore_errors=True)
    return report
