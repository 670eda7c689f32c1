"""Text that a model or a file wrote, made harmless for where it goes, and numbers as a reader likes them."""

import html
import json
import math
import re
from typing import Any

from align.run.progress import compact

# An underscore inside a word is no markup, and reads better bare.
MARKDOWN_PUNCTUATION = re.compile(r"([\\`*\[\]<>|~$&#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")


def for_html(value: object) -> str:
    """`value` as the text of an element or of a quoted attribute."""
    return html.escape(str(value), quote=True)


def for_script(data: Any) -> str:
    """`data` as JSON for a <script type="application/json">: none of its text can end the element or open a comment."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def for_markdown(value: object) -> str:
    """`value` as plain text in one cell of a Markdown table: no markup, no link, no image, no line break."""
    return MARKDOWN_PUNCTUATION.sub(r"\\\1", " ".join(str(value).split()))


def percent(value: float) -> str:
    """A share of 1 in percent."""
    return f"{value:.1%}" if math.isfinite(value) else "–"


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return signed(100 * value, ".1f")


def signed(value: float, form: str) -> str:
    """A difference with its sign, a true minus; zero has none."""
    text = f"{abs(value):{form}}"
    return text if float(text) == 0 else f"{'+' if value > 0 else '−'}{text}"


def plain(value: float) -> str:
    """Any other number in a few digits."""
    return compact(value) if math.isfinite(value) else "–"
