"""Train SAEs on the residual stream of any Hugging Face causal language model (`sails train-sae`).

    texts -> token windows -> hidden states of all layers wanted, from one forward pass, a buffer at a time
          -> one step of each layer's SAE on each batch -> <output_dir>/layer_<l>/ + report.json

A layer whose report carries the same input hash is not trained again. Every `checkpoint_steps` the state is written to
`<output_dir>/.layer_<l>.checkpoint/`; an interrupted training continues there and ends with the same weights.
"""

import json
import math
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sails_align.core.artifacts import content_hash, file_hash, load_artifact, read_header, save_artifact, tensors_hash
from sails_align.core.errors import InputError
from sails_align.core.files import atomic_folder, disk_errors, write_json
from sails_align.core.progress import progress_bar
from sails_align.models.hooks import decoder_layers, evaluation_mode
from sails_align.saes.files import WEIGHTS
from sails_align.saes.layer_trainer import LayerTrainer, SAETrainingOptions
from sails_align.saes.load import residual_sae
from sails_align.saes.quality import SAEQuality, evaluate_sae
from sails_align.saes.token_stream import SplitCorpus, buffers, hidden_states_of, read_corpus, split_corpus

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
    d_sae: int | None = None,
    k: int = 32,
    model_name: str | None = None,
    architecture: Literal["topk", "jumprelu"] = "topk",
    lr: float | None = None,
    n_tokens: int = 1_000_000,
    batch_size: int = 512,
    context_size: int = 128,
    seed: int = 0,
    dataset_name: str | None = None,
    eval_tokens: int = 100_000,
    buffer_tokens: int = 65_536,
    checkpoint_steps: int = 2000,
    progress: bool = True,
    resume: bool = True,
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
        d_sae: number of latents; None: 8 times d_model.
        k: active latents for each token: exactly (topk), or aimed at (jumprelu).
        model_name: what the SAE says it was trained on (None: what the model says); `load_saes` compares it
            with the model.
        architecture: "topk" or "jumprelu".
        lr: Adam's; by default 2 / sqrt(d_model * d_sae) (0.0003 for 16k latents on Gemma-2-2B, 0.006 on tiny models),
            which suits short trainings: choose less for many more than 10^4 steps.
        n_tokens: content tokens each SAE is trained on.
        batch_size: content tokens in a step.
        context_size: tokens in a window, BOS included.
        seed: of the first weights, the order, and what is held out.
        dataset_name: noted in the SAE's configuration.
        eval_tokens: held-out content tokens the report is measured on; a tenth of the windows at most.
        buffer_tokens: content tokens whose hidden states are shuffled together.
        checkpoint_steps: steps after which the state is saved, at the end of the buffer.
        progress: show a bar with an estimate of the time left.
        resume: use finished layers and checkpoints of an earlier run with the same inputs.

    Returns:
        The report of each layer, also in `<output_dir>/layer_<l>/report.json`.

    Raises:
        InputError: if an option is out of range, a layer is not in the model, there is no text or too little, or
            `output_dir` cannot be written or holds something else.
    """
    d_model = model.config.get_text_config().hidden_size
    width = 8 * d_model if d_sae is None else d_sae
    options = SAETrainingOptions(
        d_sae=width,
        k=k,
        architecture=architecture,
        lr=2 / (d_model * max(width, 1)) ** 0.5 if lr is None else lr,
        n_tokens=n_tokens,
        batch_size=batch_size,
        seed=seed,
    )
    run = _Run(model, options, Path(output_dir), buffer_tokens, checkpoint_steps)
    run.check(layers, context_size, eval_tokens)
    with evaluation_mode(model), progress_bar(progress) as bar:
        wanted = n_tokens + eval_tokens
        task = bar.add_task("reading text", total=wanted)
        corpus = read_corpus(
            texts, tokenizer, n_tokens=wanted, context_size=context_size, advance=lambda count: bar.advance(task, count)
        )
        bar.update(task, total=int(corpus.content.sum()))
        data = split_corpus(corpus, eval_tokens=eval_tokens, least=batch_size, seed=seed)
        metadata = {
            "model_name": model.config.name_or_path if model_name is None else model_name,
            "prepend_bos": corpus.prepend_bos,
            "context_size": context_size,
            "dataset_path": dataset_name,
            "exclude_special_tokens": True,
        }
        with disk_errors(run.output_dir):
            run.output_dir.mkdir(parents=True, exist_ok=True)
        hashes = run.input_hashes(layers, data, metadata)
        finished = {layer: run.finished(layer, hashes[layer]) for layer in layers if resume}
        reports = {layer: report for layer, report in finished.items() if report is not None}
        jobs = [run.job(layer, hashes[layer], metadata, resume) for layer in layers if layer not in reports]
        if jobs:
            run.train(jobs, data, bar)
            bar.add_task("measuring SAEs", total=None)
        for job in jobs:
            reports[job.layer] = run.finish(job, data)
    return dict(sorted(reports.items()))


@dataclass(frozen=True)
class _Job:
    """One layer's training."""

    layer: int
    input_hash: str
    trainer: LayerTrainer


@dataclass(frozen=True)
class _Run:
    """What all layers of one call share."""

    model: PreTrainedModel
    options: SAETrainingOptions
    output_dir: Path
    buffer_tokens: int
    checkpoint_steps: int

    def folder(self, layer: int) -> Path:
        return self.output_dir / f"layer_{layer}"

    def checkpoint(self, layer: int) -> Path:
        return self.output_dir / f".layer_{layer}.checkpoint"

    def check(self, layers: Sequence[int], context_size: int, eval_tokens: int) -> None:
        """Check what `SAETrainingOptions` cannot check."""
        depth = len(decoder_layers(self.model))
        if not layers or len(set(layers)) < len(layers):
            raise InputError(f"layers {list(layers)}: give at least one, each once")
        for layer in layers:
            if not 0 <= layer < depth:
                raise InputError(f"layer {layer} is out of range; choose 0 to {depth - 1}, the model's blocks")
            if self.folder(layer).exists() and not (self.folder(layer) / REPORT).is_file():
                raise InputError(f"{self.folder(layer)} exists, but was not written here: choose another --output_dir")
        least = {"context_size": (context_size, 2), "eval_tokens": (eval_tokens, 1)}
        least |= {"buffer_tokens": (self.buffer_tokens, 1), "checkpoint_steps": (self.checkpoint_steps, 1)}
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise InputError(f"{name} is {value}, but it must be at least {minimum}")

    def input_hashes(self, layers: Sequence[int], data: SplitCorpus, metadata: dict[str, Any]) -> dict[int, str]:
        """For each layer, a hash of all that decides its SAE and its report."""
        corpus = data.corpus
        tokens = {"ids": corpus.ids, "content": corpus.content, "ends": corpus.ends, "train": data.train}
        inputs = asdict(self.options) | {"metadata": metadata, "buffer_tokens": self.buffer_tokens}
        inputs |= {"model": tensors_hash(self.model.state_dict()), "tokens": tensors_hash(tokens)}
        return {layer: content_hash(inputs | {"layer": layer}) for layer in layers}

    def job(self, layer: int, input_hash: str, metadata: dict[str, Any], resume: bool) -> _Job:
        """A trainer for a layer, continued from its checkpoint if there is one with the same inputs."""
        d_model = self.model.config.get_text_config().hidden_size
        device = str(next(decoder_layers(self.model)[layer].parameters()).device)
        hook = {"hook_name": f"blocks.{layer}.hook_resid_post"}
        trainer = LayerTrainer(d_model, self.options, device, metadata | hook)
        header = read_header(self.checkpoint(layer), CHECKPOINT) if resume else None
        if header is not None and header["input_hash"] == input_hash:
            tensors, header = load_artifact(self.checkpoint(layer), CHECKPOINT)
            trainer.load_state(tensors, header["provenance"])
        return _Job(layer, input_hash, trainer)

    def finished(self, layer: int, input_hash: str) -> SAEReport | None:
        """The report of a layer that was trained before with the same inputs.

        Raises:
            InputError: if it is damaged, or the weights are not those it reports on.
        """
        path = self.folder(layer) / REPORT
        if not path.is_file():
            return None
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            if report["input_hash"] != input_hash:
                return None
            intact = file_hash(path.parent / WEIGHTS) == report["sha256"]
        except (json.JSONDecodeError, KeyError, FileNotFoundError):
            intact = False
        if not intact:
            raise InputError(f"{path.parent} is damaged: delete the folder, and the SAE will be trained again")
        return SAEReport(**report)

    def train(self, jobs: Sequence[_Job], data: SplitCorpus, bar: Progress) -> None:
        """Train the layers together on one stream of hidden states."""
        task = bar.add_task("training SAEs", total=self.options.n_steps * len(jobs))
        tokens = max(self.options.batch_size, min(self.buffer_tokens, self.options.n_tokens))
        stream = buffers(data.corpus, data.train, tokens, self.options.seed)
        start = min(job.trainer.next_buffer for job in jobs)
        saved = {job.layer: job.trainer.steps for job in jobs}
        for index, windows in enumerate(islice(stream, start, None), start):
            bar.update(task, completed=sum(job.trainer.steps for job in jobs))
            unfinished = [job for job in jobs if not job.trainer.done]
            if not unfinished:
                break
            # Layers are apart if the last run ended while their checkpoints were being written.
            due = [job for job in unfinished if job.trainer.next_buffer == index]
            began = time.perf_counter()
            hidden = hidden_states_of(self.model, [job.layer for job in due], data.corpus, windows)
            shared = (time.perf_counter() - began) / len(due)
            for job in due:
                began = time.perf_counter()
                job.trainer.train(hidden.pop(job.layer))
                job.trainer.seconds += time.perf_counter() - began + shared
                bar.update(task, completed=sum(job.trainer.steps for job in jobs))
                if not job.trainer.done and job.trainer.steps - saved[job.layer] >= self.checkpoint_steps:
                    tensors, counters = job.trainer.state()
                    save_artifact(self.checkpoint(job.layer), CHECKPOINT, tensors, counters, job.input_hash)
                    saved[job.layer] = job.trainer.steps

    def finish(self, job: _Job, data: SplitCorpus) -> SAEReport:
        """Write a trained layer's SAE and its report, measured on what was written; its checkpoint goes."""
        from sae_lens import SAE

        with atomic_folder(self.folder(job.layer)) as temporary:
            job.trainer.save_sae(temporary)
            sae = SAE.load_from_disk(temporary, device=str(job.trainer.trainer.sae.device))
            quality = evaluate_sae(self.model, residual_sae(str(temporary), sae), data.corpus, data.held_out)
            if not math.isfinite(quality.explained_variance):
                raise InputError(f"the SAE of layer {job.layer} diverged at lr {self.options.lr}: choose a smaller lr")
            report = SAEReport(
                **asdict(quality),
                layer=job.layer,
                d_sae=self.options.d_sae,
                k=self.options.k,
                architecture=self.options.architecture,
                tokens_trained=job.trainer.steps * self.options.batch_size,
                seconds=job.trainer.seconds,
                input_hash=job.input_hash,
                sha256=file_hash(temporary / WEIGHTS),
            )
            write_json(temporary / REPORT, asdict(report))
        shutil.rmtree(self.checkpoint(job.layer), ignore_errors=True)
        return report
