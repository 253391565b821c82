"""Variables of `make` as arguments of a verb: `make shards IMAGE_SIZE=224` is `--image-size 224`.

The Makefile passes on every variable of its command line, whatever its name. Here it becomes the
flag of the same name, so that no list of variables exists besides the flags themselves. A variable
that the verb does not have is refused: a misspelt one would build another dataset.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence

from preprocess.cli.verbs import default_output
from shardspec.errors import ConfigError, nearest

_OPPOSITES = {"--view": "--copy"}
"""Switches that 0 turns into another one: VIEW=0 requests a copy."""


def make_variables(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Lists the variables that a verb takes from `make`, with what they set."""
    return {
        _variable(action): action
        for action in parser._actions
        if not {"--help", *_OPPOSITES.values()} & set(action.option_strings)
    }


def make_arguments(given: Sequence[str], verbs: Mapping[str, argparse.ArgumentParser]) -> list[str]:
    """Turns a target and its variables into the arguments of a verb.

    Args:
      given: The verb, then NAME=value for each variable of make's command line.
      verbs: The parser of each verb.

    Raises:
      ConfigError: `make_variable` (unknown, missing, empty, or not a switch's value),
        `make_target`.
    """
    verb = given[0] if given else ""
    # A flag has no value of its own: an unknown variable, as make gives it.
    pairs = {name: value for name, _, value in (each.partition("=") for each in given[1:])}
    if verb not in verbs:
        raise ConfigError("make_target", name=verb, hint=nearest(verb, verbs))
    known = make_variables(verbs[verb])
    out = known.get("OUT")
    if out is not None and not out.option_strings and "DATASET" not in known:
        # Verbs that take an existing dataset: its name means where `make shards` puts it.
        dataset = pairs.pop("DATASET", None)
        if dataset is not None:
            pairs.setdefault("OUT", default_output(dataset))
    for name in pairs:
        if name not in known:
            hint = nearest(name, known)
            raise ConfigError("make_variable.unknown", verb=verb, name=name, hint=hint)
    for name, action in known.items():
        wanted = action.required or (name == "DATASET" and "CONFIG" in known)
        if wanted and not pairs.get(name) and not pairs.get("CONFIG"):
            raise ConfigError("make_variable.missing", verb=verb, name=name, help=action.help)
    for name, value in pairs.items():
        if not value and known[name].nargs != 0:
            raise ConfigError("make_variable.empty", name=name)
    flags: list[str] = []
    positionals: list[str] = []
    for name, action in known.items():
        if name not in pairs:
            continue
        value = pairs[name]
        if not action.option_strings:
            positionals += shlex.split(value) if action.nargs == "+" else [value]
        elif action.nargs == 0:
            flags += _switch(name, value, action.option_strings[0])
        else:
            flags.append(f"{action.option_strings[0]}={value}")
    return [verb, *flags, "--", *positionals] if positionals else [verb, *flags]


def _variable(action: argparse.Action) -> str:
    name = action.option_strings[0].removeprefix("--") if action.option_strings else action.dest
    return name.replace("-", "_").upper()


def _switch(name: str, value: str, flag: str) -> list[str]:
    if value not in ("0", "1"):
        raise ConfigError("make_variable.switch", name=name, got=value)
    if value == "1":
        return [flag]
    return [_OPPOSITES[flag]] if flag in _OPPOSITES else []
