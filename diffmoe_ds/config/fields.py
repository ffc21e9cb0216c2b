"""Field types of the configuration: accepted YAML and valid range of each.

YAML 1.1 reads ``1e5`` and ``1e-4`` as text and ``5`` as an integer, so an integer field accepts ``1e5`` and ``5.0``,
and a number field accepts ``5``. Nothing else is converted: ``true`` is not 1, and 1 is not "1".
"""

from __future__ import annotations

import re
import reprlib
import sys
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    Strict,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from diffmoe_ds.config.nearest import MAX_SHOWN
from diffmoe_ds.config.presets import NAMES, SIZES, parse_name
from diffmoe_ds.text import shortened
from diffmoe_ds.text_layout import MAX_ENCODERS, MAX_TOKENS, MAX_WIDTH

MAX_BITS = 64
"""Longest integer that a field accepts."""

ROUTERS = {"diffmoe": "batch_pool", "ec": "expert_choice", "race": "expert_race", "tc": "token_choice"}
"""Short names of the routers, those of the reference's model classes."""
MAX_CACHE_GB = 1e9
"""Largest size of the shard cache."""
MAX_CLASSES = 10_000_000
"""Largest number of class labels."""
AUTO_CLASSES = 0
"""Number of classes before the training set is known."""
AUTO_TEXT: tuple[tuple[int, int, int], ...] = ()
"""Shapes of the text features before the training set is known."""
AUTO_FEATURES: tuple[int, ...] = ()
"""Shape of image features before the training set is known."""
MAX_GRID = 256
"""Largest side of a grid of image features."""
WRONG_TYPE = "wrong_type"
"""Error type of the validators below; the context's ``expected`` completes "must be ..."."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlevel = 2


def short_repr(value: Any) -> str:
    """Return ``repr(value)``, shortened where a value is long or deeply nested, for error messages."""
    try:
        return _short.repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return f"<{type(value).__name__} of thousands of digits>"


def printable(name: str) -> str:
    """Return a key, shortened if it is long, and quoted if it contains line breaks or control characters."""
    name = shortened(name, MAX_SHOWN)
    return name if name.isprintable() else repr(name)


class Section(BaseModel):
    """Base of all sections: immutable, without unknown keys, each field documented by the string below it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, values: Any) -> Any:
        """Read an empty section (``run:`` without keys is null in YAML) as one with all defaults."""
        return {} if values is None else values


def _wrong(expected: str) -> PydanticCustomError:
    return PydanticCustomError(WRONG_TYPE, "must be {expected}", {"expected": expected})


def _parsed(text: str) -> float:
    """Return the number in a text, an integer exactly.

    Raises:
        ValueError: it is not a number, or has spaces or other digits than those of ASCII.
    """
    if not text.isascii() or text != text.strip():
        raise ValueError
    try:
        return int(text)
    except ValueError:
        return float(text)


def _number(value: Any) -> float:
    if isinstance(value, str):
        try:
            value = _parsed(value)
        except ValueError:
            raise _wrong("a number") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise _wrong("a finite number")
    return float(value)


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise _wrong("an integer")
    if isinstance(value, str):
        try:
            value = _parsed(value)
        except ValueError:
            raise _wrong("an integer") from None
    if isinstance(value, float) and not value.is_integer():  # NaN and Inf are not integers either
        raise _wrong("an integer")
    whole = int(value)
    if whole.bit_length() > MAX_BITS:
        raise _wrong(f"an integer of at most {MAX_BITS} bits")
    return whole


def _class_count(value: Any) -> int:
    if value == "auto":
        return AUTO_CLASSES
    try:
        count = _integer(value)
    except PydanticCustomError:
        count = 0
    if not 1 <= count <= MAX_CLASSES:
        raise _wrong(f'"auto" or an integer from 1 to {MAX_CLASSES:,}')
    return count


def _steps(value: Any) -> int | str:
    expected = 'a step, such as 20, or a range of steps, such as "20-24"'
    if isinstance(value, str) and (found := re.fullmatch(r"([0-9]{1,18})-([0-9]{1,18})", value)):
        if not 0 < int(found[1]) <= int(found[2]):
            raise _wrong(expected)
        return value
    try:
        step = _integer(value)
    except PydanticCustomError:
        raise _wrong(expected) from None
    if step < 0:
        raise _wrong(expected)
    return step


def _text_encoders(value: Any) -> tuple[tuple[int, int, int], ...]:
    expected = f'"auto" or a list of 1 to {MAX_ENCODERS} entries [tokens, width, pooled width]'
    if value == "auto":
        return AUTO_TEXT
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= MAX_ENCODERS:
        raise _wrong(expected)
    shapes = []
    for entry in value:
        if not isinstance(entry, (list, tuple)) or len(entry) != 3:
            raise _wrong(expected)
        tokens, width, pooled = map(_integer, entry)
        if not (1 <= tokens <= MAX_TOKENS and 1 <= width <= MAX_WIDTH and 1 <= pooled <= MAX_WIDTH):
            raise _wrong(f"{expected}, with at most {MAX_TOKENS:,} tokens and widths of at most {MAX_WIDTH:,}")
        shapes.append((tokens, width, pooled))
    return tuple(shapes)


def _feature_shape(value: Any) -> tuple[int, ...]:
    expected = f'"auto" or a list of 2 integers, at most {MAX_GRID} and {MAX_WIDTH:,}'
    if value == "auto":
        return AUTO_FEATURES
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise _wrong(expected)
    side, width = map(_integer, value)
    if not (1 <= side <= MAX_GRID and 1 <= width <= MAX_WIDTH):
        raise _wrong(expected)
    return side, width


def _pair(value: Any) -> Any:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise _wrong("a list of 2 numbers")
    return value


def _names(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise _wrong("a list of names")
    return value


def _one_or_more(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, (list, tuple)):
        raise _wrong("a string or a list of strings")
    return value


def _mapping(value: Any) -> Any:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong("a section with keys")
    if not all(isinstance(key, str) for key in value):
        raise _wrong("a section whose keys are strings")
    return value


def router(value: Any) -> Any:
    """Return the full name of a router that is given by a short one."""
    return ROUTERS.get(value, value) if isinstance(value, str) else value


def _model_name(value: str) -> str:
    parse_name(value)
    return value


# The range precedes the validator, so that pydantic includes it in the JSON schema.
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict()]
Integer = Annotated[int, BeforeValidator(_integer)]
PositiveInteger = Annotated[int, Field(gt=0), BeforeValidator(_integer)]
# A number beyond these ranges is a mistake or an attack: it would fill the memory, or take forever.
Dimension = Annotated[int, Field(gt=0, le=65_536), BeforeValidator(_integer)]
Count = Annotated[int, Field(gt=0, le=512), BeforeValidator(_integer)]
SmallInteger = Annotated[int, Field(ge=0, le=1_024), BeforeValidator(_integer)]
SamplerSteps = Annotated[int, Field(gt=0, le=100_000), BeforeValidator(_integer)]
GeneratedImages = Annotated[int, Field(gt=0, le=10_000_000), BeforeValidator(_integer)]
Gigabytes = Annotated[float, Field(gt=0, le=MAX_CACHE_GB), BeforeValidator(_number)]
Seconds = Annotated[float, Field(gt=0, le=1e6), BeforeValidator(_number)]
NonNegativeInteger = Annotated[int, Field(ge=0), BeforeValidator(_integer)]
Seed = Annotated[int, Field(ge=0, lt=2**64), BeforeValidator(_integer)]
Number = Annotated[float, BeforeValidator(_number)]
PositiveNumber = Annotated[float, Field(gt=0), BeforeValidator(_number)]
NonNegativeNumber = Annotated[float, Field(ge=0), BeforeValidator(_number)]
Slack = Annotated[float, Field(ge=1), BeforeValidator(_number)]
Fraction = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number)]
LearningRate = Annotated[float, Field(gt=0, le=3e38), BeforeValidator(_number)]  # the optimizer stores it as float32
Betas = Annotated[tuple[Fraction, Fraction], BeforeValidator(_pair)]
Metrics = Annotated[
    tuple[Literal["frechet", "kid", "inception_score", "precision", "recall"], ...], BeforeValidator(_names)
]
Texts = Annotated[
    tuple[Text, ...],
    BeforeValidator(_one_or_more),
    WithJsonSchema({"type": ["array", "string"], "items": {"type": "string"}}),
]
ClassCount = Annotated[
    int,
    BeforeValidator(_class_count),
    PlainSerializer(lambda count: "auto" if count == AUTO_CLASSES else count, return_type=int | str),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1, "maximum": MAX_CLASSES}, {"const": "auto", "type": "string"}]}
    ),
]
TextEncoders = Annotated[
    tuple[tuple[int, int, int], ...],
    BeforeValidator(_text_encoders),
    PlainSerializer(lambda shapes: "auto" if shapes == AUTO_TEXT else shapes, return_type=Any),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "array",
                    "items": {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 3},
                    "minItems": 1,
                    "maxItems": MAX_ENCODERS,
                },
                {"const": "auto", "type": "string"},
            ]
        }
    ),
]
FeatureShape = Annotated[
    tuple[int, ...],
    BeforeValidator(_feature_shape),
    PlainSerializer(lambda shape: "auto" if shape == AUTO_FEATURES else shape, return_type=Any),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
                {"const": "auto", "type": "string"},
            ]
        }
    ),
]
Steps = Annotated[
    int | str,
    BeforeValidator(_steps),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^0*[1-9][0-9]*-0*[1-9][0-9]*$"}]}
    ),
]
Mapping = Annotated[dict[str, Any], BeforeValidator(_mapping)]
ModelName = Annotated[
    Text,
    AfterValidator(_model_name),
    WithJsonSchema({"type": "string", "enum": [*NAMES, *(f"Dense-{size}" for size in SIZES)]}),
]
