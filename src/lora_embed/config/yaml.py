"""Read a YAML file that a user wrote: its keys and values, or one message that says what is wrong."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from lora_embed.config.messages import shown
from lora_embed.config.recognise import Thing, by_keys, recognise
from lora_embed.errors import ConfigError
from lora_embed.store.local import correct_the_path
from lora_embed.text import in_one_line

MOST_VALUES = 1_000_000


class Loader(yaml.SafeLoader):
    """A YAML loader that refuses a key given twice, since the first value would be lost silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys_before = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in keys_before:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            keys_before.add(key.value)
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"  # keys are names, so `on` and `5` are text too
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """The values of a YAML text. Raises YAMLError or ValueError for text that is none."""
    try:
        return yaml.load(text, Loader)
    except (AttributeError, IndexError, KeyError, TypeError):  # PyYAML, for example for `!!timestamp tomorrow`
        raise ValueError("a value does not have the form that its tag, such as !!int or !!timestamp, says") from None


def read_yaml(path: Path, kind: str, wanted: Thing | None = None) -> dict[str, Any]:
    """The keys and values of a file. `kind` says in messages what was expected, `wanted` what the keys must not belie.

    Raises ConfigError for a path that cannot be read, and for other content.
    """
    try:
        data = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file, expected {kind}. {correct_the_path(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        if (thing := recognise(path)) is not None:
            raise ConfigError(thing.instead_of(str(path), path, kind)) from None
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(
            f"{path}: cannot be read as a text file: {reason}. Name a file in UTF-8 that this user may read."
        ) from None
    except RecursionError:
        raise ConfigError(f"{path}: its values are nested too deeply to be read. Use fewer levels.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: is not valid YAML: {yaml_problem(error)}") from None
    if not _is_finite(data):
        raise ConfigError(
            f"{path}: an alias contains itself, or aliases stand for more than {MOST_VALUES:,} values. Write the values out."
        )
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: is {shown(data)}, expected one `key: value` on each line")
    thing = by_keys(data)
    if wanted is not None and thing is not None and thing is not wanted:
        raise ConfigError(thing.instead_of(str(path), path, kind))
    return data


def _is_finite(data: Any) -> bool:
    """False for more than `MOST_VALUES` values, aliases counted each time: a few lines may stand for billions of values."""
    waiting, count = [data], 0
    while waiting and count <= MOST_VALUES:
        value = waiting.pop()
        count += 1
        if isinstance(value, dict | list):
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return not waiting


def yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return in_one_line(error, 10**6)
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', None)}"
