"""The keys of recipes, found in their options without the code that shows them."""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel


def keys_of(section: type[BaseModel], at: str = "") -> Iterator[tuple[str, type[BaseModel], str]]:
    """(key, section, field) of every key below a section."""
    for name, field in section.model_fields.items():
        yield at + name, section, name
        for inner in sections_in(field.annotation):
            yield from keys_of(inner, f"{at}{name}.")


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from sections_in(argument)
