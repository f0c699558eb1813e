"""Pickles, read without running anything that they name.

A pickle is a program for a small machine. Here it makes dictionaries, lists, tuples, numbers and strings; anything else
that it names (classes of optimisers and trainers, numpy's scalars, code) stays a name. Nothing is imported or called.
"""

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

MAX_OPERATIONS = 1_000_000
"""Steps of one pickle; a network of a thousand tensors with its optimiser takes a hundred thousand."""


class Name(NamedTuple):
    """Something that the pickle names, which is neither imported nor called."""

    module: str
    name: str


class Opaque(NamedTuple):
    """An object known only by its class's name."""

    what: str


_MARK = object()
_PUSHED = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING"),
    *("SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"),
    *("BINBYTES8", "BYTEARRAY8"),
}
_MADE: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": lambda: Opaque("set"),
    "MARK": lambda: _MARK,
}


class Reader:
    """Follows one pickle; drops keys that are not strings, and whatever is done to opaque objects.

    Who needs more than containers overrides `made`, `built` and `referred`.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[Any, Any] = {}

    def run(self, file: BinaryIO) -> Any:
        for number, (op, arg, _) in enumerate(pickletools.genops(file)):
            if number >= MAX_OPERATIONS:
                raise ValueError(f"its pickle has more than {MAX_OPERATIONS} steps")
            if op.name == "STOP":
                return self.stack.pop()
            self.step(op.name, arg)
        raise ValueError("its pickle has no end")

    def step(self, op: str, arg: Any) -> None:
        stack = self.stack
        if op in _PUSHED:
            stack.append(arg)
        elif op in _MADE:
            stack.append(_MADE[op]())
        elif op in ("PROTO", "FRAME"):
            pass
        elif op in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[arg] = stack[-1]
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[arg])
        elif op == "POP":
            stack.pop()
        elif op == "POP_MARK":
            self.since_mark()
        elif op == "DUP":
            stack.append(stack[-1])
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(op[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif op == "TUPLE":
            stack.append(tuple(self.since_mark()))
        elif op == "LIST":
            stack.append(self.since_mark())
        elif op == "DICT":
            stack.append(extended({}, self.since_mark()))
        elif op == "FROZENSET":
            self.since_mark()
            stack.append(Opaque("frozenset"))
        elif op in ("APPEND", "APPENDS"):
            items = [stack.pop()] if op == "APPEND" else self.since_mark()
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
        elif op in ("SETITEM", "SETITEMS", "ADDITEMS"):
            items = [stack.pop(), stack.pop()][::-1] if op == "SETITEM" else self.since_mark()
            if isinstance(stack[-1], dict):
                extended(stack[-1], items)
        elif op == "GLOBAL":
            stack.append(Name(*arg.split(" ", 1)))
        elif op == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(Name(str(module)[:200], str(name)[:200]) if isinstance(name, str) else Opaque("name"))
        elif op in ("REDUCE", "NEWOBJ"):
            arguments, called = stack.pop(), stack.pop()
            stack.append(self.made(called, arguments))
        elif op == "NEWOBJ_EX":
            del stack[-2:]
            stack.append(self.made(stack.pop(), ()))
        elif op == "OBJ":
            called, *_ = self.since_mark()
            stack.append(self.made(called, ()))
        elif op == "INST":
            self.since_mark()
            stack.append(self.made(Name(*arg.split(" ", 1)), ()))
        elif op == "BUILD":
            state = stack.pop()
            stack[-1] = self.built(stack[-1], state)
        elif op in ("PERSID", "BINPERSID"):
            stack.append(self.referred(arg if op == "PERSID" else stack.pop()))
        else:  # extension codes and out-of-band buffers, which nobody writes into a file
            raise ValueError(f"its pickle has the step {op}")

    def since_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def made(self, called: Any, arguments: Any) -> Any:
        """What a call would have made, were it made."""
        if not isinstance(called, Name) or not isinstance(arguments, tuple):
            return Opaque("object")
        if called.module == "collections" and called.name in ("OrderedDict", "defaultdict"):
            pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []
            return extended({}, [value for pair in pairs if len(pair) == 2 for value in pair])
        return Opaque(f"{called.module}.{called.name}"[:100])

    def built(self, target: Any, state: Any) -> Any:
        """`target` after it was given its state."""
        return target

    def referred(self, told: Any) -> Any:
        """What lies outside the pickle under the persistent id `told`."""
        return Opaque("reference")


def extended(target: dict[str, Any], items: list[Any]) -> dict[str, Any]:
    """A dictionary from alternating keys and values; keys that are not strings are left out."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, str):
            target[key] = value
    return target
