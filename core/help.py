"""The text of `--help`: what a command does, and every key with its default, its values and the words beside it."""

import ast
import inspect
import io
import shutil
import textwrap
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING

from core.errors import UserError
from core.values import Values, kind_of, known_keys, nearest_key, shown, values_of, wanted

WIDEST = 119
END = "--help KEY shows one key or group, such as --help {topic}; --print-config prints all as YAML. Both end there."


def describe(schema: type, about: str | None = None, topics: Sequence[str] = ()) -> str:
    """What a command does and the keys of its configuration; of the keys and groups `topics` alone, if there are."""
    known, chosen = known_keys(schema), [topic.partition("=")[0].rstrip(".") for topic in topics]
    for topic in chosen:
        if topic not in known:
            raise UserError(f"no key or group is called {topic!r}; the nearest one is {nearest_key(topic, known)!r}")
    text = (
        ""
        if chosen
        else f"{inspect.cleandoc(about or schema.__doc__ or '')}\n\nKeys, as key=value, and their defaults:\n"
    )
    for heading, entries in _groups(schema):
        shown_here = [e for key, e in entries if not chosen or any(f"{key}.".startswith(f"{t}.") for t in chosen)]
        text += "\n".join(["", heading, *shown_here, ""]) if shown_here else ""
    if chosen or not known:
        return text.strip("\n")
    return f"{text}\n{_wrapped(END.format(topic=list(known)[-1].split('.')[0]), '')}"


def _groups(
    schema: type, prefix: str = "", words: str = "", defaults: Any = None
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(heading, (key, entry) of its keys) of a configuration: of its own class, of its bases, of each group in it."""
    comments, presets, seen, groups = _comments(schema), getattr(schema, "presets", dict)(), set(), []
    for cls in filter(is_dataclass, schema.__mro__):
        entries = []
        for item in fields(schema):
            if item.name in seen or item.name not in cls.__annotations__:
                continue
            seen.add(item.name)
            key = prefix + item.name
            default = _default(item) if defaults is None else getattr(defaults, item.name)
            if is_dataclass(item.type):
                groups.append((item.type, f"{key}.", comments.get(item.name, ""), default))
                continue
            filled = {name: _plain(getattr(of, item.name)) for name, of in presets.items() if hasattr(of, item.name)}
            facts = [_allowed(item, values_of(schema, item.name)), _by_preset(filled) if default is None else ""]
            if default == MISSING:
                facts.insert(0, "required")
            head = f"{key}={'' if default == MISSING else _plain(default)}"
            head += f"  ({'; '.join(filter(None, facts))})" if any(facts) else ""
            entry = [_wrapped(head, "  ", "      ")]
            entry += [_wrapped(comments[item.name], "      ")] if item.name in comments else []
            entries.append((key, "\n".join(entry)))
        about = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
        yield _wrapped(f"{prefix}*  {words or about}" if prefix else about if cls is not schema else "", ""), entries
    for group in groups:
        yield from _groups(*group)


def _by_preset(filled: dict[str, str]) -> str:
    """What a preset fills in where nothing is given."""
    if len(set(filled.values())) == 1:
        return f"every preset: {next(iter(filled.values()))}"
    return ", ".join(f"{name}: {value}" for name, value in filled.items())


def _allowed(item: Field, values: Values) -> str:
    """In words what a key may be, unless that is any text, or its default says so."""
    if places := item.metadata.get("places"):
        return f"in weights=: {', '.join(places)}"
    kind, of, _ = kind_of(item.type)
    return "" if of is None and kind in (bool, str) and not values.words else wanted(item.type, values)


def _default(item: Field) -> Any:
    return item.default if item.default is not NO_DEFAULT else item.default_factory()


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_plain, value))}]"
    return str(value) if isinstance(value, str | float) else shown(value, quoted=False)


def _comments(schema: type) -> dict[str, str]:
    """The words above and beside each field, in a class or in those it is derived from."""
    found = {}
    for cls in reversed(schema.__mro__):
        if not is_dataclass(cls):
            continue
        source = textwrap.dedent(inspect.getsource(cls))
        lines = source.splitlines()
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {
            token.start[0]: token.string.lstrip("#").strip() for token in tokens if token.type == tokenize.COMMENT
        }
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                first = node.lineno
                while lines[first - 2].lstrip().startswith("#"):
                    first -= 1
                words = [comments[row] for row in range(first, node.end_lineno + 1) if row in comments]
                found |= {node.target.id: " ".join(words)} if words else {}
    return found


def _wrapped(text: str, indent: str, further: str | None = None) -> str:
    width = min(shutil.get_terminal_size((100, 24)).columns - 1, WIDEST)
    return textwrap.fill(
        text, max(width, 40), initial_indent=indent, subsequent_indent=indent if further is None else further,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
