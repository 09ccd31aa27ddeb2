"""Values of every field of every command: declared limits, what is accepted, and what is refused in one line."""

import math
import re
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from omegaconf import MISSING, OmegaConf

import metrics.protocols
from core.config import LARGEST_SEED, load_config
from core.errors import UserError
from core.help import describe
from core.values import MANY, Values, fitting, kind_of, known_keys, values_of, wanted
from data.config import LAYOUT_NAMES
from data.preparation.layouts import LAYOUTS
from evaluation.config import MEASURES, PROTOCOLS, SweepConfig
from tests.commands import COMMANDS
from tests.house import FLOORS, source_files

ROOT = Path(__file__).parents[2]
NUMBERS = ("nan", "inf", "-inf", "-1", "0", "1e30", str(10**30), str(-(10**30)), "9" * 5000)
OTHERS = ("banana", "", "null", "[]", "[1,2,3,4,5]", "[nan]", "[[1]]", "{a: 1}", "${output}")
SCHEMAS = {command.schema: command for command in reversed(COMMANDS)}


def declared(schema: type, key: str) -> tuple[type, str]:
    """The dataclass that has a dotted key, and the field's name."""
    *groups, name = key.split(".")
    for group in groups:
        schema = schema.__dataclass_fields__[group].type
    return schema, name


def leaves(schema: type) -> list[str]:
    return [key for key, kind in known_keys(schema).items() if not is_dataclass(kind)]


def required(schema: type, but: str) -> list[str]:
    """Arguments for all required keys but one, with values that they may have."""
    found = []
    for key in OmegaConf.missing_keys(OmegaConf.structured(schema)) - {but}:
        words = values_of(*declared(schema, key)).words
        found.append(f"{key}={next(iter(words)) if words else 1}")
    return found


def within(value: object, kind: type, item: type | None, optional: bool, values) -> bool:
    """True for what a field's declared limits name."""
    if value is None:
        return optional
    if item is not None:
        fits = values.length in (None, len(value)) and len(value) >= values.least
        return fits and all(within(entry, item, None, False, values) for entry in value)
    if kind in (int, float):
        return type(value) is kind and values.low <= value <= values.high and value != values.excluded
    if kind is str:
        return value.strip() != "" and (not values.words or value in values.words)
    return type(value) is bool


def declaring_classes() -> list[type]:
    """Every dataclass that declares fields of a command, groups and base classes too."""
    found, waiting = {}, [*SCHEMAS]
    while waiting:
        schema = waiting.pop()
        kinds = {field.type for field in schema.__dataclass_fields__.values() if is_dataclass(field.type)}
        waiting += [other for other in (*kinds, *filter(is_dataclass, schema.__mro__[1:])) if other not in found]
        found[schema] = None
    return sorted(found, key=lambda schema: schema.__name__)


@pytest.mark.parametrize("schema", declaring_classes(), ids=lambda schema: schema.__name__)
def test_every_value_of_every_field(schema):
    """Accepted, and within the limits that the field declares; or refused in one line that names the key."""
    for key in leaves(schema):
        if key not in schema.__annotations__:  # of a group or a base class, which has its turn
            continue
        values, kind = values_of(schema, key), kind_of(schema.__annotations__[key])
        if (kind[1] or kind[0]) in (int, float):
            assert math.isfinite(values.low), f"{key} has no limits; declare them by number() or numbers()"
        given = required(schema, key)
        for text in OTHERS if kind[0] is str else NUMBERS + OTHERS:
            try:
                value = getattr(load_config(schema, [*given, f"{key}={text}"]), key)
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000
                assert key in str(error) or "is required" in str(error), f"{key}={text[:20]}: {error}"
            else:
                assert within(value, *kind, values), f"{key}={text[:20]} became {value!r}"


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_help_explains_every_key(schema):
    text = describe(schema)
    entries = dict(re.findall(r"^  (\S+?)=.*((?:\n      .+)*)", text, re.M))
    assert set(entries) == set(leaves(schema))
    assert not [key for key, words in entries.items() if not words.strip()], "no words beside a field"


def test_every_command_is_in_the_table():
    files = source_files(*(name for floor in FLOORS[:-1] for name in floor))
    mains = [path for path in files if 'if __name__ == "__main__"' in (ROOT / path).read_text(encoding="utf-8")]
    mains = [path for path in mains if not path.name.startswith("driver_")]  # which run in a peer's environment
    assert {str(path) for path in mains} == {f"{c.module.replace('.', '/')}.py" for c in COMMANDS}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (Values(1, MANY), "an integer, 1 or more"),
        (Values(0, LARGEST_SEED), "an integer, 0 to 2**63 - 1"),
        (Values(0, MANY, excluded=0), "an integer, 0 or more but not 0"),
        (Values(0, 100, excluded=0), "an integer, 0 to 100 but not 0"),
    ],
)
def test_limits_in_words(values, words):
    assert wanted(int, values) == words


def test_checks_of_all_bases_are_called():
    for arguments, message in ((["clips=0"], "clips=0"), (["seeds=[1,1]"], "seeds="), (["scales=[1,1]"], "scales=")):
        with pytest.raises(UserError, match=message):
            load_config(SweepConfig, arguments)


def test_names_in_configurations_are_those_of_the_code():
    assert LAYOUT_NAMES == ("auto", *LAYOUTS)
    assert MEASURES == tuple(metrics.protocols.MEASURES) and PROTOCOLS == tuple(metrics.protocols.PROTOCOLS)


def test_defaults_are_within_their_limits():
    for schema in declaring_classes():
        for field in fields(schema):
            default = field.default if field.default is not NO_DEFAULT else field.default_factory()
            if not is_dataclass(default) and default != MISSING:
                fitting(f"{schema.__name__}.{field.name}", default, field.type, values_of(schema, field.name))
