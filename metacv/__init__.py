"""Meta-learning for few-shot image classification, from the command line."""

__version__ = "0.1.0"


class MetacvError(Exception):
    """What a user can put right: its text names the setting and the fact, and is shown without a traceback."""
