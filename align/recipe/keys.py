"""The keys of a recipe with their defaults and descriptions, as the command line shows them."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from align.errors import UserError, nearest
from align.recipe.load import section_in
from align.recipe.recipes import STAGES

WIDTH = 110
COLUMN = 42
"""Where descriptions begin."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key by its dotted path, such as learner.optimizer.betas; one that holds other keys is a section.

    `default` is YAML, empty where there is none to show; `choices` are all values that are allowed, where they are few.
    """

    path: str
    description: str
    is_section: bool
    is_required: bool
    default: str
    choices: Sequence[str] = ()

    @property
    def section(self) -> str:
        """The path of the section that the key is in; empty at the top."""
        return self.path.rpartition(".")[0]


def stage_text(stage: str) -> str:
    """Every key of a stage's recipe, section by section."""
    return _text([(key, ()) for key in keys_of(stage)])


def prefix_text(prefix: str) -> str:
    """The keys of all stages that begin with `prefix`, each section with the stages that have it.

    Raises UserError where there are none.
    """
    stages: dict[Key, list[str]] = {}
    for stage in STAGES:
        for key in keys_of(stage):
            stages.setdefault(key, []).append(stage)
    found = _by_section(key for key in stages if f"{key.path}{'.' * key.is_section}".startswith(prefix))
    if not found:
        paths = [key.path for key in stages]
        raise UserError(f"no key begins with {prefix!r}{nearest(prefix, paths)}; `align keys` lists all")
    return _text([(key, () if len(stages[key]) == len(STAGES) else stages[key]) for key in found])


def keys_of(stage: str) -> list[Key]:
    """The keys that have an effect in a stage, section by section."""
    recipe = STAGES[stage]
    return _by_section(key for key in _keys_in(recipe, "") if key.path not in recipe.no_effect)


def _by_section(keys: Iterable[Key]) -> list[Key]:
    """First the keys at the top, then each section with what is in it, in the order in which the sections come."""
    sections: dict[str, list[Key]] = {"": []}
    for key in keys:
        sections.setdefault(key.path if key.is_section else key.section, []).append(key)
    return [key for section in sections.values() for key in section]


def _keys_in(options: type[BaseModel], at: str) -> Iterator[Key]:
    for name, field in options.model_fields.items():
        inner = section_in(field.annotation)
        yield Key(
            path=at + name,
            description=field.description or (_first_paragraph(inner) if inner else ""),
            is_section=inner is not None,
            is_required=field.is_required(),
            default="" if inner or field.is_required() else _as_yaml(field),
            choices=_choices(field.annotation),
        )
        if inner is not None:
            yield from _keys_in(inner, f"{at}{name}.")


def _first_paragraph(options: type[BaseModel]) -> str:
    return " ".join((options.__doc__ or "").partition("\n\n")[0].split())


def _choices(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) is Literal and len(get_args(annotation)) > 1:
        return tuple(str(choice) for choice in get_args(annotation))
    return ()


def _as_yaml(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None:
        return ""
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _text(keys: Sequence[tuple[Key, Sequence[str]]]) -> str:
    """Lines of at most WIDTH characters; a section begins with its name and description, and with the stages where any are given."""
    lines: list[str] = []
    section: str = ""
    everywhere: tuple[str, ...] = ()
    for key, stages in keys:
        note = f" [{', '.join(stages)}]" if stages and (key.is_section or tuple(stages) != everywhere) else ""
        if key.is_section:
            section, everywhere = key.path, tuple(stages)
            title = f"{key.path}{' (required)' if key.is_required else ''}{note}: {key.description}"
            lines += ["", *textwrap.wrap(title, WIDTH, subsequent_indent="    ")]
            continue
        if key.section != section:
            section, everywhere = key.section, ()
            lines += ["", f"{section}:"]
        left = f"  {key.path}" + (" (required)" if key.is_required else f" = {key.default}" if key.default else "")
        choices = f" ({' | '.join(key.choices)})" if key.choices else ""
        right = textwrap.wrap(f"{key.description}{choices}{note}", WIDTH - COLUMN)
        if len(left) >= COLUMN - 1:
            lines.append(left)
            left = ""
        lines += [f"{start:<{COLUMN}}{line}" for start, line in zip([left, *[""] * len(right)], right, strict=False)]
    return "\n".join(lines).strip("\n")
