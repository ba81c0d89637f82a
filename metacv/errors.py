"""The error that a user can correct."""


class UserError(Exception):
    """Names the setting, its value, what is allowed and what to do next. The command line prints it in one line."""
