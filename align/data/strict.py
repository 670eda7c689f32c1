"""Models that refuse what they do not know, and name the nearest thing they do."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Strict(BaseModel):
    """Refuses keys it does not have, and names the nearest one it has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for key in data if isinstance(data, Mapping) else ():
            if key not in known:
                raise ValueError(f"unknown key {key!r}{nearest(str(key), known)}")
        return data


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint that ends an error message about an unknown name."""
    found = get_close_matches(name, list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
