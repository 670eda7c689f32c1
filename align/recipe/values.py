"""Values as recipes, overrides and parameters write them: YAML, in which `1e-3` is a number too."""

import re
from collections.abc import Iterator
from math import isfinite
from typing import Any

import yaml


class _Yaml(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in version 1.2; to PyYAML only 1.0e-3 is."""


class _Dumper(yaml.SafeDumper):
    """What writes that YAML, and so quotes texts that are such numbers in it."""


for _kind in (_Yaml, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+\Z"), [*"-+0123456789"]
    )


def yaml_value(text: str) -> Any:
    """A value as recipes, overrides and parameters write it. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Yaml)


def yaml_text(value: Any, **form: Any) -> str:
    """The text of a value that `yaml_value` reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **form)


def not_in_json(value: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Where a recipe has what its run's files, whose values are those of JSON, would not give back as it is; and what is wrong with it."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                yield (
                    (*at, str(name)),
                    f"the key {name!r} is not text, and would be when the run is resumed: put it in quotes",
                )
            yield from not_in_json(item, (*at, str(name)))
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from not_in_json(item, (*at, str(place)))
    elif not isinstance(value, str | int | float | None):
        yield at, f"{value} is a {type(value).__name__}, and would be text when the run is resumed: put it in quotes"
    elif isinstance(value, float) and not isfinite(value) and "params" in at:
        yield at, f"{value} would be null when the run is resumed: give a number, or leave it out"
