"""Tell the errors that a chat template raises: it is a program of the user's, and fails as programs do."""

import traceback

import jinja2

TEMPLATE_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def is_from_template(error: BaseException) -> bool:
    """Return whether a chat template raised an error, and not what calls it."""
    frames = traceback.walk_tb(error.__traceback__)
    return isinstance(error, jinja2.TemplateError) or any(
        frame.f_code.co_filename in ("<template>", "<unknown>") for frame, _ in frames
    )
