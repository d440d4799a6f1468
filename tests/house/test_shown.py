"""Displayed text of strangers: nothing that a terminal or a browser interprets, no passwords, no megabytes."""

from __future__ import annotations

import json
import sys
import unicodedata

from peru_cli import shown

OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
VISIBLE = {*range(0x600, 0x606), 0x6DD, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD}  # number signs of Arabic, Syriac and Kaithi


def test_every_control_or_format_character_is_escaped() -> None:
    """According to Python's own tables."""
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if unicodedata.category(character) in OBEYED and code not in VISIBLE:
            spelt = shown.printable(character)
            assert spelt != character and spelt.isprintable(), hex(code)
            assert json.loads(shown.printable_json(json.dumps(character, ensure_ascii=False))) == character
    assert shown.printable("Grüße, 世界 🎉 a\x1b[31m\u202e\n") == "Grüße, 世界 🎉 a\\x1b[31m\\u202e\\n"


def test_json_keeps_its_meaning_and_its_lines() -> None:
    value = {"a\u2028": ["\u202eabc", "\x7f\x9b", "\U000e0041", "é"]}
    text = shown.printable_json(json.dumps(value, indent=2, ensure_ascii=False))
    assert json.loads(text) == value and text.count("\n") > 3 and "é" in text
    assert all(line.isprintable() for line in text.split("\n"))


def test_a_name_cannot_start_a_new_line() -> None:
    assert shown.message("a: evil\nerror: gone\n  a hint") == "a: evil\\nerror: gone\n  a hint"


def test_passwords_tokens_and_signatures_are_masked(monkeypatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:s3cr/et@proxy:3128")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrst")
    for text in (
        "cannot reach https://user:p%40ss@host/path (x)",
        "https://token@host",
        "proxy http://me:s3cr/et@proxy:3128 and s3cr/et alone",
        "Authorization: Bearer abcdefgh12345 hf_abcdefghijklmnopqrst hf_ABCDEFGHIJKLMNOPQRSTUV",
        "https://cdn/x?X-Amz-Signature=deadbeef&X-Amz-Credential=AKIA&a=1",
    ):
        found = shown.masked(text)
        for secret in ("p%40ss", "token@", "s3cr", "abcdefgh", "ABCDEFGH", "deadbeef", "AKIA"):
            assert secret not in found, found
    assert shown.masked("hf://org/name@main/file https://hf.co/a@b user@host") == "hf://org/name@main/file https://hf.co/a@b user@host"


def test_names_are_cut_with_their_length_and_lists_at_ten() -> None:
    long = "n" * 10_000_000
    found = shown.message(f"no tensor {long} here")
    assert len(found) < 300 and "(10,000,000 characters)" in found
    assert len(shown.message("a b " * 1_000_000)) < 6000
    path = "/".join(["folder" * 10] * 40)
    assert shown.message(f"wrote {path}/x.safetensors") == f"wrote {path}/x.safetensors"
    many = shown.listed(f"t{i}" for i in range(100_000))
    assert many.startswith("t0, t1, ") and "t9, ..." in many and "t10" not in many and "(100,000 in all)" in many
    assert shown.listed(["a", "b"]) == "a, b"


def test_html_and_markdown_show_names_as_they_are() -> None:
    assert shown.html("<b>\u202e&") == "&lt;b&gt;\\u202e&amp;"
    assert shown.markdown("a`b|c<d\n") == "a'b\\|c&lt;d\\n"
