"""The exception for errors that the user can correct."""


class UserError(Exception):
    """Names the setting, its value, what is allowed and what to do next. The command line prints it in one line."""
