"""Configuration: a dataclass says what exists, a YAML file and `key=value` arguments say what it is.

    config = load_config(InferConfig, sys.argv[1:])                                 # key=value ...
    config = load_config(TrainConfig, sys.argv[1:], file_option="--config")         # --config file.yaml key=value ...

A field says beside its default what it may hold, by `number`, `numbers`, `choice` or `choices`; no text may be empty.
Every command then also takes `--help`, made of the fields and their comments, and `--print-config`.
"""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import field, fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.errors import UserError, try_command
from core.files import check_paths, complete_file
from core.values import Values, fitting, known_keys, nearest_key, shown, values_of

Config = TypeVar("Config")
VERSION = "0.1.0"  # as in pyproject.toml; results carry it
LARGEST_SEED = 2**63 - 1
LARGEST_SIDE = 8192  # pixels; more than any model here animates, and than a computer holds many frames of
DTYPES = ("auto", "float32", "bfloat16", "float16")  # of inference

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


def number(default: Any, low: float, high: float, excluded: float | None = None) -> Any:
    """A field that holds a number from `low` to `high`, of which `excluded` is none."""
    return _field(default, Values(low, high, excluded))


def numbers(default: Any, low: float, high: float, length: int | None = None, least: int = 0) -> Any:
    """A field that holds a list of such numbers, `length` of them; None: any count from `least` on."""
    return _field(default, Values(low, high, length=length, least=least))


def choice(default: Any, words: Collection[str]) -> Any:
    """A field that holds one of some words."""
    return _field(default, Values(words=words))


def choices(default: Any, words: Collection[str], least: int = 0) -> Any:
    """A field that holds a list of such words, or of any texts where `words` is empty; at least `least` of them."""
    return _field(default, Values(words=words, least=least))


def device() -> Any:
    """The field `device`."""
    return _field("auto", Values(words=("auto", "cpu", "cuda", "mps", "xpu"), numbered=True))


def _field(default: Any, values: Values) -> Any:
    metadata = {"values": values}
    if isinstance(default, list | tuple):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def load_config(
    schema: type[Config],
    arguments: Sequence[str],
    *,
    files: Sequence[str | Path] = (),
    file_option: str | None = None,
    flags: Sequence[str] = (),
    about: str | None = None,
) -> Config:
    """Checked instance of the dataclass `schema` from YAML files and overrides, of which later ones win.

    `arguments` are `key=value`, `group.key=value`, `--flag` for each of the boolean keys `flags`, and `file_option`,
    such as "--config", with a YAML file; `files` are read before them. `about` says what the command does.
    """
    if asked := {"-h", "--help"} & set(arguments):
        from core.help import describe  # which few runs need

        topics = [argument for argument in arguments if argument not in asked and argument[:1] != "-"]
        print(describe(schema, about, topics))
        raise SystemExit(0)
    files, overrides, print_only, known = list(files), [], False, known_keys(schema)
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
        elif "=" in argument[1:] and not argument.startswith("-"):
            overrides.append((option, _parse_value(text, known.get(option))))
        else:
            raise UserError(_other_form(argument, next(remaining, None), known))

    given = [(f"{file}: ", *leaf) for file in files for leaf in _leaves(_read_yaml(file))]
    given += [("", *leaf) for name, override in overrides for leaf in _leaves(override, name)]
    fits = [_fitting(schema, source, key, value, known) for source, key, value in given]
    config = OmegaConf.structured(schema)
    for key, value in filter(None, fits):
        OmegaConf.update(config, key, value)
    if print_only:
        print(OmegaConf.to_yaml(config), end="")
        raise SystemExit(0)
    if missing := OmegaConf.missing_keys(config):
        raise UserError(f"{sorted(missing, key=list(known).index)[0]}= is required")
    built = OmegaConf.to_object(config)
    check_config(built)
    return built


def known_task(word: str, tasks: Collection[str]) -> str:
    """The word, if it is a task's name; a `UserError` lists them."""
    if word in tasks:
        return word
    near = difflib.get_close_matches(word, tasks, n=1)
    meant = f"; the nearest is {near[0]!r}" if near else ""
    raise UserError(f"the first argument must be one of {', '.join(tasks)}, got {shown(word)}{meant}")


def check_first(module: str, schema: type, about: str | None, needs: str = "json", paths: Sequence[str] = ()) -> None:
    """End a command where its arguments are wrong or ask for help, the package `needs` is not installed, or one of
    the keys `paths` names nothing that exists.

    Called before imports that take seconds, by modules that `python -m` runs and that are no more than a command.
    """

    def check(arguments: Sequence[str]) -> None:
        config = load_config(schema, arguments, about=about)
        check_paths({key: getattr(config, key) for key in paths})
        if find_spec(needs) is None:
            raise UserError(f"the package {needs} is not installed; --help says what for, and how to install it")

    if module == "__main__":
        try_command(check)


def check_config(config: Any, name: str = "") -> None:
    """Check every value of a configuration, then call `check()` of every dataclass in it, innermost first.

    Of a dataclass and its bases each `check` is called, so that none need call another's.
    A `UserError` starts with a field's name; `name` and the keys of the groups around it are put before.
    """
    for item in fields(config):
        key, value = f"{name}.{item.name}" if name else item.name, getattr(config, item.name)
        if is_dataclass(value):
            check_config(value, key)
        elif value != MISSING:
            fitting(key, value, item.type, values_of(type(config), item.name))
    try:
        for cls in reversed(type(config).__mro__):
            if "check" in vars(cls):
                cls.check(config)
    except UserError as error:
        raise UserError(f"{name}.{error}" if name else str(error)) from None


def save_config(config: Any, path: str | Path) -> None:
    """Write the resolved configuration as YAML; `load_config(schema, [], files=[path])` gives it back."""
    with complete_file(path) as temporary:
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def config_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain dicts, lists and scalars, for JSON."""
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)


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
    except (yaml.YAMLError, ValueError, RecursionError):  # of numbers with thousands of digits, and of thousands of [
        return text


def _other_form(argument: str, following: str | None, known: Mapping[str, Any]) -> str:
    """What is wrong with an argument that is not `key=value`, and how to write it."""
    option, equals, text = argument.partition("=")
    word = option.lstrip("-").replace("-", "_")
    ends = {name.split(".")[-1] for name in known}
    near = nearest_key(word, known) if word in known or difflib.get_close_matches(word, ends, n=1) else None
    if not argument.startswith("-"):
        texts = [key for key, kind in known.items() if kind in (str, str | None)]
        form = f"write {near}=..." if near else f"such as {texts[0]}={shown(argument, quoted=False)}"
        return f"argument {shown(argument)} is not of the form key=value; {form}; --help lists the keys"
    if near is None:
        return f"there is no option {shown(option)}; arguments are key=value, and --help lists them"
    value = text if equals else following if following and not following.startswith("-") else "..."
    return f"arguments have no dashes: in place of {shown(option)} write {near}={shown(value, quoted=False)}"


def _read_yaml(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"configuration file {path} does not exist")
    try:
        loaded = OmegaConf.load(path)
        if isinstance(loaded, DictConfig):
            return OmegaConf.to_container(loaded, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError, OSError) as error:
        raise UserError(f"configuration file {path} cannot be read: {error}") from None
    raise UserError(f"configuration file {path} does not hold keys and values")


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested dictionaries; of anything else the value itself."""
    if not isinstance(value, Mapping) or (key and not value):
        yield key, value
        return
    for name, inner in value.items():
        yield from _leaves(inner, f"{key}.{name}" if key else str(name))


def _fitting(schema: type, source: str, key: str, value: Any, known: dict[str, Any]) -> tuple[str, Any] | None:
    """The present name of a key, and its value as the field's type has it; None: nothing is to be set."""
    for old, new in RENAMED_KEYS.items():
        renamed = key.removesuffix(old) + new
        if key not in known and f".{key}".endswith(f".{old}") and renamed in known:
            key = renamed
    if any(f".{key}".endswith(f".{gone}") and off in (None, value) for gone, off in REMOVED_KEYS.items()):
        return None
    if key not in known:
        raise UserError(f"{source}unknown key {shown(key)}; the nearest known one is {nearest_key(key, known)!r}")
    if is_dataclass(known[key]):
        if value == {}:
            return None
        within = next(name for name in known if name.startswith(f"{key}."))
        raise UserError(
            f"{source}{key}={shown(value, quoted=False)} is a group of keys; give one of them: {within}=..."
        )
    *groups, name = key.split(".")
    for group in groups:
        schema = next(item.type for item in fields(schema) if item.name == group)
    if value != MISSING:
        value = fitting(f"{source}{key}", value, known[key], values_of(schema, name))
    return key, value
