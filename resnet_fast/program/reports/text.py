"""Text of any origin, fit to be shown: messages of libraries in one line, and names of files and classes of any bytes.

Names that are not UTF-8 are strings with surrogates, as :func:`os.fsdecode` makes them. Only what shows them changes
them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

__all__ = ["chart_labels", "one_line", "printable"]

# Used where they are installed: the font that comes with matplotlib has Latin, Greek, Cyrillic and Arabic letters.
_MORE_FONTS = (
    "Noto Sans CJK JP",
    "Source Han Sans",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "Hiragino Sans",
    "PingFang SC",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Arial Unicode MS",
)
_LONGEST = 40  # characters; a name may have 255, a chart would be all margin


def one_line(error: BaseException) -> str:
    """What the exception says, or its type, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(text: str) -> str:
    """``text`` as standard output can take it: characters that its encoding lacks are escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def chart_labels(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Labels for matplotlib, with ``parse_math=False``, and the font families that draw them.

    What no installed font has, is escaped: boxes would not tell one class from another.
    """
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    families = ["DejaVu Sans", *(family for family in _MORE_FONTS if family in installed)]
    fonts = [font_manager.get_font(font_manager.findfont(family)) for family in families]

    def shown(character: str) -> str:
        if character.isprintable() and any(font.get_char_index(ord(character)) for font in fonts):
            return character
        return character.encode("ascii", "backslashreplace").decode() if ord(character) > 127 else repr(character)[1:-1]

    labels = ("".join(map(shown, name)) for name in names)
    return [label if len(label) <= _LONGEST else f"{label[: _LONGEST - 1]}…" for label in labels], families
