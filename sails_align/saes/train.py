"""Train SAEs on the residual stream of any Hugging Face causal language model (`sails train-sae`).

    texts -> token windows -> hidden states of all layers wanted, from one forward pass, a buffer at a time
          -> one step of each layer's SAE on each batch -> <output_dir>/layer_<l>/ + report.json

A layer whose report has the same input hash is not trained again. The state is saved to
`<output_dir>/.layer_<l>.checkpoint/`; an interrupted training continues from there and ends with the same weights.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sails_align.core.artifacts import content_hash, file_hash, load_artifact, read_header, save_artifact, tensors_hash
from sails_align.core.earlier import RECORD_FILE, differences, holds_other, write_record
from sails_align.core.errors import InputError
from sails_align.core.files import atomic_folder, disk_errors, read_record, write_json, write_text
from sails_align.core.log import say
from sails_align.core.progress import progress_bar
from sails_align.core.suggestions import did_you_mean
from sails_align.models.hooks import check_layers, decoder_layers, evaluation_mode
from sails_align.saes.card import CARD, card_of
from sails_align.saes.files import WEIGHTS
from sails_align.saes.graph import PromptGraph, prompt_graph
from sails_align.saes.layer_trainer import LayerTrainer
from sails_align.saes.load import residual_sae
from sails_align.saes.options import FULL, SAETrainingOptions
from sails_align.saes.quality import SAEQuality, evaluate_saes, n_measured
from sails_align.saes.token_stream import TokenCorpus, buffers, hidden_states_of, read_corpus, split_windows

logger = logging.getLogger(__name__)

REPORT, CHECKPOINT = "report.json", "sae_checkpoint"
NOT_IN_IDENTITY: Mapping[str, str] = {
    "checkpoint_steps": "how the machine does it, with the same result",
    "context_size": "in the metadata",
    "eval_tokens": "known by the tokens",
}
"""Options that are not in the hash that an SAE is known by, with the reason.

SAEs of version 0.1 are known by this hash: with more in it, they would be trained again."""


@dataclass(frozen=True, kw_only=True)
class SAEReport(SAEQuality):
    """An SAE's quality on held-out tokens, and how it was trained."""

    layer: int
    d_sae: int
    k: int
    architecture: str
    tokens_trained: int
    seconds: float
    """Time of the training steps, and of an equal share of the forward passes."""
    input_hash: str
    """Hash of all that decides the result: model weights, tokens, options."""
    sha256: str
    """Hash of the weights' file."""
    graph_edges: int | None = None
    """Edges of the graph of `graph_lambda`."""
    graph_isolated: int | None = None
    """Coordinates without a neighbour in that graph."""
    graph_energy: float | None = None
    """Mean energy of the decoder's directions on that graph, from 0 to 2."""


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
    overwrite: bool = False,
    graph_prompts: Sequence[Any] | None = None,
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
        model_name: for the SAE's configuration, which `load_saes` compares with the model; None: the model's own.
        dataset_name: for the SAE's configuration.
        progress: show a bar with an estimate of the time left.
        overwrite: replace SAEs in `output_dir` that were trained with another model, text or options.
        graph_prompts: prompts whose hidden states make the graph of the option `graph_lambda`: texts, conversations, or
            rows of a dataset.
        options: of `SAETrainingOptions`, such as `d_sae`, `k`, `architecture`, `n_tokens`, `lr`, `seed`.

    Returns:
        The report of each layer, also in `<output_dir>/layer_<l>/report.json`.

    Raises:
        InputError: if an option is out of range, a layer is not in the model, there is no text or too little, or
            `output_dir` cannot be written, or holds something else or other SAEs.

    Examples:
        >>> texts = [row["rejected"] for row in pairs]
        >>> options = {"d_sae": 64, "k": 8, "n_tokens": 4096, "batch_size": 256}
        >>> reports = sails.train_saes(model, tokenizer, texts, [1], output_dir="saes", progress=False, **options)
        >>> sorted(path.name for path in Path("saes/layer_1").iterdir())
        ['README.md', 'cfg.json', 'made_by.json', 'report.json', 'sae_weights.safetensors']
    """
    known = [field.name for field in fields(SAETrainingOptions)]
    if unknown := [name for name in options if name not in known]:
        raise InputError(f"there is no option {unknown[0]!r} of SAE trainings{did_you_mean(unknown[0], known)}")
    chosen = SAETrainingOptions(**options).for_width(model.config.get_text_config().hidden_size)
    _check(model, layers, Path(output_dir))
    if graph_prompts is not None and not chosen.graph_lambda:
        raise InputError("graph_prompts are given, but graph_lambda is 0; give both or none")
    with evaluation_mode(model), progress_bar(progress) as bar:
        graph = prompt_graph(model, tokenizer, graph_prompts, layers, chosen) if chosen.graph_lambda else None
        wanted = chosen.n_tokens + chosen.eval_tokens
        task = bar.add_task("reading text", total=wanted)
        corpus = read_corpus(
            texts, tokenizer, n_tokens=wanted, context_size=chosen.context_size, advance=partial(bar.advance, task)
        )
        bar.update(task, total=int(corpus.content.sum()))
        name = model.config.name_or_path if model_name is None else model_name
        names = {"model_name": name, "dataset_path": dataset_name}
        training = _Training.of(model, corpus, chosen, names, output_dir, overwrite=overwrite, graph=graph)
        finished = {layer: training.finished(layer) for layer in layers}
        reports = {layer: report for layer, report in finished.items() if report is not None}
        trainers = {layer: training.trainer(layer) for layer in layers if layer not in reports}
        if trainers:
            training.train(trainers, bar)
            reports |= training.finish(trainers, bar, tokenizer)
    return dict(sorted(reports.items()))


def _check(model: PreTrainedModel, layers: Sequence[int], output: Path) -> None:
    check_layers(model, layers)
    if not layers or len(set(layers)) < len(layers):
        raise InputError(f"layers {list(layers)}: give at least one, each once")
    for folder in (output / f"layer_{layer}" for layer in layers):
        if folder.exists() and not (folder / REPORT).is_file():
            raise InputError(f"{folder} exists, but was not written here; choose another --output_dir")


@dataclass(frozen=True)
class _Training:
    """Train SAEs of several layers on one stream of hidden states."""

    model: PreTrainedModel
    corpus: TokenCorpus
    train_windows: Tensor
    held_out: list[int]
    options: SAETrainingOptions
    metadata: dict[str, Any]
    inputs: dict[str, Any]
    """All that decides the SAEs and their reports, except the layer (JSON-able)."""
    output: Path
    overwrite: bool = False
    """Whether SAEs of another training are replaced."""
    graph: PromptGraph | None = None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        corpus: TokenCorpus,
        options: SAETrainingOptions,
        names: dict[str, Any],
        output_dir: str | Path,
        *,
        overwrite: bool = False,
        graph: PromptGraph | None = None,
    ) -> "_Training":
        train_W, held_out = split_windows(
            corpus, eval_tokens=options.eval_tokens, least=options.batch_size, seed=options.seed
        )
        metadata = {
            **names,
            "prepend_bos": corpus.prepend_bos,
            "context_size": options.context_size,
            "exclude_special_tokens": True,
            **({} if graph is None else {"graph": dict(graph.metadata)}),
        }
        tokens = {"ids": corpus.ids, "content": corpus.content, "ends": corpus.ends, "train": train_W}
        hashes = {"model": tensors_hash(model.state_dict()), "tokens": tensors_hash(tokens)}
        inputs = {**asdict(options), **hashes, "metadata": metadata}
        for name in (*NOT_IN_IDENTITY, *options.unused):
            del inputs[name]
        return cls(model, corpus, train_W, held_out, options, metadata, inputs, Path(output_dir), overwrite, graph)

    def folder(self, layer: int) -> Path:
        return self.output / f"layer_{layer}"

    def checkpoint(self, layer: int) -> Path:
        return self.output / f".layer_{layer}.checkpoint"

    def input_hash(self, layer: int) -> str:
        return content_hash({**self.inputs, "layer": layer})

    def finished(self, layer: int) -> SAEReport | None:
        """Return the report of a layer that was trained with the same inputs; raise `InputError` if it is damaged."""
        folder = self.folder(layer)
        if not (folder / REPORT).is_file():
            return None
        try:
            report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
            if report["input_hash"] != self.input_hash(layer):
                self._refuse(folder)
                return None
            intact = file_hash(folder / WEIGHTS) == report["sha256"]
        except (json.JSONDecodeError, KeyError, FileNotFoundError):
            intact = False
        if not intact:
            raise InputError(f"{folder} is damaged; delete the folder to train the SAE again")
        return SAEReport(**report)

    def _refuse(self, folder: Path) -> None:
        """Refuse to replace an SAE, or a part of its training, unless `overwrite` allows it."""
        earlier = read_record(folder / RECORD_FILE)
        if not self.overwrite:
            found = differences(self.identity, earlier)
            raise holds_other(f"{folder} holds an SAE of another model, text or options", found)
        say(f"the SAE in {folder} is replaced")

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the SAEs, for the record beside them."""
        apart = {name: self.inputs[name] for name in ("model", "tokens", "metadata")}
        return {**apart, "options": {name: of for name, of in self.inputs.items() if name not in apart}}

    def trainer(self, layer: int) -> LayerTrainer:
        """Make a layer's trainer, continued from its checkpoint if there is one with the same inputs."""
        d_model = self.model.config.get_text_config().hidden_size
        device = str(next(decoder_layers(self.model)[layer].parameters()).device)
        hook = {"hook_name": f"blocks.{layer}.hook_resid_post"}
        penalty = None if self.graph is None else self.graph.penalties[layer]
        trainer = LayerTrainer(d_model, self.options, device, self.metadata | hook, penalty)
        header = read_header(self.checkpoint(layer), CHECKPOINT)
        if header is not None and header["input_hash"] != self.input_hash(layer):
            self._refuse(self.checkpoint(layer))
        elif header is not None:
            tensors, header = load_artifact(self.checkpoint(layer), CHECKPOINT)
            trainer.load_state(tensors, header["provenance"])
        return trainer

    def train(self, trainers: dict[int, LayerTrainer], bar: Progress) -> None:
        """Train the layers together on one stream of hidden states."""
        with disk_errors(self.output):
            self.output.mkdir(parents=True, exist_ok=True)
        options = self.options
        task = bar.add_task("training SAEs", total=options.n_steps * len(trainers))
        tokens = max(options.batch_size, min(options.buffer_tokens, options.n_tokens))
        start = min(trainer.next_buffer for trainer in trainers.values())
        stream = islice(buffers(self.corpus, self.train_windows, tokens, options.seed), start, None)
        for index, windows in enumerate(stream, start):
            bar.update(task, completed=sum(trainer.steps for trainer in trainers.values()))
            unfinished = {layer: trainer for layer, trainer in trainers.items() if not trainer.done}
            if not unfinished:
                break
            # Layers are apart if the last run ended while their checkpoints were being written.
            due = {layer: trainer for layer, trainer in unfinished.items() if trainer.next_buffer == index}
            began = time.perf_counter()
            hidden = hidden_states_of(self.model, list(due), self.corpus.sequences(windows))
            shared = (time.perf_counter() - began) / len(due)
            for layer, trainer in due.items():
                began, steps = time.perf_counter(), trainer.steps
                trainer.train(hidden.pop(layer))
                trainer.seconds += time.perf_counter() - began + shared
                bar.update(task, completed=sum(trainer.steps for trainer in trainers.values()))
                is_time = trainer.steps // options.checkpoint_steps > steps // options.checkpoint_steps
                if is_time and not trainer.done:
                    tensors, counters = trainer.state()
                    save_artifact(self.checkpoint(layer), CHECKPOINT, tensors, counters, self.input_hash(layer))

    def finish(
        self, trainers: dict[int, LayerTrainer], bar: Progress, tokenizer: PreTrainedTokenizerBase
    ) -> dict[int, SAEReport]:
        """Write the trained SAEs and their reports, measured on what was written; delete their checkpoints.

        Raises:
            InputError: if the SAE of a layer diverged. Those of the other layers are kept.
        """
        from sae_lens import SAE

        sequences = self.corpus.sequences(self.held_out)
        task = bar.add_task("measuring SAEs", total=n_measured(sequences))
        with TemporaryDirectory(prefix=".measured.", dir=self.output) as temporary:
            folders = {layer: Path(temporary) / f"layer_{layer}" for layer in trainers}
            saes = {}
            for layer, trainer in trainers.items():
                trainer.save_sae(folders[layer])
                sae = SAE.load_from_disk(folders[layer], device=str(trainer.trainer.sae.device), dtype=FULL)
                saes[layer] = residual_sae(str(folders[layer]), sae)
            measured = evaluate_saes(
                self.model,
                saes,
                sequences,
                advance=partial(bar.advance, task),
                name_of=lambda token: str(tokenizer.decode([token])),
            )
            finite = [layer for layer, quality in measured.items() if math.isfinite(quality.explained_variance)]
            reports = {layer: self._keep(layer, trainers[layer], folders[layer], measured[layer]) for layer in finite}
        if diverged := sorted(trainers.keys() - reports.keys()):
            raise InputError(f"the SAE of layer {diverged[0]} diverged at lr {self.options.lr}; choose a smaller lr")
        return reports

    def _keep(self, layer: int, trainer: LayerTrainer, written: Path, quality: SAEQuality) -> SAEReport:
        """Move a written SAE to its folder, with its report."""
        options = self.options
        assert options.d_sae is not None
        penalty = None if self.graph is None else self.graph.penalties[layer]
        report = SAEReport(
            **asdict(quality),
            layer=layer,
            d_sae=options.d_sae,
            k=options.k,
            architecture=options.architecture,
            tokens_trained=trainer.steps * options.batch_size,
            seconds=trainer.seconds,
            input_hash=self.input_hash(layer),
            sha256=file_hash(written / WEIGHTS),
            graph_edges=None if penalty is None else penalty.n_edges,
            graph_isolated=None if penalty is None else penalty.n_isolated,
            graph_energy=None if penalty is None else penalty.mean_energy(trainer.trainer.sae.W_dec),
        )
        write_json(written / REPORT, asdict(report))
        write_text(written / CARD, card_of(asdict(report), self.options, self.metadata))
        write_record(written, self.identity)
        with atomic_folder(self.folder(layer)) as temporary:
            shutil.copytree(written, temporary, dirs_exist_ok=True)
        shutil.rmtree(self.checkpoint(layer), ignore_errors=True)
        return report
