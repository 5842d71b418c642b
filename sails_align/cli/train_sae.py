"""The command `sails train-sae`: train SAEs for a model that has no public ones.

    sails train-sae --model_name_or_path Qwen/Qwen2.5-1.5B --dataset_name data.jsonl --layers 7 14 21

The dataset has a column `text`, or is of one of the formats that trainings take: its dialogues, with the chosen and the
rejected response, then go through the model's chat template (without one, blank lines join their turns).
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError
from sails_align.core.options import OVERWRITE, check_choices, option
from sails_align.models import DTYPES
from sails_align.saes.options import SAETrainingOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sails_align.data.messages import Message
    from sails_align.saes.train import SAEReport
    from sails_align.testbed.build import Testbed

logger = logging.getLogger(__name__)

NO_LIMIT = 2**31
N_GRAPH_PROMPTS = 512


@dataclass(frozen=True)
class SAEArguments:
    """Model and data of an SAE training."""

    layers: list[int] = field(metadata={"help": "Layers to train an SAE for: l is the output of block l, from 0."})
    model_name_or_path: str | None = option(None, "A Hugging Face model (default: the testbed's).")
    model_revision: str | None = option(None, "Its branch, tag or commit.")
    trust_remote_code: bool = option(False, "Run code that comes with the model.")
    dtype: str = option("auto", "Type of the model's weights: auto (as saved), float32, bfloat16, float16.")
    dataset_name: str | None = option(None, "A hub id, file or folder. The testbed's model has its own text.")
    dataset_config: str | None = option(None, "Its configuration.")
    dataset_split: str = option("train", "Its split.")
    on_bad_rows: str = option("error", "Rows that cannot be used: error, or skip (counted).")
    graph_dataset_name: str | None = option(
        None,
        "Prompts for the graph of --graph_lambda: a hub id, file or folder, or testbed or smollm2 for their own. "
        f"Default: those that come with the model; at most {N_GRAPH_PROMPTS} of each kind.",
    )
    output_dir: str | None = option(None, "Default: runs/saes-<model>.")
    overwrite_output_dir: bool = option(False, OVERWRITE)

    def __post_init__(self) -> None:
        check_choices(self, {"dtype": DTYPES, "on_bad_rows": ("error", "skip")})


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> "dict[int, SAEReport]":
    """Parse, train, show. Finished layers are not trained again; an interrupted training continues."""
    args, options = CommandLine.read(argv).parse([SAEArguments, SAETrainingOptions], prog=prog)
    if args.graph_dataset_name is not None and not options.graph_lambda:
        raise InputError("graph_dataset_name is given, but graph_lambda is 0; give both or none")
    from sails_align.core.files import output_folder
    from sails_align.core.log import LOG_FILE, Stages, log_file, say
    from sails_align.models.spec import known_as, stem_of
    from sails_align.saes.train import train_saes
    from sails_align.testbed.build import MODEL_NAME, is_testbed, resolve_testbed

    testbed = resolve_testbed(args.model_name_or_path) if is_testbed(args.model_name_or_path) else None
    folder = Path(args.output_dir or f"runs/saes-{stem_of(args.model_name_or_path or MODEL_NAME)}")
    opened, stages = log_file(folder, "sails train-sae"), Stages(("model", "SAEs"))
    with output_folder(folder) as output_dir, opened, stages:
        say(f"training of SAEs; output: {output_dir}/ (all lines: {LOG_FILE})")
        stages.begin("model", args.model_name_or_path or MODEL_NAME)
        model, tokenizer = load_model(args)
        layers = ", ".join(map(str, args.layers))
        stages.begin("SAEs", f"layers {layers}; {options.n_tokens:,} tokens of {args.dataset_name or 'the testbed'}")
        reports = train_saes(
            model,
            tokenizer,
            texts_of(args, tokenizer, testbed),
            args.layers,
            output_dir=output_dir,
            model_name=known_as(args.model_name_or_path or MODEL_NAME),
            dataset_name=args.dataset_name,
            overwrite=args.overwrite_output_dir,
            graph_prompts=graph_prompts_of(args) if options.graph_lambda else None,
            **vars(options),
        )
    show(reports, output_dir)
    return reports


def load_model(args: SAEArguments) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Return the model, on the GPU if there is one, and its tokenizer.

    Raises `InputError` if there is no such model, or it is not cached and the hub cannot be reached.
    """
    import torch

    from sails_align.models.load import check_vocabulary, load_causal_lm, load_config, load_tokenizer
    from sails_align.models.spec import model_path
    from sails_align.testbed.build import MODEL_NAME

    where: dict[str, Any] = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
    name = model_path(args.model_name_or_path or MODEL_NAME)
    tokenizer = load_tokenizer(name, **where)
    check_vocabulary(tokenizer, load_config(name, **where))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_causal_lm(name, dtype=args.dtype, device=device, **where), tokenizer


def texts_of(
    args: SAEArguments, tokenizer: "PreTrainedTokenizerBase", testbed: "Testbed | None"
) -> Iterator[str] | Iterator[Sequence[int]]:
    """Return what to train on: texts, or token ids.

    Raises `InputError` as `load_rows` and `normalize`; or if no data set is named.
    """
    from sails_align.data.formats import NO_LABEL, Columns
    from sails_align.data.loading import load_rows
    from sails_align.data.pairs import normalize
    from sails_align.data.rows import columns_by_lower_name
    from sails_align.data.tokens import TemplateCheck
    from sails_align.testbed.build import sae_rows

    name = args.dataset_name
    if name is None:
        if testbed is None:
            raise InputError("no data; give --dataset_name (a hub id, a file or a folder with a column `text`)")
        return sae_rows(testbed.world, tokenizer)
    rows = load_rows(name, config=args.dataset_config, split=args.dataset_split, mark_unreadable=True)
    columns = columns_by_lower_name(rows)
    if "text" in columns:
        return _texts(rows, columns["text"], name, args.on_bad_rows)
    all_responses = Columns(label=NO_LABEL)  # an SAE describes good and bad ones
    how: dict[str, Any] = {"on_bad_rows": args.on_bad_rows, "columns": all_responses}
    how["check"] = TemplateCheck(tokenizer) if tokenizer.chat_template else None
    pairs = normalize(rows, name=name, **how).dataset
    return _dialogues(pairs, tokenizer)


def graph_prompts_of(args: SAEArguments) -> "list[list[Message]]":
    """Return the prompts of `--graph_dataset_name`, or those that come with the model.

    Raises `InputError` if the dataset cannot be read, or none is named and none comes with the model.
    """
    from sails_align.data.loading import load_rows
    from sails_align.data.pairs import requests_of
    from sails_align.edits.requests import SIDES, requests_of_model
    from sails_align.testbed.build import MODEL_NAME

    name = args.graph_dataset_name
    of_model = [requests_of_model(name or args.model_name_or_path or MODEL_NAME, side) for side in SIDES]
    sets = [rows for rows in of_model if rows is not None]
    if not sets and name is None:
        raise InputError(f"no prompts come with {args.model_name_or_path}; give a dataset with --graph_dataset_name")
    sets = sets or [requests_of(load_rows(str(name)), name=str(name))]
    some = [rows.shuffle(seed=0).select(range(min(N_GRAPH_PROMPTS, len(rows)))) for rows in sets]
    return [prompt for rows in some for prompt in rows["prompt"]]


def _texts(rows: Any, column: str, name: str, on_bad_rows: str) -> Iterator[str]:
    from sails_align.data.files import UNREADABLE
    from sails_align.data.messages import is_empty

    unreadable = rows[UNREADABLE] if UNREADABLE in rows.column_names else [None] * len(rows)
    bad: dict[int, str] = {}
    for index, (text, cause) in enumerate(zip(rows[column], unreadable, strict=True)):
        if cause is not None:
            bad[index] = f"cannot be read ({cause})"
        elif is_empty(text):
            bad[index] = f"have an empty {column} or none"
        elif not isinstance(text, str):
            bad[index] = f"have a {column} that is no text"
    if bad:
        causes = " or ".join(dict.fromkeys(bad.values()))
        found = f"{len(bad)} of {len(rows)} rows of {name} {causes} (first: {list(bad)[:3]})"
        if on_bad_rows == "error":
            raise InputError(f"{found};\ncorrect them, or leave them out with --on_bad_rows skip")
        logger.warning("%s: they are left out", found)
    return (row[column] for index, row in enumerate(rows) if index not in bad)


def _dialogues(pairs: Any, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Any]:
    """Yield each prompt with each of its responses: token ids, or text without a chat template."""
    from sails_align.data.tokens import tokenize_response

    for row in pairs:
        for response in (row[column] for column in ("chosen", "rejected") if row.get(column) is not None):
            if tokenizer.chat_template:
                yield tokenize_response(tokenizer, row["prompt"], response, NO_LIMIT).input_ids
            else:
                yield "\n\n".join([*(message["content"] for message in row["prompt"]), response])


def show(reports: "dict[int, SAEReport]", output_dir: Path) -> None:
    """Print how good the SAEs are on held-out tokens, and where they are."""
    from sails_align.core.log import show as show_all
    from sails_align.core.tables import FittedTable

    quality = ("explained variance", "of typical tokens", "L0", "dead latents", "loss recovered")
    table = FittedTable("SAEs, on held-out tokens", ("layer", *quality, "tokens", "seconds"))
    for layer, report in reports.items():
        recovered = "-" if report.loss_recovered is None else f"{report.loss_recovered:.1%}"
        typical = report.explained_variance_typical
        variances = f"{report.explained_variance:.3f}", "-" if typical is None else f"{typical:.3f}"
        cells = (*variances, f"{report.l0:.1f}", f"{report.dead_fraction:.1%}", recovered)
        table.add_row(str(layer), *cells, f"{report.tokens_trained:,}", f"{report.seconds:.0f}")
    lines = []
    for layer, report in reports.items():
        if report.n_massive:
            tokens = ", ".join(f"{token!r} ({n})" for token, n in report.massive_tokens.items())
            lines.append(
                f"layer {layer}: {report.n_massive} of {report.eval_tokens:,} tokens have massive activations: {tokens}"
            )
        if report.graph_energy is not None:
            of = f"its graph of {report.graph_edges:,} edges"
            lines.append(f"layer {layer}: mean energy of the decoder on {of}: {report.graph_energy:.3f}")
    show_all(table, *lines, f"SAEs      {output_dir}/  (--sae_path {output_dir})")
