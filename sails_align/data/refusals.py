"""Choose the rows of harmful requests, and the refusals among responses: what methods take for a pool of safe answers.

Labels in data are wrong now and then, and a harmful answer is nearest to its own request. So a pool holds no text that
is not a refusal.
"""

from collections.abc import Callable, Sequence

from datasets import Dataset

from sails_align.core.errors import InputError
from sails_align.core.log import say


def harmful_rows(rows: Dataset) -> list[int]:
    """Return the numbers of the rows whose column `harmful` is not false: of all rows, if there is no such column."""
    if "harmful" not in rows.column_names:
        return list(range(len(rows)))
    return [number for number, harmful in enumerate(rows["harmful"]) if harmful is not False]


def refusals_among(
    responses: Sequence[str], is_refusal: Callable[[str], bool], *, source: str, user: str, remedy: str
) -> list[int]:
    """Return the numbers of the responses that refuse, and say how many do not.

    Args:
        responses: texts.
        is_refusal: tells whether a text refuses and does not help.
        source: where the responses come from, for messages.
        user: what needs the pool, for messages.
        remedy: what to do if the pool is empty, for the error.

    Raises:
        InputError: if none is a refusal.
    """
    refusals = [number for number, text in enumerate(responses) if is_refusal(text)]
    if not refusals:
        raise InputError(
            f"none of the {len(responses)} responses of {source} is a refusal by the rules judge, "
            f"so the pool of {user} is empty;\n{remedy}"
        )
    if len(refusals) < len(responses):
        n = len(responses) - len(refusals)
        say(f"    {n} of {len(responses)} responses are no refusals, and not in the pool of {user}")
    return refusals
