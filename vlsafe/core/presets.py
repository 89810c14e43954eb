"""The scales by name, from `core/scales/`: mini is built from nothing, pocket takes its parts from packages, small and
paper load models and corpora.

A scale file is YAML: fields by name, nested ones likewise, beside `extends`, the scale whose other numbers it keeps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from vlsafe.core.scale import Scale, alike, as_plain, extended, known
from vlsafe.core.schema import MEDIAN_SEED

FOLDER = Path(__file__).parent / "scales"


class _Loader(yaml.SafeLoader):
    """YAML whose mappings hold every key once: the library lets the last one win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]  # before "<<" brings in others
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def mapping_at(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:   ValueError naming the file where it is no YAML, no mapping, no UTF-8, or has a key twice
    """
    try:
        value = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except UnicodeDecodeError:
        raise ValueError(f"{path} holds bytes that are no UTF-8; save it as UTF-8") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none is a ValueError
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a mapping: names, colons, values")
    return value


MINI: Scale = extended(Scale, {"name": "mini", **mapping_at(FOLDER / "mini.yaml")})
PAPER: Scale = extended(Scale, {"name": "paper", **mapping_at(FOLDER / "paper.yaml")})
SCALES: dict[str, Scale] = {"mini": MINI, "paper": PAPER}
USUAL_SEEDS = {"mini": MEDIAN_SEED}  # where none is named; 0 of others


def load_scale(name: str | Path) -> Scale:
    """A preset by name, or a YAML file `{extends: mini, name: …, field: value, …}` with nested fields likewise.

    Raises:   ValueError for an unknown name or key (with the nearest known one) or a value of the wrong type;
              FileNotFoundError for a path that does not exist
    """
    text = str(name)
    if not text.endswith((".yaml", ".yml")):
        return SCALES[known(text, SCALES, "scale")]
    if not Path(text).is_file():
        raise FileNotFoundError(f"there is no scale file {text!r}; a scale is such a file or one of {', '.join(sorted(SCALES))}")
    changes = mapping_at(Path(text))
    if "extends" not in changes:
        raise ValueError(f"{text} must be a mapping with the key 'extends' (one of {', '.join(sorted(SCALES))})")
    base = SCALES[known(changes.pop("extends"), SCALES, "scale")]
    scale = extended(base, {"name": Path(text).stem, **changes})
    if scale.name in SCALES and not alike(as_plain(scale), as_plain(SCALES[scale.name])):
        raise ValueError(f"{text} is named like the preset {scale.name!r} and has other numbers; give it another `name:`")
    for name in scale.backbones:
        scale.decoder(name)  # raises for a mistake in it
    return scale


SMALL = SCALES["small"] = load_scale(FOLDER / "small.yaml")
POCKET = SCALES["pocket"] = load_scale(FOLDER / "pocket.yaml")
