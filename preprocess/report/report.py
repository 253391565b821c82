"""REPORT: `report.html` of a finished dataset, one page for people.

1. The indexes are read once, one at a time, for the numbers (`survey`).
2. Of samples chosen by hash, the texts are read for the counts by style (`styles`), and a few are
   shown as a whole, as are those at the ends of the scales (`cards`).
3. Quarantine lists give examples of what was left out (`left_out`).

Every byte of the page is a function of the dataset and of the settings: there is no clock in it,
and no place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from preprocess.job import Reporter, count_rows
from preprocess.page import (
    BarChart,
    Child,
    Counts,
    Markup,
    bar_chart,
    element,
    histogram_chart,
    page,
    section,
    table,
)
from preprocess.report.cards import sample_card
from preprocess.report.left_out import left_out_examples
from preprocess.report.stored import Sample, SampleReader
from preprocess.report.styles import TextCounts, count_texts
from preprocess.report.survey import ASPECTS, Survey, chosen, survey
from preprocess.settings import Setting
from preprocess.sizes import size_text
from preprocess.text import Tokenizer, tokenizer_from_entry
from shardspec import storage
from shardspec.errors import ConfigError, ShardError, redacted
from shardspec.features import FEATURES
from shardspec.manifest import TOKENIZER_NAME, Manifest, require_manifest
from shardspec.messages import counted
from shardspec.probe import check_stored_tokenizer

REPORT_NAME = "report.html"

MOST_SAMPLES = 500
"""Some 50 kB of the page each."""

_MOST_STYLES = 12
_MOST_COMPARED = 8
_MOST_ALIKE = 32

_ALSO_ZERO = ("num_images", "num_loss_tokens")
"""Columns of which it is worth to know that all values are 0."""

_WORST = {
    "length": "longest sequence",
    "pixels": "largest picture",
    "bytes": "most bytes",
    "crops": "most crops",
    "least loss": "fewest tokens under loss",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportSettings:
    """What to show."""

    out: Annotated[str, Setting("folder or URL of the dataset", positional=True)]
    split: Annotated[str | None, Setting("split to show", shown="all")] = None
    samples: Annotated[int, Setting("samples of a split to show, chosen by hash")] = 24
    text_samples: Annotated[int, Setting("samples whose texts are read for counts by style")] = 256
    to: Annotated[
        str | None, Setting("file or URL to write", shown="report.html in the dataset")
    ] = None

    def __post_init__(self) -> None:
        for name, most in (("samples", MOST_SAMPLES), ("text_samples", 100_000)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise ConfigError("report_samples", name=name, got=value, most=most)


def make_report(settings: ReportSettings, progress: Reporter) -> str:
    """Writes the report of a dataset.

    Args:
      settings: What to show.
      progress: Gets a step per sample that is shown.

    Returns:
      URL of the page.

    Raises:
      ManifestError: There is no readable manifest.
      ConfigError: `unknown_split`.
      ShardError: A file is missing or damaged.
    """
    manifest = require_manifest(settings.out)
    splits = sorted(manifest.splits) if settings.split is None else [settings.split]
    reader = SampleReader(settings.out, manifest)
    for split in splits:
        manifest.select(split)  # raises
    tokenizer = None if manifest.raw else _tokenizer(settings.out, manifest)
    parts: list[tuple[str, str, Markup]] = [
        ("numbers", "Numbers", _numbers(manifest, splits)),
    ]
    for split in splits:
        same = not manifest.raw and reader.codec not in ("raw", FEATURES)
        found = survey(reader.rows(split), same_images=same)
        texts = TextCounts()
        if tokenizer is not None:
            numbers = chosen(found.num_samples, settings.text_samples, seed=1)
            progress.stage(f"texts of {split}", len(numbers))
            texts = count_texts(_texts(reader, split, numbers, progress))
        named = f" of {split}" if len(splits) > 1 else ""
        parts.append(
            (
                f"distributions-{split}",
                f"Distributions{named}",
                _distributions(found, texts, crops=_crops(manifest)),
            )
        )
        if tokenizer is None:
            continue
        shown = chosen(found.num_samples, settings.samples, seed=0)
        progress.stage(f"samples of {split}", len(shown))
        parts += [
            (
                f"samples-{split}",
                f"Samples{named}",
                _samples(reader, split, shown, tokenizer, progress),
            ),
            (f"worst-{split}", f"Extremes{named}", _worst(reader, split, found, tokenizer)),
            (
                f"duplicates-{split}",
                f"Duplicates{named}",
                _duplicates(reader, split, found, same=same),
            ),
        ]
    parts.insert(1, ("left-out", "Left out", _left_out(settings.out, manifest, splits)))
    parts.append(("provenance", "Provenance and licences", _provenance(manifest, splits)))
    kind = "imported tars" if manifest.raw else "a dataset of tar shards"
    document = page(
        f"{manifest.dataset}: report",
        *(section(title, body, anchor=anchor) for anchor, title, body in parts),
        lead=f"{kind.capitalize()}: what is in it, what was left out, and what training sees.",
        contents=[(anchor, title) for anchor, title, _ in parts],
    )
    target = settings.to or storage.join(settings.out, REPORT_NAME)
    storage.publish_bytes(target, document.encode())
    return target


def _tokenizer(url: str, manifest: Manifest) -> Tokenizer:
    where = storage.join(url, TOKENIZER_NAME)
    try:
        payload = storage.read_bytes(where)
    except FileNotFoundError as error:
        raise ShardError("tokenizer_file.missing", where=where) from error
    check_stored_tokenizer(manifest.tokenizer, payload, where=where)
    return tokenizer_from_entry(payload.decode(), manifest.tokenizer)


def _texts(
    reader: SampleReader, split: str, numbers: Sequence[int], progress: Reporter
) -> Iterator[Sample]:
    for number in numbers:
        yield reader.sample(split, number, with_images=False)
        progress.step("")


def _numbers(manifest: Manifest, splits: Sequence[str]) -> Markup:
    entries = [manifest.splits[split] for split in splits]
    totals = {
        "samples": sum(entry.num_samples for entry in entries),
        "images": sum(entry.num_images for entry in entries),
        "text tokens": sum(entry.num_tokens for entry in entries),
        "tokens under loss": sum(entry.num_loss_tokens for entry in entries),
    }
    shards = sum(shard.split in splits for shard in manifest.shards)
    facts = [(name, f"{value:,}") for name, value in totals.items()]
    facts += [("shards", f"{shards:,}")]
    facts += [("bytes", size_text(sum(entry.num_bytes for entry in entries)))]
    rows = [
        (
            split,
            f"{entry.num_samples:,}",
            f"{entry.num_images:,}",
            f"{entry.num_tokens:,}",
            f"{entry.num_loss_tokens:,}",
            size_text(entry.num_bytes),
            f"{sum(entry.quarantined.values()):,}",
        )
        for split, entry in zip(splits, entries, strict=True)
    ]
    head = ("split", "samples", "images", "text tokens", "under loss", "bytes", "rows left out")
    return element(
        "div",
        _facts(facts),
        table("Splits", head, rows),
        element(
            "p",
            "Text tokens count each exchange with its longest variant, without image tokens.",
            class_="note",
        ),
    )


def _facts(facts: Sequence[tuple[str, str]]) -> Markup:
    pairs = [element("div", element("dt", name), element("dd", told)) for name, told in facts]
    return element("dl", *pairs, class_="facts")


def _left_out(url: str, manifest: Manifest, splits: Sequence[str]) -> Markup:
    shown: list[Child] = []
    reasons: dict[str, int] = {}
    rows: list[tuple[str, ...]] = []
    for split in splits:
        entry = manifest.splits[split]
        for reason, count in entry.quarantined.items():
            reasons[reason] = reasons.get(reason, 0) + count
        if "rows_read" in entry.source:
            counts = count_rows(entry)
            lost = sum(counts.left_out.values())
            numbers = (
                counts.read,
                counts.in_samples,
                counts.other_split,
                counts.beyond_limit,
                lost,
            )
            rows.append((split, *(f"{number:,}" for number in numbers)))
    if rows:
        head = ("split", "read", "in samples", "of another split", "beyond the limit", "left out")
        shown.append(table("What became of each row", head, rows))
    ordered = sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))
    if not ordered:
        shown.append(element("p", "No row was left out."))
        return element("div", *shown)
    bars = [(reason, f"{count:,}") for reason, count in ordered]
    shown.append(table("Rows left out, by reason", ("reason", "rows"), bars))
    examples = left_out_examples(url)
    for reason, _ in ordered:
        found = examples.get(reason, [])
        if not found:
            continue
        lines = [_left_out_line(entry) for entry in found]
        titles = ("key", "row", "what was wrong")
        shown += [
            element("h3", f"Examples of {reason}"),
            table(f"Examples of {reason}", titles, lines, numeric=False),
        ]
    missing = [reason for reason, _ in ordered if reason not in examples]
    if missing:
        told = f"No quarantine list of this dataset has an example of {', '.join(missing)}."
        shown.append(element("p", told, class_="note"))
    return element("div", *shown)


def _left_out_line(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    known = ("key", "image", "metadata", "stage", "reason", "message", "facts")
    origin = {name: value for name, value in entry.items() if name not in known}
    facts = entry.get("facts") or {}
    told = [str(entry.get("message", ""))]
    if isinstance(facts, Mapping):
        told += [f"{name}={value}" for name, value in sorted(facts.items())]
    place = origin or {"image": entry.get("image")}
    return (
        str(entry.get("key", "")),
        redacted(_json(place))[:300],
        redacted("; ".join(told))[:600],
    )


def _crops(manifest: Manifest) -> str:
    """Names what the index counts in `view_crops`."""
    return "Tokens of the pictures" if "model" in manifest.recipe else "Crops"


def _distributions(found: Survey, texts: TextCounts, *, crops: str) -> Markup:
    names = {
        "num_tokens": ("Text tokens of a sample", "samples"),
        "num_loss_tokens": ("Tokens under loss of a sample", "samples"),
        "num_branches": ("Conversations of a sample", "samples"),
        "num_turns": ("Exchanges of a sample", "samples"),
        "num_images": ("Images of a sample", "samples"),
        "num_members": ("Files of a sample", "samples"),
        "width": ("Width of the first image, in pixels", "images"),
        "height": ("Height of the first image, in pixels", "images"),
        "image_bytes": ("Bytes of the first image, as stored", "images"),
        "num_bytes": ("Bytes of a sample", "samples"),
    }
    views = [name for name in found.histograms if name.split()[0] in ("length", "crops")]
    for name in views:
        kind, view = name.split()
        several = f", view {int(view) + 1}" if f"{kind} 1" in found.histograms else ""
        title = "Longest sequence" if kind == "length" else crops
        names[name] = (f"{title} of a sample{several}", "samples")
    charts = [
        histogram_chart(title, found.histograms[name], unit=unit)
        for name, (title, unit) in names.items()
        if name in found.histograms and (found.histograms[name].most or name in _ALSO_ZERO)
    ]
    if found.aspects.any():
        bars = [(name, int(n)) for (name, _), n in zip(ASPECTS, found.aspects, strict=True)]
        charts.append(
            bar_chart(
                BarChart(
                    title="Shape of the first image, width to height",
                    unit="images",
                    bars=bars,
                    ticks={0.5: "taller", 4.5: "square", 8.5: "wider"},
                )
            )
        )
    children: list[Child] = [element("div", *charts, class_="charts")]
    if texts.num_samples:
        children += _styles(found, texts)
    return element("div", *children)


def _styles(found: Survey, texts: TextCounts) -> list[Child]:
    scope = (
        "All samples were read for this."
        if texts.num_samples == found.num_samples
        else f"From {texts.num_samples:,} of {found.num_samples:,} samples, chosen by hash."
    )
    shown = list(texts.styles.items())[:_MOST_STYLES]

    def row(name: str, tokens: Counts, loss: Counts, variants: Counts) -> tuple[str, ...]:
        lengths = (tokens.mean, tokens.quantile(0.5), tokens.quantile(0.95), tokens.most)
        mean, *rest = lengths
        return (
            name,
            f"{tokens.count:,}",
            f"{mean:,.1f}",
            *(f"{number:,}" for number in rest),
            f"{loss.mean:,.1f}",
            f"{variants.mean:,.1f}",
        )

    rows = [row(n, each.tokens, each.loss_tokens, each.variants) for n, each in shown]
    head = ["style", "exchanges", "tokens, mean", "median", "95th percentile", "most"]
    head += ["under loss, mean", "variants, mean"]
    charts = [
        histogram_chart(f"Tokens of an exchange: {name}", each.tokens, unit="exchanges")
        for name, each in shown
    ]
    if texts.marks.count:
        charts.append(histogram_chart("Points and boxes of an image", texts.marks, unit="images"))
    rest = len(texts.styles) - len(shown)
    return [
        element("h3", "By style"),
        element("p", scope, class_="note"),
        table("Tokens by style", head, rows),
        element("div", *charts, class_="charts"),
        element("p", f"Not shown: {counted(rest, 'rarer style')}.", class_="note")
        if rest > 0
        else None,
    ]


def _samples(
    reader: SampleReader,
    split: str,
    numbers: Sequence[int],
    tokenizer: Tokenizer,
    progress: Reporter,
) -> Markup:
    legend = element(
        "p",
        "Pictures show their crops (dashed), and points and boxes of the record. Tokens with a ",
        element("mark", "background"),
        " are under loss, spaces are ·.",
        class_="note",
    )
    cards = []
    for number in numbers:
        cards.append(sample_card(reader.sample(split, number), reader, tokenizer, why=""))
        progress.step("")
    return element("div", legend, element("div", *cards, class_="cards"))


def _worst(reader: SampleReader, split: str, found: Survey, tokenizer: Tokenizer) -> Markup:
    # A sample at the end of several scales is shown once.
    reasons: dict[int, list[str]] = {}
    rows = []
    crops = _crops(reader.manifest).lower()
    for name, title in {**_WORST, "crops": f"most {crops}"}.items():
        pairs = found.extremes.get(name, [])
        values = {number: abs(value) for value, number in pairs}
        if values:
            told = ", ".join(f"{value:,} (sample {number:,})" for number, value in values.items())
            rows.append((title, told))
        for number in list(values)[:1]:
            reasons.setdefault(number, []).append(title)
    cards = [
        sample_card(reader.sample(split, number), reader, tokenizer, why=", ".join(why))
        for number, why in reasons.items()
    ]
    return element(
        "div",
        table("Samples at the ends of the scales", ("scale", "values"), rows, numeric=False),
        element("div", *cards, class_="cards"),
    )


def _duplicates(reader: SampleReader, split: str, found: Survey, *, same: bool) -> Markup:
    repeated = reader.manifest.splits[split].quarantined.get("duplicate", 0)
    shown: list[Child] = [
        element("p", f"Rows with the image and the text of an earlier one, left out: {repeated:,}.")
    ]
    if not same:
        told = (
            "Uncompressed images all have the bytes of their size: equal ones are not looked for."
        )
        return element("div", *shown, element("p", told, class_="note"))
    rows = []
    for group in found.classes[:_MOST_COMPARED]:
        by_hash: dict[str, list[int]] = {}
        for number in group[:_MOST_ALIKE]:
            by_hash.setdefault(reader.image_sha256(split, number), []).append(number)
        for digest, numbers in by_hash.items():
            if len(numbers) > 1:
                listed = ", ".join(f"{number:,}" for number in numbers)
                rows.append((digest[:12], f"{len(numbers):,}", listed))
    total = sum(map(len, found.classes))
    share = "" if found.classes_share == 1 else f" in {found.classes_share:.2%} of all samples"
    told = (
        f"{counted(len(found.classes), 'group')}, {counted(total, 'sample')}{share}, have first "
        "images that are equal in width, height and bytes."
    )
    if found.classes:
        told += (
            f" The images of the {min(_MOST_COMPARED, len(found.classes))} largest were compared."
        )
    shown.append(element("p", told))
    if rows:
        head = ("image", "samples", "numbers")
        shown.append(table("Samples with the same first image", head, rows, numeric=False))
    elif found.classes:
        shown.append(element("p", "None of them are the same."))
    return element("div", *shown)


def _provenance(manifest: Manifest, splits: Sequence[str]) -> Markup:
    shown: list[Child] = []
    licences = []
    for split in splits:
        source = manifest.splits[split].source
        rows = [(name, redacted(_json(value))) for name, value in sorted(source.items())]
        caption = f"Source of {split}"
        shown.append(table(caption, ("field", "value"), rows, numeric=False))
        licences += [(split, text) for text in _licences(source)]
    if licences:
        shown.insert(0, table("Licences", ("split", "licence"), licences, numeric=False))
    else:
        told = "The manifest names no licence: see the page of the source."
        shown.insert(0, element("p", told))
    entry = manifest.tokenizer
    facts = [
        ("sha256 of the manifest", hashlib.sha256(manifest.encode()).hexdigest()),
        ("format version", str(manifest.format_version)),
    ]
    if not manifest.raw:
        facts += [
            ("tokenizer", entry.name),
            ("sha256 of tokenizer.json", entry.sha256),
            ("rows of the embedding", f"{entry.embedding_size:,}"),
        ]
    facts += [(f"version of {name}", value) for name, value in sorted(manifest.libraries.items())]
    shown.append(table("Made by", ("what", "value"), facts, numeric=False))
    recipe = json.dumps(manifest.recipe, indent=1, sort_keys=True, ensure_ascii=False)
    shown.append(
        element(
            "details",
            element("summary", "Recipe: all settings that the samples follow from"),
            element("div", redacted(recipe), class_="text"),
        )
    )
    return element("div", *shown)


def _licences(value: Any) -> Iterator[str]:
    """Finds the licences in a description of a source, wherever they are nested."""
    if isinstance(value, Mapping):
        for name, part in sorted(value.items()):
            if name in ("licence", "license") and isinstance(part, str) and part:
                yield part
            else:
                yield from _licences(part)
    elif isinstance(value, list):
        for part in value:
            yield from _licences(part)


def _json(value: Any) -> str:
    return (
        value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
    )
