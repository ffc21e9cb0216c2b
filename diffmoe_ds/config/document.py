"""``docs/configuration.md``, generated from the schema."""

from __future__ import annotations

from typing import Any

import yaml

from diffmoe_ds.config.deepspeed_keys import KEYS, Value
from diffmoe_ds.config.load import recipes
from diffmoe_ds.config.reference import Key, SectionKeys, sections

LISTED_CHOICES = 10
"""Maximum number of valid values that are listed; there are more model names than this."""
REGENERATE = "diffmoe config --markdown > docs/configuration.md"

HEADER = f"""\
<!-- Generated. Do not edit: change the docstrings in diffmoe_ds/config/sections.py, then run
     {REGENERATE} -->
# Configuration

A run is configured in three places:

| place | defines | example |
|---|---|---|
| recipe, `--config NAME_OR_FILE` | model, routing, objective, data, run length, checkpoints | `--config imagenet-256` |
| `--set SECTION.KEY=VALUE ...` | individual keys of the recipe; values are YAML | `--set run.seed=3 ema.decay=0.999` |
| DeepSpeed JSON | batch sizes, precision, ZeRO, schedule, expert-parallel size | `--deepspeed_config FILE` |

A recipe is a YAML file with the sections below; omitted keys take their defaults. With `base: NAME_OR_FILE` at the top,
they take the values of that recipe instead. A file is relative to the recipe that names it. Packaged recipes:
RECIPES.

Every run writes its complete configuration to `resolved.yaml` in the run directory, and `--config` accepts that file.
Unknown keys, wrong types and values out of range are rejected before training starts; the message names the nearest
valid key or the valid values.

The DeepSpeed JSON is DeepSpeed's own format. Without `--deepspeed_config`, the `deepspeed` section of the recipe is
used; otherwise, that section is ignored. `"auto"` resolves to the recipe's value, to a value derived from the number of
ranks and the device, or to DeepSpeed's default. Optimizer values in the JSON take precedence over the recipe's. The
startup banner prints every resolved value.

The same information on the command line:

```bash
diffmoe config                          # all keys
diffmoe config routing                  # one section
diffmoe config routing.kind             # one key
diffmoe config --recipe imagenet-256    # values of a recipe; differences from the defaults are marked
diffmoe config --json-schema > recipe.schema.json
```

Editors with a YAML language server complete and validate recipes whose first line is
`# yaml-language-server: $schema=recipe.schema.json`.

Numbers may be written as `1e5` or `1e-4`, although YAML 1.1 reads those as text. `null` stands for "not set".
"""


def markdown() -> str:
    """Return ``docs/configuration.md``."""
    names = ", ".join(f"`{name}`" for name in recipes())
    parts = [HEADER.replace("RECIPES", names)]
    for section in sections().values():
        parts.append(_deepspeed(section) if section.name == "deepspeed" else _section(section))
    return "\n".join(parts)


def as_yaml(value: Any) -> str:
    """Return a key's value as one line of YAML."""
    return str(yaml.safe_dump(value, default_flow_style=True, width=10_000)).split("\n")[0]


def valid_values(key: Key, separator: str = " | ", quote: str = "") -> str:
    """Return the valid values of a key in words: all of them, or their type and range."""
    if 0 < len(key.choices) <= LISTED_CHOICES:
        return separator.join(f"{quote}{choice}{quote}" for choice in key.choices)
    if key.range in ("positive", "non-negative"):
        return f"{key.range} {key.type}"
    return f"{key.type}, {key.range}" if key.range else key.type


def deepspeed_keys(keys: dict[str, Any] = KEYS, where: str = "") -> list[tuple[str, str]]:
    """Return each key of the DeepSpeed JSON with its valid values in words."""
    found = []
    for key, rule in keys.items():
        if isinstance(rule, Value):
            found.append((where + key, rule.in_words))
        else:
            found += deepspeed_keys(rule, f"{where}{key}.")
    return found


def _section(section: SectionKeys) -> str:
    rows = []
    for key in section.keys:
        short, valid = key.name.partition(".")[2], valid_values(key, ", ", "`")
        rows.append(f"| `{short}` | {valid} | `{as_yaml(key.default)}` | {key.meaning} |")
    head = "| key | valid values | default | meaning |\n|---|---|---|---|"
    return "\n".join([f"## {section.name}", "", section.meaning, "", head, *rows, ""])


def _deepspeed(section: SectionKeys) -> str:
    rows = [f"| `{name}` | {valid} |" for name, valid in deepspeed_keys()]
    text = (
        f"{section.meaning} The [DeepSpeed documentation](https://www.deepspeed.ai/docs/config-json/) explains the "
        "keys. These are supported, here and in the JSON:"
    )
    return "\n".join([f"## {section.name}", "", text, "", "| key | valid values |\n|---|---|", *rows, ""])
