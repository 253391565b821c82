"""Which files of a source folder are of which split.

The rules are those of the `datasets` library, applied to each file by itself, so that no file is
dropped in silence. The first rule that names a split of a file decides:

1. `configs:` in the front matter of the folder's README.md: what `data_files` says.
2. The layout of `save_to_disk`: the folders that `dataset_dict.json` lists; next to a `state.json`
   only the files that it lists are rows, others are caches.
3. `data/NAME-00000-of-00002.parquet`: the split NAME.
4. A keyword in the name of a folder or of the file, with one of `-._ 0-9` or nothing on each side:
   train, training; validation, valid, val, dev; test, testing, eval, evaluation. Case is ignored.
5. Where no rule names a split of any file, all files are of the split "train".

A file that no rule explains beside others that one does, and a file whose name speaks of two
splits, is *unmatched*: a job refuses to guess, unless its settings say what to do. Hidden files
and folders, and folders that begin with two underscores, are not looked at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, Literal

from preprocess.formats import visible_names
from shardspec import storage
from shardspec.errors import SourceError

Unmatched = Literal["refuse", "take", "skip"]
"""What happens to files that no rule explains: the job stops, or they are of the split that is
built, or they are left out."""

DATA_SUFFIXES = (".parquet", ".arrow")

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _KEYWORDS.items() for word in words}
_WORD = re.compile(
    rf"(?<![^\-._ 0-9])(?:{'|'.join(sorted(_SPLIT_OF, key=len, reverse=True))})(?![^\-._ 0-9])",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"(?P<name>\w+(?:\.\w+)*)-\d{5,}-of-\d{5,}[^/]*")
_NO_SPLIT = frozenset({"data", "part", "shard", "chunk", "file"})
"""What tools call the pieces of anything: `data-00000-of-00002.arrow` is of no split "data"."""

_README = "README.md"
_SPLITS_LIST = "dataset_dict.json"
_STATE = "state.json"

MAX_SHOWN = 3
"""Files listed by name for a split; of the others the number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitLayout:
    """Which files make which split; paths are relative to the folder, with forward slashes."""

    splits: Mapping[str, Sequence[str]]
    """The files of each split, sorted."""
    unmatched: Mapping[str, str] = field(default_factory=dict)
    """Why a file is of no split."""
    rule: str = ""
    """Where the splits are written."""
    configured_by: Sequence[str] = ()
    """Files that say which file is of which split."""

    def lines(self) -> list[str]:
        """Says which files make which split, a line per split."""
        said = [
            f"split {split}: {shown_files(files)} (by {self.rule})"
            for split, files in self.splits.items()
        ]
        return said + ([f"no split: {shown_files(self.unmatched)}"] if self.unmatched else [])

    def files(self, split: str, *, unmatched: Unmatched, where: str) -> list[str]:
        """Lists the files of a split.

        Raises:
          SourceError: `source_split`: files that no rule explains, or no file of the split.
        """
        if self.unmatched and unmatched == "refuse":
            raise SourceError(
                "source_split.unmatched",
                where=where,
                count=len(self.unmatched),
                facts={name: why for name, why in list(self.unmatched.items())[:MAX_SHOWN]},
            )
        more = self.unmatched if unmatched == "take" else ()
        found = sorted([*self.splits.get(split, ()), *more])
        if not found:
            raise SourceError("source_split.none", where=where, split=split, splits=[*self.splits])
        return found


def folder_layout(folder: str, *, unmatched: Unmatched = "refuse") -> SplitLayout:
    """Finds out which files of a folder make which split.

    Args:
      folder: The source: a local folder, or the URL of one.
      unmatched: With "take", files without a split in their name are of no split: rule 5 is left
        out.

    Raises:
      SourceError: `source_split.subsets`, `source_split.readme`: the README configures several
        subsets, or cannot be parsed.
      OSError: The folder cannot be read.
    """
    there = frozenset(visible_names(folder))
    names = _data_files(folder, there)
    readme = storage.join(folder, _README)
    configs = _readme_configs(readme) if _README in there else {}
    if configs:
        return _configured(names, configs, where=readme)
    listed = _object(folder, _SPLITS_LIST, there).get("splits")
    if isinstance(listed, list) and listed:
        layout = split_layout(names, folders=[str(split) for split in listed])
        return replace(layout, configured_by=[_SPLITS_LIST])
    return split_layout(names, default=None if unmatched == "take" else "train")


def split_layout(
    names: Iterable[str], *, folders: Sequence[str] = (), default: str | None = "train"
) -> SplitLayout:
    """Applies the rules to the names of a folder's files; pure.

    Args:
      names: Paths below the folder, with forward slashes.
      folders: Splits by the folders at the top that are named like them (rule 2).
      default: Split of all files where no rule names one of any (rule 5); None for no split.

    >>> layout = split_layout(["a/train_0001.parquet", "a/dev.parquet"])
    >>> {split: list(files) for split, files in layout.splits.items()}
    {'train': ['a/train_0001.parquet'], 'validation': ['a/dev.parquet']}
    """
    splits: dict[str, list[str]] = {}
    unmatched: dict[str, str] = {}
    for name in sorted(names):
        if folders:
            top = name.split("/")[0]
            named = {_SPLIT_OF.get(top.lower(), top)} if top in folders else set()
        else:
            named = _named_splits(name)
        if len(named) == 1:
            splits.setdefault(named.pop(), []).append(name)
        elif named:
            unmatched[name] = f"names the splits {', '.join(sorted(named))}"
        else:
            unmatched[name] = "names no split"
    rule = f"the folders in {_SPLITS_LIST}" if folders else "names"
    if not splits and default is not None and set(unmatched.values()) == {"names no split"}:
        splits, unmatched, rule = {default: list(unmatched)}, {}, "default: no name has a split"
    return SplitLayout(splits=_in_order(splits), unmatched=unmatched, rule=rule)


def shown_files(names: Iterable[str]) -> str:
    """Lists the first names, and how many there are.

    >>> shown_files(["a", "b"]), shown_files("abcde")
    ('2 files: a, b', '5 files: a, b, c, ...')
    """
    names = list(names)
    more = ", ..." if len(names) > MAX_SHOWN else ""
    number = f"{len(names):,} file{'s' if len(names) != 1 else ''}"
    return f"{number}: {', '.join(names[:MAX_SHOWN])}{more}"


def _named_splits(name: str) -> set[str]:
    """Finds the splits that a path names (rules 3 and 4)."""
    path = PurePosixPath(name)
    match = _NUMBERED.fullmatch(path.name)
    if match and path.parts[:-1] == ("data",) and match["name"].lower() not in _NO_SPLIT:
        return {_SPLIT_OF.get(match["name"].lower(), match["name"])}
    return {_SPLIT_OF[word.lower()] for part in path.parts for word in _WORD.findall(part)}


def _data_files(folder: str, names: frozenset[str]) -> list[str]:
    """Lists the Parquet and Arrow files of a folder, those of `save_to_disk` without its caches."""
    found = [name for name in names if name.lower().endswith(DATA_SUFFIXES)]
    listed: dict[str, Any] = {}
    """Of each folder with a `state.json`, the files that it lists."""
    for here in {name.rpartition("/")[0] for name in found}:
        own = _object(folder, f"{here}/{_STATE}".lstrip("/"), names).get("_data_files")
        if isinstance(own, list):
            listed[here] = {str(each.get("filename")) for each in own if isinstance(each, dict)}
    return sorted(
        name
        for name in found
        for here, _, last in [name.rpartition("/")]
        if here not in listed or last in listed[here] or not last.endswith(".arrow")
    )


def _object(folder: str, name: str, names: frozenset[str]) -> dict[str, Any]:
    """Reads a JSON object of a folder; {} where there is none."""
    return json_object(storage.read_bytes(storage.join(folder, name))) if name in names else {}


def _in_order(splits: Mapping[str, list[str]]) -> dict[str, list[str]]:
    usual = [split for split in _KEYWORDS if split in splits]
    return {split: splits[split] for split in [*usual, *sorted(splits.keys() - set(usual))]}


def json_object(payload: bytes) -> dict[str, Any]:
    """Reads a JSON object; {} where it is something else."""
    try:
        document = json.loads(payload)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


# --- README.md


_Patterns = dict[str, list[str]]
"""Patterns of the files of each split."""


def _readme_configs(url: str) -> dict[str, _Patterns]:
    """Reads the subsets that a README configures with `data_files`; {} where there are none."""
    text = storage.read_bytes(url).decode(errors="replace")
    match = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    if match is None or "configs" not in match[1]:
        return {}
    try:
        import yaml  # type: ignore[import-untyped]  # of the hub's libraries
    except ImportError as error:
        raise SourceError("source_missing.yaml", where=url) from error
    try:
        document = yaml.safe_load(match[1])
        listed = (document or {}).get("configs") or []
        return {
            str(config.get("config_name", "default")): _patterns(config)
            for config in listed
            if "data_files" in config
        }
    except (yaml.YAMLError, AttributeError, TypeError, KeyError) as error:
        problem = str(error).splitlines()[0]
        raise SourceError("source_split.readme", where=url, error=problem) from error


def _patterns(config: Mapping[str, Any]) -> _Patterns:
    """Reads `data_files` in each of its forms: a pattern, several, or several by split."""
    listed = config["data_files"]
    if isinstance(listed, str):
        listed = [listed]
    if not isinstance(listed, list):
        raise TypeError("data_files is not a pattern, a list of them, or a list of split and path")
    head = f"{config['data_dir'].strip('/')}/" if config.get("data_dir") else ""
    found: _Patterns = {}
    for each in listed:
        entry = {"split": "train", "path": each} if isinstance(each, str) else each
        paths = entry["path"]
        patterns = [paths] if isinstance(paths, str) else list(paths)
        found.setdefault(str(entry["split"]), []).extend(
            head + pattern.removeprefix("./") for pattern in patterns
        )
    return found


def _configured(
    names: Sequence[str], configs: Mapping[str, _Patterns], *, where: str
) -> SplitLayout:
    name = "default" if "default" in configs else next(iter(configs))
    if len(configs) > 1 and name != "default":
        raise SourceError("source_split.subsets", where=where, subsets=", ".join(configs))
    found = {
        split: {each for each in names if any(matches(each, p) for p in patterns)}
        for split, patterns in configs[name].items()
    }
    others = [p for each in configs.values() for patterns in each.values() for p in patterns]
    splits: dict[str, list[str]] = {}
    unmatched: dict[str, str] = {}
    for each in names:
        named = sorted(split for split, members in found.items() if each in members)
        if len(named) == 1:
            splits.setdefault(_SPLIT_OF.get(named[0], named[0]), []).append(each)
        elif named:
            unmatched[each] = f"README.md configures it for {' and '.join(named)}"
        elif not any(matches(each, pattern) for pattern in others):
            unmatched[each] = "README.md does not configure it"
    return SplitLayout(
        splits=_in_order(splits),
        unmatched=unmatched,
        rule=f"{_README}, subset {name}",
        configured_by=[_README],
    )


def matches(name: str, pattern: str) -> bool:
    """Matches a path as the hub's libraries do it.

    >>> matches("data/train-0.parquet", "data/train-*"), matches("a/b/c.arrow", "**/*.arrow")
    (True, True)
    >>> matches("a/b.arrow", "*.arrow"), matches("a/b/c.arrow", "a/**")
    (False, True)
    """
    return _pattern(pattern).fullmatch(name) is not None


def _pattern(pattern: str) -> re.Pattern[str]:
    parts = re.findall(r"\*\*/|\*\*|\*|\?|\[!?[^\]]+\]|.", pattern, re.DOTALL)
    text = ""
    for part in parts:
        if part == "**/":
            text += "(?:.*/)?"
        elif part in ("**", "*", "?"):
            text += {"**": ".*", "*": "[^/]*", "?": "[^/]"}[part]
        elif len(part) > 1:
            text += "[^" + part[2:] if part.startswith("[!") else part
        else:
            text += re.escape(part)
    return re.compile(text)
