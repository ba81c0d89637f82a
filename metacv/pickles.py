"""Read untrusted pickles without running their code: plain values, and replacements for a few allowed names."""

import io
import math
import pickle
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from metacv import limits

# Where each opcode has the keys of a dict on the stack.
KEYS = {"SETITEM": slice(-2, -1), "SETITEMS": slice(None, None, 2), "DICT": slice(None, None, 2)}
# Opcodes that plain values do not need: objects, sets (which hash their values, see `check`), unbounded integers.
REFUSED = {"EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "PERSID", "EMPTY_SET", "ADDITEMS", "FROZENSET"}
REFUSED |= {"LONG4", "POP", "POP_MARK", "DUP", "NEXT_BUFFER", "READONLY_BUFFER"}
WIDTHS = {1: ("Bool", "Byte", "Char"), 2: ("Short", "Half", "BFloat16"), 4: ("Int", "Float"), 8: ("Long", "Double")}


class PlainUnpickler(pickle._Unpickler):
    """Based on the unpickler in Python, because the one in C allocates memory for any size that a file claims.

    Imports nothing that a pickle names: `stand_ins` maps the allowed names to their replacements.
    """

    title: ClassVar[str]  # kind of file, used in messages
    stand_ins: ClassVar[Mapping[tuple[str, str], Any]]
    steps = 0
    stack: list[Any]  # complete values since the last MARK

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.stand_ins:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which {self.title} do not need")
        return self.stand_ins[module, name]

    def check(self, code: str) -> None:
        """Raise UnpicklingError if the next opcode is not needed for plain values."""
        if code in REFUSED:
            raise pickle.UnpicklingError(f"it has the opcode {code}, which {self.title} do not need")
        if any(type(key) not in (str, bytes, int) for key in self.stack[KEYS.get(code, slice(0))]):
            raise pickle.UnpicklingError("it has a key that is neither text nor a whole number")  # hash() may hang
        if code == "BUILD" and not hasattr(type(self.stack[-2]), "__setstate__"):
            raise pickle.UnpicklingError("it changes an object")


def _checked(code: str, load: Callable[[Any], None]) -> Callable[[Any], None]:
    doubtful = code in (*KEYS, *REFUSED, "BUILD")

    def step(unpickler: PlainUnpickler) -> None:
        unpickler.steps += 1
        if unpickler.steps > limits.STEPS:
            raise pickle.UnpicklingError(f"it has more than {limits.STEPS} steps")
        if doubtful:
            unpickler.check(code)
        load(unpickler)

    return step


_NAMES = {value[0]: name for name, value in vars(pickle).items() if name.isupper() and type(value) is bytes}
PlainUnpickler.dispatch = {
    code: _checked(_NAMES[code], load) for code, load in pickle._Unpickler.dispatch.items() if code in _NAMES
}


class _Ordered(dict[Any, Any]):
    """Replacement for OrderedDict; its attributes are not needed to check a file."""

    def __setstate__(self, state: Any) -> None:
        self["state"] = state


def _tensor(numbers: int, offset: int, size: tuple[int, ...], *_: Any) -> None:
    """Replacement for a tensor; ValueError if it is larger than its storage in the file, and so would need memory."""
    if not all(type(side) is int and side >= 0 for side in size) or math.prod(size) > numbers:
        raise ValueError(f"a tensor of size {size[:8]} has only {numbers} numbers")


class CheckpointUnpickler(PlainUnpickler):
    """Unpickler for a checkpoint, without its tensors; any error if it holds more than tensors and plain values."""

    title = "checkpoints"
    stand_ins: ClassVar = {
        ("collections", "OrderedDict"): _Ordered,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_parameter"): lambda data, *_: None,
        **{("torch", f"{name}Storage"): width for width, names in WIDTHS.items() for name in names},
    }

    def __init__(self, content: bytes, sizes: Mapping[str, int]) -> None:
        """`sizes`: the size of each tensor's storage in bytes, by name."""
        super().__init__(io.BytesIO(content))
        self.sizes = sizes

    def persistent_load(self, pid: Any) -> int:
        """Return the number of elements in a storage."""
        _, width, name, _, numbers = pid
        if type(numbers) is not int or not 0 <= numbers * width <= self.sizes[name]:
            raise ValueError(f"the storage {name} has {self.sizes[name]} bytes, not {numbers} numbers")
        return numbers


def check_extent(value: Any, most: int) -> None:
    """Raise ValueError if nested values, written out, are more than `most`; ten letters count as one value."""
    left, values = most, [(value, 0)]
    while values:
        own, depth = values.pop()
        left -= 1
        if isinstance(own, str | bytes | bytearray):
            left -= len(own) // 10
        inside: list[Any] = [*own, *own.values()] if isinstance(own, dict) else []
        inside = [*own] if isinstance(own, list | tuple) else inside
        if left < len(inside) or depth > limits.DEPTH:
            raise ValueError(f"its values are more than {most}, or nested more than {limits.DEPTH} times")
        values += [(one, depth + 1) for one in inside]
