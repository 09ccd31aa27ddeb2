"""Configuration: a dataclass says what exists, a YAML file and `key=value` arguments say what it is.

    config = load_config(InferConfig, sys.argv[1:])                                 # key=value ...
    config = load_config(TrainConfig, sys.argv[1:], file_option="--config")         # --config file.yaml key=value ...

Unknown keys are errors that name the nearest known one; values of a wrong type are errors that name the key.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.errors import UserError
from core.files import complete_file

Config = TypeVar("Config")


def load_config(
    schema: type[Config],
    arguments: Sequence[str],
    *,
    files: Sequence[str | Path] = (),
    file_option: str | None = None,
    flags: Sequence[str] = (),
) -> Config:
    """Build an instance of the dataclass `schema` from YAML files and overrides; later ones win.

    Args:
        schema: a dataclass; its defaults are where everything starts.
        arguments: the command's arguments: `key=value`, `group.key=value`, `--flag` for each of `flags`.
        files: YAML files read before the arguments.
        file_option: name of an option that takes a YAML file, such as "--config".
        flags: boolean keys that may be written as options: "dry_run" allows `--dry-run`.

    Raises:
        UserError: a file that cannot be read, an unknown key, a value of the wrong type, a missing required value.
    """
    if {"-h", "--help"} & set(arguments):
        print(describe(schema))
        raise SystemExit(0)
    files, overrides = list(files), []
    remaining = iter(arguments)
    for argument in remaining:
        if file_option and argument == file_option:
            path = next(remaining, None)
            if path is None:
                raise UserError(f"{file_option} needs a file")
            files.append(path)
        elif file_option and argument.startswith(file_option + "="):
            files.append(argument.split("=", 1)[1])
        elif argument.startswith("--") and argument[2:].replace("-", "_") in flags:
            overrides.append((argument[2:].replace("-", "_"), True))
        elif "=" in argument and not argument.startswith("-"):
            key, text = argument.split("=", 1)
            overrides.append((key, _parse_value(text)))
        else:
            raise UserError(f"argument {argument!r} is not of the form key=value")

    known = _known_keys(schema)
    config = OmegaConf.structured(schema)
    for file in files:
        config = _merge(config, _read_yaml(file), known, source=f"{file}: ")
    for key, value in overrides:
        _check_key(key, known, source="")
        update = OmegaConf.create()
        OmegaConf.update(update, key, value, force_add=True)
        config = _merge(config, update, known, source="")
    missing = OmegaConf.missing_keys(config)
    if missing:
        raise UserError(f"{sorted(missing)[0]}= is required")
    return OmegaConf.to_object(config)


def save_config(config: Any, path: str | Path) -> None:
    """Write the resolved configuration as YAML; `load_config(schema, [], files=[path])` gives it back."""
    with complete_file(path) as temporary:
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def config_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain dicts, lists and scalars, for JSON."""
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)


def describe(schema: type) -> str:
    """The keys of a configuration with their defaults, one a line, for `--help`."""
    lines = ["Arguments are key=value:"]
    config = OmegaConf.structured(schema)
    for key, is_group in _known_keys(schema).items():
        if not is_group:
            missing = key in OmegaConf.missing_keys(config)
            lines.append(f"  {key}=" + ("   (required)" if missing else f"{OmegaConf.select(config, key)}"))
    return "\n".join(lines)


class _ArgumentLoader(yaml.SafeLoader):
    """YAML whose only booleans are true and false: "no", "off" and "yes", booleans of YAML 1.1, are words."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_ArgumentLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _parse_value(text: str) -> Any:
    try:
        return yaml.load(text, _ArgumentLoader) if text else None
    except yaml.YAMLError:
        return text


def _read_yaml(path: str | Path) -> DictConfig:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"configuration file {path} does not exist")
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"configuration file {path} cannot be read: {error}") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"configuration file {path} does not hold keys and values")
    return loaded


def _known_keys(schema: type, prefix: str = "") -> dict[str, bool]:
    """Dotted key -> whether it is a group, in the order of the dataclass. Dictionaries are open: see `_check_key`."""
    known: dict[str, bool] = {}
    for field in fields(schema):
        key = prefix + field.name
        if is_dataclass(field.type):
            known[key] = True
            known |= _known_keys(field.type, key + ".")
        else:
            known[key] = False
    return known


def _merge(config: DictConfig, update: DictConfig, known: dict[str, bool], source: str) -> DictConfig:
    _check_keys(update, known, source, prefix="")
    try:
        return OmegaConf.merge(config, update)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "configuration"
        reason = str(error).splitlines()[0]
        raise UserError(f"{source}{key}: {reason}") from None


def _check_keys(update: DictConfig, known: dict[str, bool], source: str, prefix: str) -> None:
    for name in update:
        key = f"{prefix}{name}"
        _check_key(key, known, source)
        if known.get(key) and isinstance(update._get_node(name), DictConfig):
            _check_keys(update[name], known, source, key + ".")


def _check_key(key: str, known: dict[str, bool], source: str) -> None:
    parents = key.split(".")
    if key in known or any(known.get(".".join(parents[:i])) is False for i in range(1, len(parents))):
        return  # known, or inside an open dictionary
    candidates = [name for name in known]
    nearest = difflib.get_close_matches(key, candidates, n=1, cutoff=0.0)
    by_leaf = difflib.get_close_matches(parents[-1], [name.split(".")[-1] for name in candidates], n=1, cutoff=0.75)
    if by_leaf and "." not in key:
        nearest = [name for name in candidates if name.split(".")[-1] == by_leaf[0]]
    raise UserError(f"{source}unknown key {key!r}; the nearest known one is {nearest[0]!r}")
