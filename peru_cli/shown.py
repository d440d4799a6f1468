"""Make text from files safe to show: no control sequences or markup, no passwords, no megabytes.

Names, labels and metadata come from strangers' files, and messages of libraries quote addresses with passwords in them.
Everything that peru prints or writes for people to read (cards, reports) goes through here."""

from __future__ import annotations

import html as _html
import os
import re
from collections.abc import Iterable, Sequence
from urllib.parse import unquote

LONGEST_NAME = 200  # characters of one name in a message
MOST_NAMES = 10  # in one message
_LONGEST_PART = 255  # of a path: the limit of file systems
_LONGEST_LINE = 5000  # longer than the longest path

# Unicode's control (Cc), format (Cf: text direction, zero-width and soft characters), surrogate (Cs) and separator (Zl, Zp)
# characters, except the Arabic and Syriac number signs, which are visible.
_INVISIBLE = (
    "\x7f-\x9f\xad\u061c\u070f\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0001\U000e0020-\U000e007f"
)
_CONTROL = re.compile(f"[\x00-\x1f{_INVISIBLE}]")
_CONTROL_IN_JSON = re.compile(f"[{_INVISIBLE}]")  # json.dumps has escaped the others
_OWN_LINE = re.compile(r"\n(?=  |\n|$)")  # messages continue in indented lines, so a newline in a name cannot start a line of its own

_LONG_RUN = re.compile(rf"\S{{{LONGEST_NAME + 1},}}")
_USER = re.compile(r"(?<=://)[^\s/?#\"'<>]+@")
_SIGNED = re.compile(r"(?i)([?&](?:[\w-]*signature|[\w-]*token|[\w-]*credential|key-pair-id|policy)=)[^\s&\"'<>]+")
_BEARER = re.compile(r"(?i)\bbearer\s+[\w.~+/=-]{8,}")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
_ADDRESS_VARIABLE = re.compile(r"(?i).*_(proxy|endpoint|url)")


def _spelt(character: re.Match[str]) -> str:
    code = ord(character.group())
    if code in (9, 10, 13):
        return {9: "\\t", 10: "\\n", 13: "\\r"}[code]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def printable(text: str) -> str:
    """One line of text with control characters escaped: `\\x1b`, `\\u202e`, `\\n`."""
    return text if text.isascii() and text.isprintable() else _CONTROL.sub(_spelt, text)


def printable_json(text: str) -> str:
    """Equivalent JSON with such characters escaped as JSON does."""
    if text.isascii():
        return _CONTROL_IN_JSON.sub(lambda found: f"\\u{ord(found.group()):04x}", text)

    def spelt(found: re.Match[str]) -> str:
        units = found.group().encode("utf-16-be", "surrogatepass")
        return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))

    return _CONTROL_IN_JSON.sub(spelt, text)


def secrets() -> list[str]:
    """Passwords and tokens in the environment, also in quoted form, longest first."""
    found = {os.environ.get(name, "") for name in _SECRET_VARIABLES}
    for name, value in os.environ.items():
        if _ADDRESS_VARIABLE.fullmatch(name) and "@" in value:
            user = value.rpartition("@")[0].rpartition("://")[2]
            found |= {user, user.partition(":")[2]}
    found |= {unquote(secret) for secret in found}
    return sorted((secret for secret in found if len(secret) >= 4), key=len, reverse=True)


def masked(text: str, known: Sequence[str] | None = None) -> str:
    """Text without passwords in addresses, tokens and signatures: `http://***@proxy:3128`.

    `known` is what `secrets` returns, for those who mask many lines."""
    text = _USER.sub("***@", text)
    for secret in secrets() if known is None else known:
        text = text.replace(secret, "***")
    text = _BEARER.sub("Bearer ***", _SIGNED.sub(r"\1***", text))
    return _TOKEN.sub("hf_***", text)


def cut(text: str, longest: int = LONGEST_NAME) -> str:
    """Text of at most `longest` characters: longer text is cut to its beginning and its length."""
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text):,} characters)"


def listed(names: Iterable[str], most: int = MOST_NAMES, separator: str = ", ") -> str:
    """The first names of a list, each cut, and how many more there are."""
    all_names = list(names)
    more = [f"... ({len(all_names):,} in all)"] if len(all_names) > most else []
    return separator.join([*(cut(name) for name in all_names[:most]), *more])


def _cut_run(found: re.Match[str]) -> str:
    run = found.group()
    if "/" not in run and "\\" not in run:
        return cut(run)
    return "".join(cut(part, _LONGEST_PART) for part in re.split(r"([/\\])", run))


def message(text: str) -> str:
    """A message for the terminal. Only indented continuation lines keep their line breaks."""
    lines = [cut(_LONG_RUN.sub(_cut_run, line), _LONGEST_LINE) for line in _OWN_LINE.split(masked(text))]
    return "\n".join(printable(line) for line in lines)


def lines(text: str) -> str:
    """Text of several lines that peru wrote (a traceback), each made printable."""
    return "\n".join(printable(line) for line in masked(text).split("\n"))


def html(text: str) -> str:
    """Text for HTML and SVG."""
    return _html.escape(printable(masked(text)))


def markdown(text: str) -> str:
    """Text for a Markdown table cell, or between backticks."""
    return printable(text).replace("`", "'").replace("|", "\\|").replace("<", "&lt;")
