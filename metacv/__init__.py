"""Meta-learning for few-shot image classification, from the command line."""

__version__ = "0.1.0"


def clean(text: str) -> str:
    """Text of strangers, such as a file's name, for a terminal or a picture: one line that can be encoded."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


class MetacvError(Exception):
    """What a user can put right: its text names the setting and the fact, and is shown without a traceback."""
