"""What a field of a configuration may hold: one check for every value of every command."""

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from core.errors import UserError

SHOWN = 60  # characters of a value that an error repeats
MANY = 10**9  # of things that are counted, more than any computer has
LONGEST = 4096  # characters of a text, as of a path
TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")  # words for them in files and arguments
COUNTS = {1: "one", 2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class Values:
    """Limits of a number and of each number of a list, the words it may be, the length of a list."""

    low: float = -math.inf
    high: float = math.inf
    excluded: float | None = None
    words: Collection[str] = ()
    numbered: bool = False  # a word may end in a number, as cuda:1 does
    length: int | None = None  # None: any, of at least `least`
    least: int = 0


def values_of(schema: type, name: str) -> Values:
    """The values of a field: declared where it is, or where a base class declares it."""
    for cls in schema.__mro__:
        item = getattr(cls, "__dataclass_fields__", {}).get(name)
        if item is not None and "values" in item.metadata:
            return item.metadata["values"]
    return Values()


def known_keys(schema: type, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of groups and values, in the order of the dataclass, and their types."""
    known = {}
    for item in fields(schema):
        known[prefix + item.name] = item.type
        if is_dataclass(item.type):
            known |= known_keys(item.type, f"{prefix}{item.name}.")
    return known


def nearest_key(key: str, known: Mapping[str, Any]) -> str:
    """The known key that a user may have meant: one of any group, if the group is left out."""
    key = key.lower()
    if "." not in key:
        ends = {name.split(".")[-1]: name for name in reversed(known)}  # of several the first
        if close := difflib.get_close_matches(key, ends, n=1, cutoff=0.75):
            return ends[close[0]]
    return difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]


def kind_of(annotation: Any) -> tuple[type, type | None, bool]:
    """(type, type of a list's items, null is allowed) of `int`, `list[int]`, `int | None` and the like."""
    options = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    (kind,) = (option for option in options if option is not NoneType)
    items = get_args(kind)
    return get_origin(kind) or kind, items[0] if items else None, NoneType in options


def wanted(annotation: Any, values: Values) -> str:
    """In words what a field may hold."""
    kind, item, optional = kind_of(annotation)
    one, many = {
        int: ("an integer", "integers"),
        float: ("a number", "numbers"),
        bool: ("true or false", "of true and false"),
        str: ("text that is not empty", "texts that are not empty"),
    }[item or kind]
    limits = f", {_limits(values)}" if (item or kind) in (int, float) and values != Values() else ""
    if values.words:
        many = f"of {', '.join(values.words)}"
        one = f"one {many}" if len(values.words) > 1 else many.removeprefix("of ")
    if item is not None:
        count = f"a list of {'one or more ' * (values.least > 0)}{many.removeprefix('of ')}"
        one = count if values.length is None else f"{COUNTS[values.length]} {many}"
        limits += " each" if limits else ""
    return one + limits + (", or null" if optional else "")


def fitting(name: str, value: Any, annotation: Any, values: Values) -> Any:
    """The value as the field's type has it; `UserError` when it is not what the field may hold."""
    kind, item, optional = kind_of(annotation)
    try:
        if value is None:
            if optional:
                return None
            raise ValueError
        if item is None:
            return _single(value, kind, values)
        if not isinstance(value, list | tuple) or values.length not in (None, len(value)) or len(value) < values.least:
            raise ValueError
        return [_single(entry, item, values) for entry in value]
    except (ValueError, TypeError, OverflowError):
        form = f", such as {name.rsplit(': ', 1)[-1]}={_example(value, item, values)}" if item and _odd(value) else ""
        raise UserError(f"{name}={shown(value, quoted=False)} must be {wanted(annotation, values)}{form}") from None


def shown(value: Any, quoted: bool = True) -> str:
    """A value as errors repeat it: as it is written in YAML, on one line, shortened."""
    text = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | NoneType) else None
    if text is None:
        text = repr(value) if quoted or not isinstance(value, str) else " ".join(value.split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _single(value: Any, kind: type, values: Values) -> Any:
    """One value as its type has it; ValueError where it does not fit."""
    if kind is bool:
        text = str(value).lower()
        if text in (*TRUE, *FALSE) or (isinstance(value, int) and value in (0, 1)):
            return bool(value) if isinstance(value, int) else text in TRUE
        raise ValueError
    if kind is str:
        if isinstance(value, list | tuple | dict | set | bytes):
            raise ValueError
        return _text(str(value) if not isinstance(value, bool) else shown(value), values)
    if isinstance(value, bool) or not isinstance(value, str | Real):
        raise ValueError
    if kind is int and not isinstance(value, str | Integral):
        raise ValueError
    found = kind(value)
    if not values.low <= found <= values.high or found == values.excluded:  # never of nan
        raise ValueError
    return found


def _text(text: str, values: Values) -> str:
    if values.words:
        word, _, index = text.partition(":")
        if text not in values.words and not (values.numbered and word in values.words and index.isdecimal()):
            raise ValueError
        return text
    # "${" begins a reference to another key in OmegaConf's files, which has been followed where there is one.
    if not text.strip() or len(text) > LONGEST or "\0" in text or "${" in text:
        raise ValueError
    text.encode()  # not of half characters
    return text


def _limits(values: Values) -> str:
    low, endless = _short(values.low), values.high in (MANY, math.inf)
    text = f"{low} or more" if endless else f"{low} to {_short(values.high)}"
    return text if values.excluded is None else f"{text} but not {values.excluded:g}"


def _short(limit: float) -> str:
    power = int(limit) + 1
    if power > 2**30 and power & (power - 1) == 0:
        return f"2**{power.bit_length() - 1} - 1"
    return str(limit) if abs(limit) < 10**6 and isinstance(limit, int) else f"{limit:g}"


def _odd(value: Any) -> bool:
    """True for what is no list of single values."""
    return not isinstance(value, list | tuple) or any(isinstance(entry, list | dict) for entry in value)


def _example(value: Any, item: type, values: Values) -> str:
    """A list that would fit, of the value itself where it is a plain word."""
    if item in (int, float) and values != Values():
        word = f"{max(values.low, min(values.high, 128 if values.length else 1)):g}"
    elif item is str and not values.words and str(value).isidentifier() and len(str(value)) < SHOWN:
        word = str(value)
    else:
        word = next(iter(values.words), None) or {int: "1", float: "0.5", bool: "true", str: "a"}[item]
    return "[" + ",".join([word] * (values.length or 1)) + "]"
