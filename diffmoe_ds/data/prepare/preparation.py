"""Prepared sets: shards that can be written by many processes, in any order, again and again, with the same bytes.

The images are mixed by a fixed permutation and cut into shards of a fixed number.  Whoever writes shard i writes the
same bytes, into a file aside that gets its name when it is complete; then ``parts/`` gets the shard's record.  A record
is what says that a shard is done, so a killed run loses the shards that were being written and no more.  When all
records are there, the index is made of them, and they go.  No process waits for another on the way.

A finished set that has lost a shard gets it again, the same by its checksum.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffmoe_ds.data.prepare.encoders import Encoded, Encoder
from diffmoe_ds.data.shuffle import epoch_shuffle
from diffmoe_ds.data.sources.folder import Source
from diffmoe_ds.data.sources.index_files import INDEX, PARTS, SETTINGS, load_index, save_index
from diffmoe_ds.data.sources.latents import FORMAT_MEMBER
from diffmoe_ds.data.sources.tar_index import LABEL_SUFFIX, NO_LABEL, Entry, Index, ShardInfo, join, scan
from diffmoe_ds.errors import CheckpointError, ConfigError, DataError
from diffmoe_ds.files import TMP_PREFIX, remove_leftovers, remove_tree, sha256_of, write_json, write_tar, write_text

REPORT = "report.json"
MIXING_SEED = 0
"""Of the permutation that decides which images share a shard: class folders would give shards of one class each."""


@dataclass(frozen=True)
class Preparation:
    """A set that is being prepared; every process makes an equal one."""

    source: Source
    """The images."""
    encoder: Encoder
    """What is stored of them."""
    out: Path
    """The directory that gets the shards."""
    shard_images: int
    """Images of a shard, before unreadable ones are left out."""
    max_unreadable: float
    """Share of all images that may be left out."""
    captions: Callable[[int], str] | None = None
    """The caption of an image, stored as ``.txt``; none: without."""

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-len(self.source) // self.shard_images)

    def name(self, shard: int) -> str:
        """File name of a shard."""
        return f"shards-{shard:05d}.tar"

    def images(self, shard: int) -> np.ndarray:
        """Which images of the source a shard holds, in their order."""
        first = shard * self.shard_images
        return epoch_shuffle(MIXING_SEED, 0, len(self.source))[first : first + self.shard_images]

    def part(self, shard: int) -> Path:
        """The record that says that a shard is done."""
        return self.out / PARTS / f"{shard:05d}.json"

    def is_done(self, shard: int) -> bool:
        """Whether a shard and its record are there."""
        return self.part(shard).exists() and (self.out / self.name(shard)).exists()

    def lost(self) -> set[int] | None:
        """Shards that a finished set does not have any more, or of another size; none if the set is not finished."""
        try:
            infos = load_index(self.out).shards
        except DataError:  # there is no index, or it is damaged and made anew
            return None
        sizes = {path.name: path.stat().st_size for path in self.out.glob("*.tar")}
        return {number for number, info in enumerate(infos) if sizes.get(info.name) != info.bytes}

    def is_finished(self) -> bool:
        """Whether the whole set is there."""
        return self.lost() == set()

    def missing(self) -> set[int]:
        """The shards that are still to be written."""
        lost = self.lost()
        return {shard for shard in range(self.shards) if not self.is_done(shard)} if lost is None else lost


def begin(preparation: Preparation) -> None:
    """Make the directory and write down what is being prepared.

    Raises ``ConfigError`` if the directory holds something else, ``DataError`` for two images of one key.
    """
    settings = _settings(preparation)
    path = preparation.out / SETTINGS
    try:
        preparation.out.mkdir(parents=True, exist_ok=True)
        others = [p.name for p in preparation.out.iterdir() if not p.name.startswith(TMP_PREFIX)]
        if others and SETTINGS not in others and not path.exists():
            raise ConfigError(
                f"--out {preparation.out}: holds other files, such as {min(others)}; give a new directory."
            )
        if path.exists():
            _check_same(json.loads(path.read_text(encoding="utf-8")), settings, preparation.out)
        else:
            write_json(path, settings)
        if (preparation.out / INDEX).exists() and preparation.lost() is None:
            (preparation.out / INDEX).unlink(missing_ok=True)  # damaged, and the records to mend it are gone
        if not preparation.is_finished():
            (preparation.out / PARTS).mkdir(exist_ok=True)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CheckpointError(f"--out {preparation.out}: cannot be used: {error}.") from None


def write_shard(preparation: Preparation, shard: int, progress: Callable[[int], None]) -> int:
    """Write a shard and its record; returns how many images were unreadable.  ``progress`` is told of each image.

    Raises ``DataError`` if it takes the place of one that a finished set has lost, and is not the same.
    """
    path = preparation.out / preparation.name(shard)
    indices = preparation.images(shard).tolist()
    skipped: list[dict[str, str]] = []
    statistics = np.zeros(3)  # number of values, sum of means, sum of second moments
    write_tar(path, _members(preparation, indices, skipped, statistics, progress))
    sha256 = sha256_of(path)
    if _lost_sha256(preparation, path.name) not in (None, sha256):
        path.unlink(missing_ok=True)
        raise DataError(
            f"shard {path} was lost, and what is made of the images now is not the same: they, or what encodes them, "
            "have changed; prepare them into a new directory"
        )
    with open(path, "rb") as file:
        index = scan(path.name, file, path.stat().st_size)
    assert len(index.samples) + len(skipped) == len(indices), (len(index.samples), len(skipped), len(indices))
    record = {
        **index.shards[0]._asdict(),
        "sha256": sha256,
        "skipped": skipped,
        "statistics": statistics.tolist(),
        "rows": index.samples[:, 1:5].tolist(),
        "keys": [index.key(i) for i in range(len(index.samples))],
    }
    write_text(preparation.part(shard), json.dumps(record))
    return len(skipped)


def check_unreadable(preparation: Preparation, unreadable: int) -> None:
    """Raises ``DataError`` if more images were unreadable than may be."""
    allowed = preparation.max_unreadable * len(preparation.source)
    if unreadable > allowed:
        raise DataError(
            f"{unreadable:,} of {len(preparation.source):,} images could not be read, more than --max-unreadable "
            f"{preparation.max_unreadable:g} allows; {preparation.out / REPORT} or {preparation.out / PARTS} names them"
        )


def finish(preparation: Preparation) -> dict[str, Any]:
    """Make index and report of the records, when all are there; returns the report."""
    parts, skipped, hashes = [], [], {}
    statistics = np.zeros(3)
    for shard in range(preparation.shards):
        record = _record(preparation.part(shard))
        parts.append(_index(preparation, record))
        skipped += record["skipped"]
        hashes[record["name"]] = record["sha256"]
        statistics += record["statistics"]
    report = {"images": len(preparation.source), "stored": len(preparation.source) - len(skipped), "skipped": skipped}
    write_json(preparation.out / REPORT, report)
    check_unreadable(preparation, len(skipped))
    extra: dict[str, Any] = {"classes": preparation.source.classes, "sha256": hashes}
    if statistics[0]:
        extra["latent_mean"], extra["latent_std"] = scaled_statistics(preparation, statistics)
    save_index(join(parts), preparation.out, extra)
    clean(preparation)
    return report


def clean(preparation: Preparation) -> None:
    """Remove what only an unfinished set needs."""
    remove_tree(preparation.out / PARTS, ignore_errors=True)
    remove_leftovers(preparation.out)


def _record(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; start again to continue.") from None


def _lost_sha256(preparation: Preparation, name: str) -> str | None:
    """What the index knows of a shard, if there is one already."""
    try:
        return json.loads((preparation.out / INDEX).read_text(encoding="utf-8"))["sha256"][name]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def scaled_statistics(preparation: Preparation, statistics: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of the scaled latents that training would draw."""
    count, total, squares = statistics.tolist()
    latents = preparation.encoder.latents
    mean = total / count
    deviation = max(squares / count - mean**2, 0.0) ** 0.5
    return (mean - latents.shift_factor) * latents.scaling_factor, deviation * latents.scaling_factor


def _members(
    preparation: Preparation,
    indices: list[int],
    skipped: list[dict[str, str]],
    statistics: np.ndarray,
    progress: Callable[[int], None],
) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a shard's members; what is learnt on the way goes into the two collections."""
    source, encoder = preparation.source, preparation.encoder
    if encoder.latents is not None:
        yield FORMAT_MEMBER, json.dumps(encoder.latents.to_json()).encode()
    for encoded in encoder.encode(source, indices):
        progress(1)
        key = source.key(encoded.index)
        if encoded.unreadable:
            skipped.append({"key": key, "reason": encoded.unreadable})
            continue
        _add(statistics, encoded)
        yield f"{key}.{encoded.suffix}", encoded.data
        if source.labels[encoded.index] != NO_LABEL:
            yield f"{key}.{LABEL_SUFFIX}", b"%d" % source.labels[encoded.index]
        if preparation.captions is not None:
            yield f"{key}.txt", preparation.captions(encoded.index).encode()


def _add(statistics: np.ndarray, encoded: Encoded) -> None:
    if encoded.moments is not None:
        mean, log_variance = encoded.moments.astype(np.float64)[:, 0], encoded.moments.astype(np.float64)[:, 1]
        statistics += mean.size, mean.sum(), (mean**2 + np.exp(log_variance)).sum()


def _index(preparation: Preparation, record: dict[str, Any]) -> Index:
    names = [key.encode("utf-8", "surrogateescape") for key in record["keys"]]
    samples = np.zeros((len(names), len(Entry._fields)), np.int64)
    samples[:, 1:5] = np.array(record["rows"], np.int64).reshape(-1, 4)
    samples[:, 6] = [len(name) for name in names]
    samples[:, 5] = np.cumsum(samples[:, 6]) - samples[:, 6]
    shard = ShardInfo(record["name"], record["bytes"], record["samples"])
    return Index((shard,), samples, np.frombuffer(b"".join(names), np.uint8), preparation.encoder.latents)


def _settings(preparation: Preparation) -> dict[str, Any]:
    """What the bytes of the set depend on.  Images count by key and label: reading them all here would take hours."""
    digest, seen = hashlib.sha256(), set()
    labels = preparation.source.labels.tolist()
    for index in range(len(preparation.source)):
        key = preparation.source.key(index)
        if key in seen:
            raise DataError(f"two images have the key {key!r}; keys must differ, or their samples would be mixed up")
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
            raise ConfigError(
                f"--out {out}: was begun with {key} {str(found.get(key))[:80]}, which is now "
                f"{str(settings.get(key))[:80]}; give the same, or a new directory."
            )
