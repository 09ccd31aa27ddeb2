"""Configuration: a dataclass says what exists, a YAML file and `key=value` arguments say what it is.

    config = load_config(InferConfig, sys.argv[1:])                                 # key=value ...
    config = load_config(TrainConfig, sys.argv[1:], file_option="--config")         # --config file.yaml key=value ...

Every command then also takes `--help` and `--print-config`.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.errors import UserError
from core.files import complete_file

Config = TypeVar("Config")
VERSION = "0.1.0"  # as in pyproject.toml; results carry it

# Keys that had another name, by the end of their dotted names: files, arguments and saved results still use them.
RENAMED_KEYS = {
    "pose_pictures": "pose_images",
    "calibrated.pictures": "calibrated.images",
    "model.kind": "model.animator",
    "acceleration.guidance_interval": "guidance_interval",
    "acceleration.solver": "solver",
}
# Keys of features that are gone, and the value that leaves these out (None: any): saved configurations hold them.
REMOVED_KEYS = {
    "acceleration.broadcast": 1,
    "acceleration.broadcast_kinds": None,
    "acceleration.broadcast_interval": None,
    "acceleration.merge_reference": 1,
    "acceleration.merge_levels": None,
}


def load_config(
    schema: type[Config],
    arguments: Sequence[str],
    *,
    files: Sequence[str | Path] = (),
    file_option: str | None = None,
    flags: Sequence[str] = (),
) -> Config:
    """Checked instance of the dataclass `schema` from YAML files and overrides, of which later ones win.

    `arguments` are `key=value`, `group.key=value`, `--flag` for each of the boolean keys `flags`, and `file_option`,
    such as "--config", with a YAML file; `files` are read before them.
    """
    if {"-h", "--help"} & set(arguments):
        print(describe(schema))
        raise SystemExit(0)
    files, overrides, print_only, known = list(files), [], False, _known_keys(schema)
    remaining = iter(arguments)
    for argument in remaining:
        option, _, text = argument.partition("=")
        if file_option and option == file_option:
            path = text or next(remaining, None)
            if path is None:
                raise UserError(f"{file_option} needs a file")
            files.append(path)
        elif argument == "--print-config":
            print_only = True
        elif argument.startswith("--") and argument[2:].replace("-", "_") in flags:
            overrides.append((argument[2:].replace("-", "_"), True))
        elif "=" in argument and not argument.startswith("-"):
            overrides.append((option, _parse_value(text, known.get(option))))
        else:
            raise UserError(f"argument {argument!r} is not of the form key=value")

    config = OmegaConf.structured(schema)
    for file in files:
        for key, value in _leaves(_read_yaml(file)):
            _set(config, key, value, known, source=f"{file}: ")
    for name, override in overrides:
        for key, value in _leaves(override, name):
            _set(config, key, value, known, source="")
    if print_only:
        print(OmegaConf.to_yaml(config), end="")
        raise SystemExit(0)
    if missing := OmegaConf.missing_keys(config):
        raise UserError(f"{sorted(missing)[0]}= is required")
    built = OmegaConf.to_object(config)
    check_config(built)
    return built


def check_config(config: Any, name: str = "") -> None:
    """Call `check()` of every dataclass in a configuration, innermost first.

    Its `UserError` starts with a field's name; `name` and the keys of the groups around it are put before.
    """
    for field in fields(config):
        if is_dataclass(value := getattr(config, field.name)):
            check_config(value, f"{name}.{field.name}" if name else field.name)
    if hasattr(config, "check"):
        try:
            config.check()
        except UserError as error:
            raise UserError(f"{name}.{error}" if name else str(error)) from None


def check_choice(config: object, name: str, allowed: Sequence[str | None]) -> None:
    if (value := getattr(config, name)) not in allowed:
        raise UserError(f"{name}={value} is not one of {', '.join(word or 'null' for word in allowed)}")


def check_positive(config: object, *names: str) -> None:
    for name in names:
        if (value := getattr(config, name)) < 1:
            raise UserError(f"{name}={value} must be at least 1")


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
    missing = OmegaConf.missing_keys(config)
    for key in _known_keys(schema):
        if key in missing:
            lines.append(f"  {key}=   (required)")
        elif not isinstance(value := OmegaConf.select(config, key), DictConfig):
            lines.append(f"  {key}={value}")
    lines.append("--print-config prints all of it as YAML and ends")
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


def _parse_value(text: str, kind: Any = None) -> Any:
    # As it stands, for to YAML "take: 2.mp4" is a mapping, "take #2.mp4" has a comment, and "007" is a number.
    if kind in (str, str | None) and not text.startswith(("'", '"')):
        return None if text in ("", "null", "~") else text
    try:
        return yaml.load(text, _ArgumentLoader) if text else None
    except yaml.YAMLError:
        return text


def _read_yaml(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"configuration file {path} does not exist")
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"configuration file {path} cannot be read: {error}") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"configuration file {path} does not hold keys and values")
    return OmegaConf.to_container(loaded)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested dictionaries; of anything else the value itself."""
    if not isinstance(value, Mapping):
        yield key, value
        return
    for name, inner in value.items():
        yield from _leaves(inner, f"{key}.{name}" if key else str(name))


def _known_keys(schema: type, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of groups and values, in the order of the dataclass, and their types."""
    known = {}
    for field in fields(schema):
        known[prefix + field.name] = field.type
        if is_dataclass(field.type):
            known |= _known_keys(field.type, f"{prefix}{field.name}.")
    return known


def _set(config: DictConfig, key: str, value: Any, known: dict[str, Any], source: str) -> None:
    """Set one value, under the present name of its key."""
    for old, new in RENAMED_KEYS.items():
        renamed = key.removesuffix(old) + new
        if key not in known and f".{key}".endswith(f".{old}") and renamed in known:
            key = renamed
    if any(f".{key}".endswith(f".{gone}") and off in (None, value) for gone, off in REMOVED_KEYS.items()):
        return
    if key not in known:
        raise UserError(f"{source}unknown key {key!r}; the nearest known one is {_nearest(key, known)!r}")
    try:
        OmegaConf.update(config, key, value)
    except OmegaConfBaseException as error:
        raise UserError(f"{source}{key}: {str(error).splitlines()[0]}") from None


def _nearest(key: str, known: dict[str, Any]) -> str:
    """The known key that a user may have meant: one of any group, if the group is left out."""
    if "." not in key:
        ends = {name.split(".")[-1]: name for name in reversed(known)}  # of several the first
        if close := difflib.get_close_matches(key, ends, n=1, cutoff=0.75):
            return ends[close[0]]
    return difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
