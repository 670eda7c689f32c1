"""Which characters of a rendered chat template were written by whom: the template, an assistant, or anybody else.

The template is rendered with every character of a content replaced by a private one, so that whatever the template does
to a content, its characters stay known. The strings that hold them answer the template's questions (`'</think>' in
content`, `content.split(...)`, `content | trim`) as the real text would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

TEMPLATE, ASSISTANT, OTHERS = "template", "assistant", "others"
# The private planes of Unicode; a character of an assistant has an odd place in them, one of somebody else an even one.
_PRIVATE = 0xF0000


def render_with_authors(
    template: str, messages: Sequence[Mapping[str, Any]], **variables: Any
) -> tuple[str, Callable[[int], str]]:
    """The rendering, and a function from the place of a character that is no white space in it to its author.

    `variables` are what the template sees beside the messages. A template whose questions are not answered as they should
    be gives another rendering than for the plain messages, so compare the two. Raises what the template raises.
    """
    characters = sorted({c for message in messages for c in message["content"] if not c.isspace()})
    codes = {ord(c): _PRIVATE + 2 * place for place, c in enumerate(characters)}
    others = codes
    assistants = {character: code + 1 for character, code in codes.items()}
    plain = {code + odd: character for character, code in codes.items() for odd in (0, 1)}
    kind = type("Marked", (_Marked,), {"codes": plain})
    marked = [
        dict(message)
        | {"content": kind(message["content"].translate(assistants if message["role"] == "assistant" else others))}
        for message in messages
    ]
    rendered = str.__str__(_compiled(template).render(**{"tools": None} | variables, messages=marked, documents=None))

    def author(place: int) -> str:
        code = ord(rendered[place])
        return TEMPLATE if code < _PRIVATE else ASSISTANT if code % 2 else OTHERS

    return rendered.translate(plain), author


class _Marked(str):
    """Text with private characters that is compared, searched and split as the text for which they stand."""

    __slots__ = ()
    codes: Mapping[int, int]

    def __str__(self) -> str:
        return self

    def __hash__(self) -> int:
        return hash(self.translate(self.codes))

    def __add__(self, other: str) -> str:
        return type(self)(str.__add__(self, other))

    def __radd__(self, other: str) -> str:
        return type(self)(str.__add__(other, self))

    def __getitem__(self, key: Any) -> str:
        return type(self)(str.__getitem__(self, key))

    def replace(self, old: str, new: str, count: Any = -1) -> str:
        return type(self)(new.join(self.split(old, count)))


def _plain(method: Callable[..., Any], text: _Marked, args: Iterable[Any]) -> Any:
    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(plain, value))
        return value.translate(text.codes) if isinstance(value, str) else value

    return method(plain(text), *map(plain, args))


def _answers(method: Callable[..., Any]) -> Callable[..., Any]:
    def answer(self: _Marked, *args: Any) -> Any:
        return _plain(method, self, args)

    return answer


def _cuts(method: Callable[..., Any], *, drops_separator: bool = False) -> Callable[..., Any]:
    """A method that returns parts of the text in their order, found again in the marked text."""

    def cut(self: _Marked, *args: Any) -> Any:
        found = _plain(method, self, args)
        separator = len(args[0]) if drops_separator and args and args[0] is not None else 0
        text, end, parts = self.translate(self.codes), -separator, []
        for part in [found] if isinstance(found, str) else found:
            start = text.index(part, end + separator)
            end = start + len(part)
            parts.append(self[start:end])
        return parts[0] if isinstance(found, str) else type(found)(parts)

    return cut


for _name in ("__contains__", "__eq__", "__ne__", "startswith", "endswith", "find", "rfind", "index", "count"):
    setattr(_Marked, _name, _answers(getattr(str, _name)))
for _name in ("strip", "lstrip", "rstrip", "partition", "rpartition", "splitlines"):
    setattr(_Marked, _name, _cuts(getattr(str, _name)))
for _name in ("split", "rsplit"):
    setattr(_Marked, _name, _cuts(getattr(str, _name), drops_separator=True))


@lru_cache(maxsize=32)
def _compiled(template: str) -> Any:
    """The template, compiled as transformers does, in an environment that joins marked texts to marked texts."""
    from jinja2.compiler import CodeGenerator
    from transformers.utils.chat_template_utils import _compile_jinja_template

    class Generator(CodeGenerator):
        def visit_Concat(self, node: Any, frame: Any) -> None:  # noqa: N802
            self.write("environment.concat([")
            for operand in node.nodes:
                self.write("str(")
                self.visit(operand, frame)
                self.write("), ")
            self.write("])")

    environment = _compile_jinja_template(template).environment.overlay()
    environment.code_generator_class = Generator
    environment.concat = _concat
    return environment.from_string(template)


def _concat(parts: Iterable[str]) -> str:
    parts = list(parts)
    kind = next((type(part) for part in parts if isinstance(part, _Marked)), str)
    return kind("".join(parts))
