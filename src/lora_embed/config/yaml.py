"""A YAML file that a user wrote, as keys and values; what is wrong in it, as one message."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from lora_embed.config.messages import shown
from lora_embed.errors import ConfigError
from lora_embed.text import in_one_line

MOST_VALUES = 1_000_000


class Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands there twice", key.start_mark)
            seen.add(key.value)
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"  # `on` and `5` too: keys are names
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, kind: str) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file, expected {kind}. Correct the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"{path}: cannot be read as a text file: {reason}") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply to be read") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: is not valid YAML: {yaml_problem(error)}") from None
    if not _is_finite(data):
        raise ConfigError(f"{path}: holds more than {MOST_VALUES:,} values, or itself by an alias. Write out what is meant.")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: is {shown(data)}, expected keys and values, a line each, such as `key: value`")
    return data


def _is_finite(data: Any) -> bool:
    """Aliases are counted as often as they stand there: a few lines may mean billions of values, or one without end."""
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
