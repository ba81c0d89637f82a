"""Types of settings: numbers with bounds, and the check that a value is of a type."""

import json
import re
import types
import typing
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`; `above` excludes `low`, `below` excludes `high`."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and not (
            (self.above and value == self.low) or (self.below and value == self.high)
        )

    def __str__(self) -> str:
        if self.above:
            return f"above {self.low} and {'below' if self.below else 'at most'} {self.high}"
        return f"from {self.low} to {'below ' if self.below else ''}{self.high}"


# Upper bounds exclude values that no machine has the memory or time for.
Count = Annotated[int, Range(1, 10**9)]  # such as steps
Seed = Annotated[int, Range(0, 2**63 - 1)]
Way = Annotated[int, Range(2, 10_000)]
Images = Annotated[int, Range(1, 10**6)]  # of a class, or of a batch
Episodes = Annotated[int, Range(2, 10**6)]
InnerSteps = Annotated[int, Range(1, 1000)]
EvalInnerSteps = Annotated[int, Range(1, 10_000)]
Copies = Annotated[int, Range(0, 1000)]  # of an image
Width = Annotated[int, Range(1, 2048)]  # channels of a layer
Size = Annotated[int, Range(4, 4096)]  # height and width of an image in pixels
Positive = Annotated[float, Range(0, 10**9, above=True)]
NotNegative = Annotated[float, Range(0, 10**9)]
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, below=True)]

Vary = Literal["uniform", "meta_dataset"]  # how tasks differ in way and shot, explained in data/varied.py
QueryBalance = Literal["balanced", "dirichlet"]  # of the classes in a task's queries, explained in data/sampler.py

# Parameters of torch's optimizers and schedules; torch checks only some of them, and later.
TORCH: dict[str, Any] = {
    "lr": NotNegative,
    "weight_decay": NotNegative,
    "momentum": Share,
    "dampening": Share,
    "eps": NotNegative,
    "factor": Share,
    "start_factor": Annotated[float, Range(0, 1, above=True)],
    "end_factor": Share,
    "total_iters": Annotated[int, Range(0, 10**9)],
    "gamma": Annotated[float, Range(0, 10)],
    "step_size": Count,
    "milestones": list[Count],
    "T_max": Count,
    "T_0": Count,
    "T_mult": Count,
    "eta_min": NotNegative,
    "max_lr": Positive,
    "base_lr": NotNegative,
    "total_steps": Count,
    "pct_start": Share,
}


def checked(name: str, value: Any, hint: Any) -> Any:
    """Return the value of the setting `name`, with an integer converted if its type is float.

    Raises ValueError with the setting, the value and what is allowed if the value is not of the type `hint`.
    """
    if typing.get_origin(hint) is dict and isinstance(value, dict):
        return {key: checked(f"{name}.{key}", own, typing.get_args(hint)[1]) for key, own in value.items()}
    try:
        return _of_type(value, hint)
    except ValueError:
        raise ValueError(f"{name}={shown(value)}: must be {in_words(hint)}") from None


def shown(value: Any) -> str:
    """Format a value as typed; text that looks like a number or is empty gets quotes."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return repr(value) if isinstance(value, str) and re.fullmatch(r"[\d.]*", value) else str(value)


def in_words(hint: Any) -> str:
    """Describe the values that a type allows."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"a {'whole ' if args[0] is int else ''}number {args[1]}"
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(in_words, args))
    if origin is list:
        return f"a list such as [A,B], each item {in_words(args[0])}"
    if origin is dict:
        return "a group of settings"
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(hint, str(hint))


def _of_type(value: Any, hint: Any) -> Any:
    """Return the value, or raise ValueError without a message."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = _of_type(value, args[0])
        fits = value in args[1]
    elif origin is typing.Literal:
        fits = value in args
    elif origin in (typing.Union, types.UnionType):
        for arg in args:
            with suppress(ValueError):
                return _of_type(value, arg)
        fits = False
    elif origin is list and isinstance(value, list):
        return [_of_type(one, args[0]) for one in value]
    elif origin is dict and isinstance(value, dict):
        return {key: _of_type(one, args[1]) for key, one in value.items()}
    elif hint is int:
        fits = type(value) is int and abs(value) < 2**63
    elif hint is float:
        fits = type(value) in (int, float) and abs(value) < 1e300  # NaN is not
        value = float(value) if fits else value
    elif hint is Any or origin or not isinstance(hint, type):
        fits = origin not in (list, dict)
    else:
        fits = isinstance(value, hint)
    if not fits:
        raise ValueError
    return value
