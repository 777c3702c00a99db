"""Dataclass fields that check their values: ranges, choices, names, paths, channels. A wrong value raises UserError."""

import dataclasses
import os
import typing
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import tyro

from empssl_jax.config.errors import require


class _Allowed(Protocol):
    """The values that an option accepts; str() describes them for the error message."""

    def holds(self, value: object) -> bool: ...


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`."""

    low: float
    high: float
    is_integer: bool

    def holds(self, value: object) -> bool:
        """Whether the value is in the range and of the right type."""
        if isinstance(value, bool) or not isinstance(value, int if self.is_integer else int | float):
            return False
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{'a whole number' if self.is_integer else 'a number'} from {self.low:.10g} to {self.high:.10g}"


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    values: tuple[object, ...]

    def holds(self, value: object) -> bool:
        """Whether the value is one of them and of the same type: 1 is not True."""
        return any(type(value) is type(choice) and value == choice for choice in self.values)

    def __str__(self) -> str:
        return " or ".join(map(repr, self.values))


@dataclass(frozen=True)
class Channels:
    """A number for each of red, green and blue."""

    each: Range

    def holds(self, value: object) -> bool:
        """Whether the value is a tuple of three numbers in the range."""
        return isinstance(value, tuple) and len(value) == 3 and all(map(self.each.holds, value))

    def __str__(self) -> str:
        return f"{self.each} for each of red, green and blue"


class Text:
    """Names and paths that the file system and a terminal can handle."""

    def holds(self, value: object) -> bool:
        """Whether the value is such a text: without control characters and bytes that are not UTF-8."""
        if not (isinstance(value, str) and 0 < len(value) <= 1000):
            return False
        return not {"Cc", "Cs"} & set(map(unicodedata.category, value))

    def __str__(self) -> str:
        return "a name of 1 to 1000 printable characters"


def _allowed(field: dataclasses.Field, annotation: object) -> _Allowed | None:
    """The values that a field accepts: those of its range, or else of its type; None if the type decides."""
    if "range" in field.metadata:
        return field.metadata["range"]
    if "channels" in field.metadata:
        return Channels(field.metadata["channels"])
    if annotation is bool:
        return Choice((False, True))
    if typing.get_origin(annotation) is Literal:
        return Choice(typing.get_args(annotation))
    return Text() if annotation in (str, str | None) else None


@dataclass(frozen=True)
class Checked:
    """Checks the fields of a dataclass when it is created, and expands ~ in its paths."""

    def __post_init__(self) -> None:
        annotations = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, allowed = getattr(self, field.name), _allowed(field, annotations[field.name])
            optional = field.default is None
            if allowed is None or value is tyro.MISSING or (optional and value is None):
                continue
            require(allowed.holds(value), field.name, value, f"give {allowed}{', or None' * optional}")
            if "path_after" in field.metadata:
                object.__setattr__(self, field.name, expand(value, field.metadata["path_after"]))


def expand(value: str, prefix: str = "") -> str:
    """The path after the prefix with the user's home folder instead of ~; a value without the prefix stays as it is."""
    return prefix + os.path.expanduser(value.removeprefix(prefix)) if value.startswith(prefix) else value


def path_field(default: Any = dataclasses.MISSING, after: str = "") -> Any:
    """A field for the path of a file or a folder. With `after`, only what follows that word is a path."""
    return dataclasses.field(default=default, metadata={"path_after": after})


def int_field(default: int | None, low: int, high: int = 1_000_000_000) -> Any:
    """A field for whole numbers from `low` to `high`."""
    return dataclasses.field(default=default, metadata={"range": Range(low, high, is_integer=True)})


def float_field(default: float, low: float, high: float = 1e9) -> Any:
    """A field for numbers from `low` to `high`."""
    return dataclasses.field(default=default, metadata={"range": Range(low, high, is_integer=False)})


def channels_field(default: tuple[float, float, float], low: float, high: float) -> Any:
    """A field for three numbers from `low` to `high`: of red, green and blue."""
    return dataclasses.field(default=default, metadata={"channels": Range(low, high, is_integer=False)})
