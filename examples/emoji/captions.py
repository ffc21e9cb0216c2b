"""Captions of emoji: names, categories and colours in words.

The names come from the package's own metadata. Few of them contain a colour ("red apple"), so the main colour of a
picture, measured on its pixels, becomes another caption ("red automobile").
"""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

SKIN_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")
MAIN_SHARE = 0.5
"""Smallest fraction of a picture's opaque pixels that a main colour covers."""
COLOURED = ("Food & Drink", "Animals & Nature", "Travel & Places", "Objects", "Activities")
"""Categories whose pictures have a main colour; the names of flags, symbols and people suffice."""
HUES = ((18, "red"), (40, "orange"), (68, "yellow"), (165, "green"), (255, "blue"), (295, "purple"), (338, "pink"))
"""Upper bound of each hue, in degrees; hues above the last one are red."""
SAME_PICTURE = 1.0
"""Largest root mean square difference, of 255, between two pictures of the same drawing."""


def captions(entry: Mapping[str, Any], tones: str, pixels: np.ndarray) -> list[str]:
    """Return the captions of a picture, the name first.

    Args:
        entry: of ``emoji.json``.
        tones: code points of its skin tones, joined by dashes, such as ``1F3FB``; empty without them.
        pixels: uint8 [height, width, 4], RGBA.
    """
    name = entry["name"].lower()
    if tones:
        shades = " and ".join(SKIN_TONES[tone] for tone in tones.split("-") if tone in SKIN_TONES)
        return [f"{name}, {shades} skin tone"]
    shorts = (short.replace("_", " ").replace("-", " ") for short in entry.get("short_names", ()))
    found = [name, *(short for short in shorts if not any(map(str.isdigit, short)))]  # not "dog2"
    found.append(f"{name}, {entry['category'].lower()}")
    colour = main_colour(pixels)
    if entry["category"] in COLOURED and colour is not None and not set(name.split()) & set(COLOURS):
        found.append(f"{colour} {name}")
    spelled = [caption for caption in found if any(map(str.isalpha, caption))]
    return list(dict.fromkeys(spelled)) or [name]


def main_colour(pixels: np.ndarray) -> str | None:
    """Return the word for the colour that covers most of a picture, if any covers `MAIN_SHARE` of it.

    Args:
        pixels: uint8 [height, width, 4], RGBA.
    """
    opaque = pixels[pixels[..., 3] > 127][:, :3]
    if not len(opaque):
        return None
    coarse = Counter(map(tuple, (opaque >> 3).tolist()))  # few distinct colours to name
    words: Counter[str] = Counter()
    for (red, green, blue), count in coarse.items():
        words[colour_word(8 * red + 4, 8 * green + 4, 8 * blue + 4)] += count
    word, count = words.most_common(1)[0]
    return word if count >= MAIN_SHARE * len(opaque) else None


def colour_word(red: int, green: int, blue: int) -> str:
    """Return the word for an RGB colour; the bounds are a matter of judgement, made by looking at the pictures."""
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    degrees = 360 * hue
    if value < 0.3:
        return "black"
    if saturation < 0.13:
        return "white" if value > 0.88 else "gray"
    if degrees < 48 and (value < 0.6 or (value < 0.85 and saturation < 0.75)):
        return "brown"
    return next((word for bound, word in HUES if degrees < bound), "red")


def distinct(pictures: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Return for each picture the first one with the same drawing, often itself.

    Several flags and families are drawn alike; as separate images, one drawing would have contradicting captions.

    Args:
        pictures: RGBA pixels by name, all of one size.
    """
    firsts: dict[str, str] = {}
    by_mean: dict[int, list[tuple[str, np.ndarray]]] = {}
    for name, pixels in pictures.items():
        values = pixels.astype(np.float32)
        mean = int(values.mean())
        similar = [each for near in (mean - 1, mean, mean + 1) for each in by_mean.get(near, ())]
        match = (other for other, seen in similar if np.sqrt(((values - seen) ** 2).mean()) <= SAME_PICTURE)
        firsts[name] = next(match, name)
        if firsts[name] == name:
            by_mean.setdefault(mean, []).append((name, values))
    return firsts
