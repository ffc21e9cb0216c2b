"""``diffmoe config``: document the keys of a recipe and show the values of one."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap

import yaml

from diffmoe_ds.config.document import as_yaml, deepspeed_keys, markdown, valid_values
from diffmoe_ds.config.json_schema import recipe_schema
from diffmoe_ds.config.load import config_to_dict, load_config
from diffmoe_ds.config.nearest import unknown
from diffmoe_ds.config.reference import SectionKeys, keys_named, sections
from diffmoe_ds.errors import ConfigError

EXAMPLES = """examples:
  diffmoe config                        # all keys with type, default and meaning
  diffmoe config routing                # one section
  diffmoe config routing.kind           # one key
  diffmoe config --recipe imagenet-256  # values of a recipe, marked where they differ from the default
  diffmoe config --json-schema > recipe.schema.json
"""
MAX_WIDTH = 100
"""Characters per line, on terminals at least that wide."""


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``diffmoe config``."""
    parser.add_argument("key", nargs="?", metavar="SECTION[.KEY]", help="show only this section or key")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--recipe", metavar="NAME|FILE", help="show the values of a packaged recipe or a YAML file")
    choice.add_argument("--json-schema", action="store_true", help="print the JSON schema (draft 2020-12) of recipes")
    choice.add_argument("--markdown", action="store_true", help="print docs/configuration.md")


def config_command(args: argparse.Namespace) -> None:
    """Run ``diffmoe config``.

    Raises:
        ConfigError: an unknown section, key or recipe, or a recipe that is invalid.
    """
    if args.key and (args.json_schema or args.markdown):
        option = "--json-schema" if args.json_schema else "--markdown"
        raise ConfigError(f"{option} prints all sections; remove {args.key!r}.")
    if args.json_schema:
        text = json.dumps(recipe_schema(), indent=2)
    elif args.markdown:
        text = markdown()
    elif args.recipe:
        text = _recipe(args.recipe, _select(args.key))
    else:
        text = "\n\n".join(_describe(section) for section in _select(args.key))
    print(text.rstrip(), flush=True)


def _select(key: str | None) -> list[SectionKeys]:
    """Return the sections to show, reduced to the keys to show."""
    known = sections()
    if key is None:
        return list(known.values())
    name, dot, _ = key.partition(".")
    if name not in known:
        same = keys_named(key)
        if same:
            raise ConfigError(f"{key!r} is the name of a key, not of a section; try {' or '.join(same)}.")
        raise ConfigError(unknown("section", name, known))
    section = known[name]
    if not dot:
        return [section]
    keys = {found.name: found for found in section.keys}
    if key not in keys:
        raise ConfigError(unknown("key", key, keys) if keys else f"{key!r} is not a key; see diffmoe config {name}.")
    return [SectionKeys(name, section.meaning, (keys[key],))]


def _describe(section: SectionKeys) -> str:
    width = min(shutil.get_terminal_size().columns, MAX_WIDTH)
    wrap = textwrap.TextWrapper(width, break_on_hyphens=False, break_long_words=False)
    lines = wrap.wrap(f"{section.name}: {section.meaning}")
    wrap.initial_indent = wrap.subsequent_indent = " " * 6
    for key in section.keys:
        lines += ["", f"  {key.name}: {valid_values(key)}; default {as_yaml(key.default)}"]
        lines += wrap.wrap(key.meaning)
    if not section.keys:
        lines += ["", *(f"  {name}: {valid}" for name, valid in deepspeed_keys())]
    return "\n".join(lines)


def _recipe(name: str, shown: list[SectionKeys]) -> str:
    """Return the values of a recipe as YAML; a comment gives the default of each value that differs from it."""
    values = config_to_dict(load_config(name))
    lines = []
    for section in shown:
        lines.append(f"{section.name}:")
        for key in section.keys:
            short = key.name.partition(".")[2]
            value = values[section.name][short]
            mark = "" if value == key.default else f"  # default: {as_yaml(key.default)}"
            lines.append(f"  {short}: {as_yaml(value)}{mark}")
        if not section.keys and values[section.name]:
            text = yaml.safe_dump(values[section.name], default_flow_style=None, sort_keys=False)
            lines.append(textwrap.indent(text.rstrip(), "  "))
    return "\n".join(lines)
