"""Preparation of text features: the captions of an image and what text encoders make of them, beside the image."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffmoe_ds.data.captions import Captions
from diffmoe_ds.data.prepare.encoders import Encoded, Encoder
from diffmoe_ds.data.sources.folder import Source
from diffmoe_ds.data.sources.tar_headers import MAX_MEMBER_BYTES
from diffmoe_ds.data.sources.text_index import TEXT_SUFFIX
from diffmoe_ds.data.text_encoder import TextEncoders
from diffmoe_ds.errors import DataError
from diffmoe_ds.files import sha256_of
from diffmoe_ds.text_features import encode_member


class CaptionEncoder:
    """Adds captions and text features to what another encoder stores for an image.

    A batch holds captions of one shard only, as in `LatentEncoder`.
    """

    def __init__(
        self, images: Encoder, captions: Captions, table: Path | None, encoders: TextEncoders, batch_size: int
    ) -> None:
        """Combine the parts.

        Args:
            images: stores the images.
            captions: of the images.
            table: the file that they come from; None if they are next to the images.
            encoders: the text encoders.
            batch_size: captions per batch.
        """
        self.latents = images.latents
        self.features = images.features
        self.text = encoders.format
        self._images = images
        self._captions = captions
        self._table = table
        self._encoders = encoders
        self._batch_size = batch_size

    def settings(self) -> dict[str, Any]:
        """See `Encoder`."""
        return {
            "kind": "text",
            "stored": self._images.settings(),
            "text_encoders": self.text.to_json()["encoders"],
            "captions": None if self._table is None else sha256_of(self._table),
            "batch_size": self._batch_size,
            "device": self._encoders.device.type,
        }

    def encode(self, source: Source, indices: Sequence[int]) -> Iterator[Encoded]:
        """See `Encoder`."""
        images = self._images.encode(source, indices)
        while batch := list(itertools.islice(images, self._batch_size)):
            yield from self._batch(batch)

    def _batch(self, batch: list[Encoded]) -> Iterator[Encoded]:
        texts: dict[int, list[str]] = {}
        for number, encoded in enumerate(batch):
            if encoded.unreadable:
                continue
            try:
                texts[number] = self._captions.captions(encoded.index)
            except DataError as error:
                batch[number] = Encoded(encoded.index, unreadable=str(error))
        waiting = itertools.chain.from_iterable(texts.values())
        features = itertools.chain.from_iterable(
            self._encoders.encode(part) for part in iter(lambda: list(itertools.islice(waiting, self._batch_size)), [])
        )
        for number, encoded in enumerate(batch):
            captions = texts.get(number, [])
            if not captions:
                yield encoded
                continue
            member = encode_member(list(itertools.islice(features, len(captions))))
            if len(member) > MAX_MEMBER_BYTES:
                why = f"its text features have {len(member):,} bytes; the limit is {MAX_MEMBER_BYTES:,}"
                yield Encoded(encoded.index, unreadable=why)
                continue
            yield replace(
                encoded,
                more=(*encoded.more, ("txt", "\n".join(captions).encode()), (TEXT_SUFFIX, member)),
                captions=len(captions),
                truncated=sum(self._encoders.too_long(caption) is not None for caption in captions),
            )
