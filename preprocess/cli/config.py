"""Settings from files: `CONFIG=file.toml`, and the `[settings]` of a spec.

Both hold the settings of a verb under the names of their variables, in lower case:

    dataset = "pixmo_cap"
    source = "/data/pixmo-cap"
    image_size = 336
    force = true

What is on the command line wins over a config, that over a spec, and that over what is usual for a
user's own data. Paths mean what they mean on the command line. Keys that the verb does not have are
refused with the nearest one.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preprocess.cli.make import make_arguments, make_variables
from preprocess.datasets import OwnDataset, dataset_class, dataset_names, is_own
from shardspec.errors import ConfigError, nearest
from shardspec.toml import load_toml

OWN_DEFAULTS: Mapping[str, str] = {"SYSTEM_PROMPT": "none"}
"""Settings of a user's own data that differ from those of the built-in datasets: the names of
Molmo's styles mean nothing to it."""


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds the option, which `with_files` acts on; the dataset may then be in the file."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a TOML file of these settings (image_size = 336), the dataset among them; flags win",
    )
    dataset = next(action for action in parser._actions if action.dest == "dataset")
    dataset.required, dataset.nargs = False, "?"


def with_files(
    arguments: Sequence[str],
    parser: argparse.ArgumentParser,
    verbs: Mapping[str, argparse.ArgumentParser],
) -> list[str]:
    """Puts the settings of files, as flags, in front of those of the command line.

    Args:
      arguments: The command line: a verb and its flags.
      parser: Parser of the program.
      verbs: Parser of each verb.

    Returns:
      The command line with the settings of a config and of a spec; later flags win over earlier
      ones.

    Raises:
      ConfigError: The config or the spec cannot be used, or no dataset is named.
      SourceError: The format of a file cannot be told.
    """
    options = parser.parse_args(arguments)
    if "config" not in options:
        return list(arguments)
    verb = options.verb
    config: dict[str, str] = {}
    if options.config is not None:
        config = _variables(_read(options.config), verbs[verb], verb=verb, where=options.config)
    named = config.pop("DATASET", None)
    dataset = options.dataset or named
    if not dataset and options.config is None:
        verbs[verb].error("the following arguments are required: dataset")
    if not dataset:
        raise ConfigError("no_dataset", where=options.config, verb=verb)
    given: dict[str, str] = {}
    if _is_users(dataset):
        kind = dataset_class(dataset)
        given |= {**OWN_DEFAULTS, **kind.settings}
        if issubclass(kind, OwnDataset):
            given["SOURCE"] = kind.source_url()
            given |= _variables(
                kind.spec.settings, verbs[verb], verb=verb, where=dataset, inside="settings"
            )
            if kind.spec.styles:
                given.setdefault("STYLES", str(kind.folder / kind.spec.styles))
    else:
        given |= dataset_class(dataset).settings
    pairs = [f"{name}={value}" for name, value in {**given, **config}.items()]
    # The dataset is there only because the verb wants one; it comes with the rest.
    flags = make_arguments([verb, "DATASET=x", *pairs], verbs)[1:-2]
    own = arguments[arguments.index(verb) + 1 :]
    return [verb, *flags, *own, *([] if options.dataset else ["--", dataset])]


def _is_users(dataset: str) -> bool:
    """Tells whether a dataset is a user's: given by a file or code, or offered by a package."""
    return is_own(dataset) or dataset in {*dataset_names(offered=True)} - {*dataset_names()}


def _read(path: str) -> dict[str, Any]:
    try:
        document: dict[str, Any] = load_toml(Path(path))
    except (OSError, ValueError) as error:  # TOML and UTF-8 errors are ValueErrors
        raise ConfigError("config_file.unreadable", where=path, error=error) from error
    if "format" in document:
        raise ConfigError("config_file.spec", where=path)
    return document


def _variables(
    settings: Mapping[str, Any],
    parser: argparse.ArgumentParser,
    *,
    verb: str,
    where: str,
    inside: str = "",
) -> dict[str, str]:
    """Turns the settings of a file into variables of `make`.

    Raises:
      ConfigError: `config_key`.
    """
    known = {name.lower(): action for name, action in make_variables(parser).items()}
    # What a spec is of, and where its rows are, is said by the spec itself.
    for name in ("config", *(("dataset", "source") if inside else ())):
        del known[name]
    found = {}
    for key, value in settings.items():
        name = key.replace("-", "_")
        shown = f"{inside}.{key}" if inside else key
        if name not in known:
            if inside and name in ("dataset", "source"):
                raise ConfigError("config_key.spec", where=where, name=name)
            hint = nearest(name, known)
            raise ConfigError("config_key.unknown", where=where, verb=verb, name=shown, hint=hint)
        found[name.upper()] = _text(value, known[name], name=shown, where=where)
    return found


def _text(value: Any, action: argparse.Action, *, name: str, where: str) -> str:
    if action.nargs == 0:  # a switch
        if isinstance(value, bool):
            return str(int(value))
        raise ConfigError("config_key.type", where=where, name=name, want="true or false")
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(p, str | int | float) and not isinstance(p, bool) for p in parts):
        raise ConfigError("config_key.type", where=where, name=name, want="a number or a text")
    if isinstance(value, list):
        return shlex.join(map(str, parts))
    return str(value)
