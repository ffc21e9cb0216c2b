"""Prepared datasets: shards that any number of processes can write, in any order, with identical bytes.

The images are mixed by a fixed permutation and split into shards of a fixed size.  Every process that writes shard i
writes the same bytes, atomically, and then a record of the shard into `parts/`.  A record marks a shard as done, so a
killed run loses only the shards that it was writing.  When all records exist, rank 0 builds the index from them and
removes them.  No process waits for another before that.

If a finished dataset has lost a shard, it is regenerated and compared with its checksum.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffmoe_ds.control_files import MAX_INDEX_BYTES, read_json
from diffmoe_ds.data.prepare.encoders import Encoded, Encoder
from diffmoe_ds.data.prepare.records import Totals, read_record, record_index, shard_record
from diffmoe_ds.data.shuffle import epoch_shuffle
from diffmoe_ds.data.sources.folder import Source
from diffmoe_ds.data.sources.image_features import FEATURES_MEMBER
from diffmoe_ds.data.sources.index_files import INDEX, PARTS, SETTINGS, load_index, save_index
from diffmoe_ds.data.sources.latents import FORMAT_MEMBER
from diffmoe_ds.data.sources.tar_index import LABEL_SUFFIX, NO_LABEL, join, scan
from diffmoe_ds.data.sources.text_index import TEXT_FORMAT_MEMBER
from diffmoe_ds.errors import CheckpointError, ConfigError, DataError
from diffmoe_ds.files import (
    TMP_PREFIX,
    remove_leftovers,
    remove_tree,
    sha256_of,
    write_json,
    write_once,
    write_tar,
    write_text,
)
from diffmoe_ds.text import reason

REPORT = "report.json"
MIXING_SEED = 0
"""Seed of the permutation that mixes the images; without it, each shard would hold a single class."""
MAX_SHARD_IMAGES = 100_000
"""Most images of a shard; the record of a larger one could exceed the limits of a JSON file."""


@dataclass(frozen=True)
class Preparation:
    """A dataset that is being prepared; all processes describe the same one."""

    source: Source
    """Images to read."""
    encoder: Encoder
    """Encodes each image for storage."""
    out: Path
    """Output directory."""
    shard_images: int
    """Images per shard, including unreadable ones, which are skipped."""
    max_unreadable: float
    """Fraction of all images that may be unreadable."""
    captions: Callable[[int], list[str]] | None = None
    """Returns the captions of an image, which its `.txt` holds; one without captions has none. None stores none.

    Raises `DataError` if they cannot be read; the image then counts as unreadable.
    """

    @property
    def shards(self) -> int:
        """Return the number of shards."""
        return -(-len(self.source) // self.shard_images)

    def name(self, shard: int) -> str:
        """Return the file name of a shard."""
        return f"shards-{shard:05d}.tar"

    def images(self, shard: int) -> np.ndarray:
        """Return the images of the source that a shard holds, in order."""
        first = shard * self.shard_images
        return epoch_shuffle(MIXING_SEED, 0, len(self.source))[first : first + self.shard_images]

    def part(self, shard: int) -> Path:
        """Return the path of the record that marks a shard as done."""
        return self.out / PARTS / f"{shard:05d}.json"

    def is_done(self, shard: int) -> bool:
        """Return whether a shard and its record exist."""
        return self.part(shard).exists() and (self.out / self.name(shard)).exists()

    def lost(self) -> set[int] | None:
        """Return the shards of a finished dataset that are missing or of the wrong size; None if it is not finished."""
        try:
            infos = load_index(self.out).shards
        except DataError:  # the index does not exist, or it is damaged and will be rebuilt
            return None
        sizes = {path.name: path.stat().st_size for path in self.out.glob("*.tar")}
        return {number for number, info in enumerate(infos) if sizes.get(info.name) != info.bytes}

    def is_finished(self) -> bool:
        """Return whether the dataset is complete."""
        return self.lost() == set()

    def missing(self) -> set[int]:
        """Return the shards that have to be written."""
        lost = self.lost()
        return {shard for shard in range(self.shards) if not self.is_done(shard)} if lost is None else lost


def begin(preparation: Preparation) -> None:
    """Create the directory and record the settings of the preparation.

    Raises:
        ConfigError: the directory holds other files, or was started with other settings.
        DataError: two images have the same key.
        CheckpointError: the directory cannot be written.
    """
    per_shard = min(preparation.shard_images, len(preparation.source))
    if per_shard > MAX_SHARD_IMAGES:
        raise ConfigError(f"--shard-images must be at most {MAX_SHARD_IMAGES:,}, got {per_shard:,}.")
    settings = _settings(preparation)
    path = preparation.out / SETTINGS
    try:
        preparation.out.mkdir(parents=True, exist_ok=True)
        others = [p.name for p in preparation.out.iterdir() if not p.name.startswith(TMP_PREFIX)]
        if others and SETTINGS not in others and not path.exists():
            raise ConfigError(
                f"--out {preparation.out} holds other files, such as {min(others)}; choose a new directory."
            )
        if not path.exists():
            write_once(path, json.dumps(settings, indent=1) + "\n")  # other ranks do so, too
        found = read_json(path)
        if not isinstance(found, dict):
            raise ValueError(f"{SETTINGS} is not an object")
        _check_same(found, settings, preparation.out)
        if (preparation.out / INDEX).exists() and preparation.lost() is None:
            (preparation.out / INDEX).unlink(missing_ok=True)  # damaged, and the records to rebuild it are gone
        if not preparation.is_finished():
            (preparation.out / PARTS).mkdir(exist_ok=True)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CheckpointError(f"--out {preparation.out} cannot be used: {reason(error)}.") from None


def write_shard(preparation: Preparation, shard: int, progress: Callable[[int], None]) -> list[dict[str, str]]:
    """Write a shard and its record.

    Args:
        preparation: the dataset.
        shard: number of the shard.
        progress: called with the number of images encoded since the last call.

    Returns:
        `key` and `reason` of each unreadable image.

    Raises:
        DataError: the shard replaces one that a finished dataset has lost, and differs from it.
        CheckpointError: a file cannot be written.
    """
    path = preparation.out / preparation.name(shard)
    indices = preparation.images(shard).tolist()
    totals = Totals()
    write_tar(path, _members(preparation, indices, totals, progress))
    sha256 = sha256_of(path)
    if _lost_sha256(preparation, path.name) not in (None, sha256):
        path.unlink(missing_ok=True)
        raise DataError(
            f"shard {path} was lost, and regenerating it gives different bytes: the images, or what encodes them, "
            "have changed; prepare them into a new directory"
        )
    with open(path, "rb") as file:
        index = scan(path.name, file, path.stat().st_size)
    skipped = totals.skipped
    assert len(index.samples) + len(skipped) == len(indices), (len(index.samples), len(skipped), len(indices))
    write_text(preparation.part(shard), json.dumps(shard_record(index, sha256, totals)))
    return skipped


def check_unreadable(preparation: Preparation, skipped: list[dict[str, str]]) -> None:
    """Check the number of unreadable images; if there are too many, forget their shards, so that they are tried again.

    Args:
        preparation: the dataset.
        skipped: `key` and `reason` of each unreadable image.

    Raises:
        DataError: there are more than `max_unreadable` allows.
        CheckpointError: the report cannot be written.
    """
    allowed = preparation.max_unreadable * len(preparation.source)
    if len(skipped) > allowed:
        write_json(preparation.out / REPORT, {"images": len(preparation.source), "skipped": skipped})
        keys = {entry["key"] for entry in skipped}
        for part in sorted((preparation.out / PARTS).glob("*.json")):
            if keys & {entry["key"] for entry in read_record(part)["skipped"]}:
                part.unlink(missing_ok=True)
        raise DataError(
            f"{len(skipped):,} of {len(preparation.source):,} images could not be read, more than --max-unreadable "
            f"{preparation.max_unreadable:g} allows; the first is {skipped[0]['key']!r}: {skipped[0]['reason']}; "
            f"{preparation.out / REPORT} names those found; repair them and run the same command again"
        )


def finish(preparation: Preparation) -> dict[str, Any]:
    """Build the index and the report from the records of all shards.

    Returns:
        The report: `images`, `stored` and `skipped`, and with text features the number of `captions` and of
        `truncated_captions`, which have more tokens than an encoder reads.

    Raises:
        DataError: too many images are unreadable.
        CheckpointError: a record cannot be read, or a file cannot be written.
    """
    parts, hashes, totals, encoder = [], {}, Totals(), preparation.encoder
    for shard in range(preparation.shards):
        record = read_record(preparation.part(shard))
        parts.append(record_index(record, encoder))
        totals.add_record(record)
        hashes[record["name"]] = record["sha256"]
    images, skipped = len(preparation.source), totals.skipped
    report = {"images": images, "stored": images - len(skipped), "skipped": skipped}
    if encoder.text is not None:
        report |= {"captions": totals.captions, "truncated_captions": totals.truncated}
    check_unreadable(preparation, skipped)
    write_json(preparation.out / REPORT, report)
    extra: dict[str, Any] = {"classes": preparation.source.classes, "sha256": hashes}
    if encoder.latents is not None and totals.statistics[0] > 0:
        extra["latent_mean"], extra["latent_std"] = scaled_statistics(preparation, totals.statistics)
    save_index(join(parts), preparation.out, extra)
    clean(preparation)
    return report


def clean(preparation: Preparation) -> None:
    """Remove the files that only an unfinished dataset needs."""
    remove_tree(preparation.out / PARTS, ignore_errors=True)
    remove_leftovers(preparation.out)


def _lost_sha256(preparation: Preparation, name: str) -> str | None:
    """Return the checksum of a shard in an existing index, if there is one."""
    try:
        sha256: str = read_json(preparation.out / INDEX, MAX_INDEX_BYTES)["sha256"][name]
        return sha256
    except (OSError, ValueError, LookupError, TypeError):
        return None


def scaled_statistics(preparation: Preparation, statistics: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation of the scaled latents that training samples."""
    count, total, squares = statistics.tolist()
    latents = preparation.encoder.latents
    assert latents is not None, "pixels have no such statistics"
    mean = total / count
    deviation = max(squares / count - mean**2, 0.0) ** 0.5
    return (mean - latents.shift_factor) * latents.scaling_factor, deviation * latents.scaling_factor


def _members(
    preparation: Preparation, indices: list[int], totals: Totals, progress: Callable[[int], None]
) -> Iterator[tuple[str, bytes]]:
    """Yield name and contents of a shard's members, and count them."""
    source, encoder = preparation.source, preparation.encoder
    formats = (
        (FORMAT_MEMBER, encoder.latents),
        (TEXT_FORMAT_MEMBER, encoder.text),
        (FEATURES_MEMBER, encoder.features),
    )
    for member, form in formats:
        if form is not None:
            yield member, json.dumps(form.to_json()).encode()
    for encoded in encoder.encode(source, indices):
        progress(1)
        key = source.key(encoded.index)
        captions, unreadable = _captions(preparation, encoded)
        if unreadable:
            totals.skipped.append({"key": key, "reason": unreadable})
            continue
        totals.add(encoded)
        yield f"{key}.{encoded.suffix}", encoded.data
        if source.labels[encoded.index] != NO_LABEL:
            yield f"{key}.{LABEL_SUFFIX}", b"%d" % source.labels[encoded.index]
        if captions:
            yield f"{key}.txt", "\n".join(captions).encode()
        for suffix, data in encoded.more:
            yield f"{key}.{suffix}", data


def _captions(preparation: Preparation, encoded: Encoded) -> tuple[list[str], str]:
    """Return the captions to store with an image, and why it is unreadable, if it is."""
    if encoded.unreadable or preparation.captions is None:
        return [], encoded.unreadable
    try:
        return preparation.captions(encoded.index), ""
    except DataError as error:
        return [], str(error)


def _settings(preparation: Preparation) -> dict[str, Any]:
    """Return everything that the bytes depend on.  Images are identified by key and label; reading all takes hours."""
    digest, seen = hashlib.sha256(), set()
    labels = preparation.source.labels.tolist()
    for index in range(len(preparation.source)):
        key = preparation.source.key(index)
        if key in seen:
            raise DataError(f"two images have the key {key!r}; keys must be unique")
        seen.add(key)
        digest.update(f"{key}\0{labels[index]}\n".encode("utf-8", "surrogateescape"))
    return {
        "version": 1,
        **preparation.encoder.settings(),
        "shard_images": preparation.shard_images,
        "images": len(preparation.source),
        "keys_and_labels": digest.hexdigest(),
        "classes": preparation.source.classes,
    }


def _check_same(found: dict[str, Any], settings: dict[str, Any], out: Path) -> None:
    for key in (*settings, *found):
        if found.get(key) != settings.get(key):
            name, before, now = _difference(key, found.get(key), settings.get(key))
            raise ConfigError(
                f"--out {out} was started with {name} {str(before)[:80]}, got {str(now)[:80]}; use the same setting, "
                "or a new directory."
            )


def _difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """Return the dotted name of the first part of a setting that differs, and its two values."""
    pairs: list[tuple[Any, Any, Any]] = []
    if isinstance(before, dict) and isinstance(now, dict) and before.keys() == now.keys():
        pairs = [(key, before[key], now[key]) for key in before]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = [(number, *pair) for number, pair in enumerate(zip(before, now, strict=True), 1)]
    for key, one, other in pairs:
        if one != other:
            return _difference(f"{name}.{key}", one, other)
    return name, before, now
