"""Load prompts: a known set, a local copy of one, any file with prompts in it, or a dataset on the hub.

load_prompts("jailbreakbench")                                   # a known set, listed in `sets`
load_prompts("advbench=data/harmful_behaviors.csv")              # a local copy of one
load_prompts("mine.jsonl", kind="harmful", columns={"prompt": "request"})
"""

import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sails_align.core.errors import InputError, first_line
from sails_align.core.options import HUB_ID
from sails_align.core.suggestions import did_you_mean
from sails_align.data.loading import load_rows
from sails_align.data.messages import one_system_turn
from sails_align.data.rows import OnBadRows
from sails_align.evaluation.options import N_MADE, PromptArguments
from sails_align.evaluation.prompts import maker_of
from sails_align.evaluation.prompts.definitions import COLUMNS, Columns, PromptSet, Subset
from sails_align.evaluation.prompts.files import headless, headless_folder, object_in, read_table
from sails_align.evaluation.prompts.recognize import check_copy, check_count, copy_in, suggestion, suggestion_for_object
from sails_align.evaluation.prompts.rows import Table, choose_columns, parse, table_of
from sails_align.evaluation.prompts.sets import PROMPT_SETS, find_set
from sails_align.evaluation.records import Kind, Prompt

logger = logging.getLogger(__name__)


def load_prompts(
    name_or_path: str,
    *,
    n: int | None = None,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
    kind: Kind | None = None,
    category: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    on_bad_rows: OnBadRows = "error",
) -> list[Prompt]:
    """Load prompts, each once. A warning counts the rows without a prompt and the duplicates, which are left out.

    Args:
        name_or_path: a name in `PROMPT_SETS` (before a file of that name), `name=path` for a local copy of such a set,
            a path that `load_rows` reads, the id of a dataset on the hub, or `testbed` or `twins`.
        n: draw a sample of this size, balanced over categories (of each set of `testbed` or
            `twins`); all, if there are fewer prompts.
        seed: of the sample; a smaller sample is a part of a larger one with the same seed.
        columns: role (`prompt`, `category`, `kind`, `target`, `reference`, `context`, `id`) -> name of its column, if
            it is not a usual one (`sets.COLUMNS`). Ignored for known sets on the hub.
        kind: of prompts for which neither the set nor a column gives one.
        category: likewise.
        split: of a folder or a dataset on the hub (default: train), or a part of `testbed` or `twins` (default:
            test). Known sets have their own.
        revision: branch, tag or commit of a dataset on the hub.
        on_bad_rows: what to do with rows of your own files that cannot be read, such as ones that are not UTF-8:
            "error", or "skip" (left out and counted, as rows without a prompt are).

    Returns:
        prompts in the order of the source; their ids are hashes of their messages, equal in every copy.

    Raises:
        InputError: if the name is unknown, the data cannot be loaded, or there is no prompt or no kind in it.

    Examples:
        >>> prompts = sails.load_prompts("twins", n=2)
        >>> [prompt.kind for prompt in prompts]
        ['harmful', 'harmful', 'harmful', 'harmful', 'dual_use', 'dual_use', 'benign', 'benign']
    """
    maker = maker_of(name_or_path)
    if maker is not None:
        return maker.load()(name_or_path, n or N_MADE, part=split or "test", seed=seed)
    known, path = _find(name_or_path)
    if known is None:
        tables = [_table(path, columns or {}, split, revision, mark_unreadable=on_bad_rows == "skip")]
    elif split is not None:
        raise InputError(
            f"{known.name} has splits of its own; leave out split={split!r}, or load {known.source.hub_id}"
        )
    else:
        tables = _checked(known, list(_known_tables(known, path, revision)), name_or_path, is_copy=bool(path))
    asked = columns if columns and path else {}
    chosen = choose_columns(known.columns if known else COLUMNS, asked, tables)
    dropped: Counter[str] = Counter()
    default = category or (known.name if known else "all")
    prompts = [prompt for table in tables for prompt in parse(table, chosen, kind, default, dropped)]
    prompts = _distinct(prompts, dropped)
    if not prompts:
        raise InputError(f"{name_or_path} has no prompts: {_report(dropped) or 'it is empty'}; give data that has some")
    if dropped:
        logger.warning("%s: %d prompts; left out: %s", name_or_path, len(prompts), _report(dropped))
    if known is None and (hint := suggestion(tables[0].names, path)):
        logger.warning("%s is read as an ordinary file.%s", path, hint)
    return prompts if n is None else _sample(prompts, n, seed)


def counted(prompts: Sequence[Prompt]) -> str:
    """Return the numbers of prompts, by kind, as text."""
    kinds = Counter(prompt.kind for prompt in prompts)
    return f"{len(prompts):,} prompts: {', '.join(f'{n:,} {kind}' for kind, n in kinds.items())}"


def load_all(asked: PromptArguments, seed: int, system_prompt: str | None = None) -> list[Prompt]:
    """Load the prompts of all sets in the options. With several sets, ids begin with the name of their set.

    Raises:
        InputError: if a set cannot be loaded.
    """
    columns = {"prompt": asked.prompt_column, "category": asked.category_column}
    system = () if system_prompt is None else ({"role": "system", "content": system_prompt},)
    prompts = []
    for name in asked.prompts:
        prefix = f"{name}:" if len(asked.prompts) > 1 else ""
        maker = maker_of(name)
        if maker is not None:
            loaded = maker.load()(name, asked.n_prompts or N_MADE, part=asked.part, seed=seed)
        else:
            loaded = load_prompts(
                name,
                n=asked.n_prompts,
                seed=seed,
                columns={role: column for role, column in columns.items() if column is not None},
                split=asked.split,
                kind=asked.kind,  # pyright: ignore[reportArgumentType] -- checked by the options
                on_bad_rows=asked.on_bad_rows,  # pyright: ignore[reportArgumentType] -- likewise
            )
        for prompt in loaded:
            meta = {"split": split_of(name), **prompt.meta}
            messages = tuple(one_system_turn([*system, *prompt.messages]))
            prompts.append(replace(prompt, id=prefix + prompt.id, messages=messages, meta=meta))
    return prompts


def split_of(name: str) -> str:
    """Return what results call a prompt set that is named in the options: a known set's name, else the whole path."""
    known = find_set(name.partition("=")[0])
    return name if known is None else known.name


# -- finding ----------------------------------------------------------------------------------------------------------


def _find(name: str) -> tuple[PromptSet | None, str]:
    """Return the known set of a name, if it is one, and the path or hub id of the data."""
    set_name, separator, path = name.partition("=")
    known = find_set(set_name)
    if known is not None:
        if separator and not (path and Path(path).expanduser().exists()):
            raise InputError(f"there is no file or folder {path!r}; give the path of a copy of {known.name}")
        return known, path
    if Path(name).expanduser().exists() or ("/" in name and HUB_ID.fullmatch(name)):
        return None, name
    hint = did_you_mean(set_name.lower().replace("_", "-"), PROMPT_SETS.names())
    raise InputError(
        f"there is no prompt set, file or folder {name!r}{hint}\nelse give a path, or the id of a dataset on the hub"
    )


def _table(
    path: str, asked: Mapping[str, str], split: str | None, revision: str | None, *, mark_unreadable: bool
) -> Table:
    """Return the table of any file, folder or dataset on the hub."""
    file = Path(path).expanduser()
    if file.is_file():
        content = object_in(file)
        if content is not None and (hint := suggestion_for_object(content, path)):
            raise InputError(f"{path} is one JSON object, and not a row a line{hint}")
        return read_table(file, _names(COLUMNS, asked), mark_unreadable=mark_unreadable)
    found = headless_folder(file, _names(COLUMNS, asked)) if file.is_dir() else None
    if found is not None:
        return found
    rows = load_rows(path, split=split or "train", revision=revision, mark_unreadable=mark_unreadable)
    return table_of(rows, path)


def _names(columns: Columns, asked: Mapping[str, str]) -> set[str]:
    return {name for options in columns.values() for name in options} | {name.lower() for name in asked.values()}


def _checked(known: PromptSet, tables: Sequence[Table], name: str, *, is_copy: bool) -> list[Table]:
    """Keep the rows of a known set; see `check_copy` and `check_count`."""
    checked = []
    for table in tables:
        rows = list(table.rows)
        of_set = table.subset.row if table.subset is not None else None
        kept = rows if of_set is None else [row for row in map(of_set, rows) if row is not None]
        if is_copy:
            check_copy(known, table.names, kept, len(rows), table.where)
        names = tuple(dict.fromkeys([*map(str.lower, table.names), *(kept[0] if kept else ())]))
        checked.append(replace(table, rows=kept, names=table.names if of_set is None else names))
    check_count(known, sum(len(list(table.rows)) for table in checked), name)
    return checked


def _known_tables(known: PromptSet, path: str, revision: str | None) -> Iterator[Table]:
    """Yield the tables of a known set: from a local copy, if there is a path, else from the hub."""
    local = Path(path).expanduser() if path else None
    if local is not None and local.is_file():
        yield _read_file(known, _subset_of(known, local), local)
        return
    for subset in known.subsets:
        copy = copy_in(known, local) if local is not None and subset.pattern is None else None
        if copy is not None:
            yield _read_file(known, subset, copy)
        elif subset.pattern is None:
            yield _load(known, subset, str(local or known.source.hub_id), None if local else revision)
        else:
            folder = local or _download(known, subset.pattern, revision)
            files = sorted(folder.glob(subset.pattern), key=lambda file: (len(file.name), file.name))
            if subset.unpack is not None:  # other files lie beside them
                files = [file for file in files if subset.unpack(object_in(file) or {})]
            if not files:
                raise InputError(
                    f"{folder} holds no {subset.pattern} of {known.name}; give a whole copy, or one file of it"
                )
            yield from (_read_file(known, subset, file) for file in files)


def _subset_of(known: PromptSet, file: Path) -> Subset:
    """Return the subset of a set that a local file is a copy of."""
    for name in reversed(file.resolve().parts):  # the file's own name tells best
        found = [subset for subset in known.subsets if subset.word in name.lower()]
        if len(found) == 1:
            return found[0]
    words = " or ".join(subset.word for subset in known.subsets)
    raise InputError(f"{file}: its path does not tell which part of {known.name} it is; put {words} into its name")


def _read_file(known: PromptSet, subset: Subset, file: Path) -> Table:
    category = subset.category(file) if callable(subset.category) else subset.category
    if subset.header is not None and subset.pattern is not None:
        if file.match(subset.pattern):
            return Table(headless(file, subset.header), subset.header, str(file), subset, category)
        category = None  # a copy in another format has a column for it
    return read_table(file, _names(known.columns, {}), subset, category)


def _load(known: PromptSet, subset: Subset, where: str, revision: str | None) -> Table:
    try:
        rows = load_rows(where, config=subset.config, split=subset.split, revision=revision)
    except InputError as error:
        if where != known.source.hub_id:
            raise
        raise _unavailable(known, first_line(error)) from error
    return table_of(rows, where, subset, subset.category if isinstance(subset.category, str) else None)


def _download(known: PromptSet, pattern: str, revision: str | None) -> Path:
    """Return a folder with the files of a set's repository that match a pattern."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    hub_id = known.source.hub_id
    if hub_id is None:
        raise _unavailable(known, f"{known.name} is not on the hub")
    try:
        return Path(snapshot_download(hub_id, repo_type="dataset", revision=revision, allow_patterns=pattern))
    except LocalEntryNotFoundError as error:
        raise _unavailable(known, f"{hub_id} is not in the cache and the hub cannot be reached") from error
    except GatedRepoError as error:  # the first line of its message is only a status
        raise _unavailable(known, f"{hub_id} is gated, and you have no access to it") from error
    except (OSError, ValueError) as error:  # all errors of the hub are one of these
        cause = first_line(error)
        raise _unavailable(known, f"{hub_id} cannot be loaded: {cause}") from error


def _unavailable(known: PromptSet, cause: str) -> InputError:
    url = known.source.url
    access = f"accept its licence at {url} and log in with `hf auth login`" if known.source.gated else f"see {url}"
    return InputError(f"{cause.rstrip('.;')}.\nTo get {known.name}: {access};\nor give a local copy: {known.name}=PATH")


# -- choosing ----------------------------------------------------------------------------------------------------------


def _distinct(prompts: Iterable[Prompt], dropped: Counter[str]) -> list[Prompt]:
    """Return each prompt once, as it first occurs."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        before = first.setdefault(prompt.id, prompt)
        if before is not prompt:
            dropped["duplicate" if before.kind == prompt.kind else "duplicate of another kind"] += 1
    return list(first.values())


def _report(dropped: Counter[str]) -> str:
    return ", ".join(f"{cause}: {count}" for cause, count in dropped.most_common())


def _sample(prompts: list[Prompt], n: int, seed: int) -> list[Prompt]:
    """Draw from each category in turn until there are `n`."""
    if n < 1:
        raise InputError(f"{n} prompts are asked for; ask for 1 or more, or for all of them")
    rng = random.Random(f"prompts {seed}")
    piles: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        piles.setdefault(prompt.category, []).append(index)
    order = rng.sample(sorted(piles), len(piles))
    shuffled = [rng.sample(piles[category], len(piles[category])) for category in order]
    rounds = [pile[turn] for turn in range(max(map(len, shuffled))) for pile in shuffled if turn < len(pile)]
    return [prompts[index] for index in sorted(rounds[:n])]
