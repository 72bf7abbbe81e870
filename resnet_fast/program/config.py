"""Options in a YAML file, equal to the command line: ``lr: 0.1`` is ``--lr 0.1``, ``compile: false`` is
``--no-compile``.

A value goes the way of an argument, so that both have the same checks and the same errors.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

__all__ = ["arguments", "text"]

_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_ABSENT = ("", "null", "~")


def arguments(path: Path, parser: argparse.ArgumentParser, kinds: Mapping[str, str]) -> list[str]:
    """The file's options as arguments of the command line; those without a value keep their default.

    parser: one with ``exit_on_error=False``; kinds: for each option's name its type, of which ``"bool"`` is special.

    Raises:
        ValueError: the file cannot be read, or holds something else than known options with good values.
    """
    try:
        # Everything stays text: YAML 1.1 reads "off" as false, and 1e-4 not as a number.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} holds no options: want lines such as lr: 0.1")
    found = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in kinds or name == "config":
            raise ValueError(f"--config {path} has the unknown option {key}: want those of --help")
        if not isinstance(value, str):
            raise ValueError(f"--config {path}: {key} is {value}, want one value")
        if value in _ABSENT:
            continue
        flag = name.replace("_", "-")
        if kinds[name] != "bool":
            found.append(f"--{flag}={value}")
        elif value.lower() in _TRUTH:
            found.append(f"--{flag}" if _TRUTH[value.lower()] else f"--no-{flag}")
        else:
            raise ValueError(f"--config {path}: {key} is {value}, want true or false")
    try:
        parser.parse_args(found)
    except argparse.ArgumentError as error:
        raise ValueError(f"--config {path}: {error}") from error
    return found


def text(options: Mapping[str, Any]) -> str:
    """The options as a file that :func:`arguments` reads."""
    return yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True)
