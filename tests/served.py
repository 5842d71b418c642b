"""What the local server answers in tests of evaluations: as the model that is evaluated, and as its judge."""

import json
import re

from stub_server import Asked, digest_of, text_of

ASKED_FOR = re.compile(r'\{"id": "(?P<mark>\w+)", "reasoning": "\.\.\.", "(?P<key>\w+)": <(?P<choices>[^>]+)>\}')


def answer(asked: Asked) -> str:
    """A judge's answer to a judge's question; to all else what a model says, which follows from the text."""
    text = text_of(asked)
    question = ASKED_FOR.search(text)
    if question is None:
        return f"Response number {digest_of(text) % 10_000}."
    choices = [json.loads(choice) for choice in question["choices"].split(" or ")]
    # The marker follows from the texts that are judged, and so does the verdict.
    choice = choices[digest_of(question["mark"]) % len(choices)]
    return json.dumps({"id": question["mark"], "reasoning": "By the rubric.", question["key"]: choice})
