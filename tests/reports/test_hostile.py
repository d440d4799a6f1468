"""Labels, tensor names and file names of strangers in reports, plots, summaries and cards: text, never markup and never a command."""

from __future__ import annotations

import json
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peru_cli.publish.card import card, contents
from tests.support import data_family

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>' onmouseover=x <svg/onload=1></style>]]>--><!--`|[a](javascript:x)"
ALLOWED = ("#", "http://www.w3.org/", "http://creativecommons.org/ns#", "http://purl.org/dc/", "https://matplotlib.org/")


class Obeyed(HTMLParser):
    """What a browser would run or load: scripts, event handlers, foreign addresses."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "img", "image", "iframe", "object", "embed", "link", "base", "form", "foreignobject", "a"):
            self.found.append(tag)
        self.found += [f"{tag} {name}" for name, _ in attrs if name.startswith("on")]
        for name, value in attrs:
            if name.split(":")[-1] in ("href", "src", "srcset", "action", "data", "resource") and not (value or "#").startswith(ALLOWED):
                self.found.append(f"{tag} {name}={value}")
            if name == "style" and "url(" in (value or "").replace("url(#", ""):
                self.found.append(f"{tag} {name}={value}")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.filterwarnings("ignore")
def test_a_report_and_plots_of_hostile_names_hold_no_script_and_no_foreign_address(tmp_path: Path, peru) -> None:
    data_family.write_family(tmp_path, count=4)
    labels = [HOSTILE, 'LABEL"onload=1', "</title><script>x</script>"]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    for folder, name, value in (("base", HOSTILE, 1.0), ("a", f"bert.{HOSTILE}", 9.0)):
        path = tmp_path / folder / "model.safetensors"
        save_file(load_file(path) | {name: torch.full((40,), value)}, path, metadata={"format": "pt"})
    model = (tmp_path / "a").rename(tmp_path / HOSTILE.replace("/", "")[:120])
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    data = tmp_path / f"{HOSTILE.replace('/', '')[:90]}.jsonl"
    data.write_text("".join(json.dumps(row | {"label": labels[i % 3]}) + "\n" for i, row in enumerate(rows)))
    artifact, summary = tmp_path / f"{HOSTILE.replace('/', '')[:80]}.safetensors", tmp_path / "s.md"
    peru("prune", f"t={model}", "-b", tmp_path / "base", "--keep", "10%", "-o", artifact, "--no-sync", "--summary", summary)
    page, plot = tmp_path / "r.html", tmp_path / "p.svg"
    given = ["-b", tmp_path / "base", "--against", model, "--data", data, "--device", "cpu"]
    peru("eval", artifact, *given, "--report", page, "--plot", plot, "--summary", summary)
    peru("inspect", model, "-b", tmp_path / "base", "--plot", tmp_path / "i.svg", "--summary", summary)
    for path in (page, plot, tmp_path / "i.svg"):
        assert Obeyed(path.read_text("utf-8")).found == [], path
    assert HOSTILE in Obeyed(page.read_text("utf-8")).text  # shown as it is
    assert "\\<script\\>" in summary.read_text() and "<script>" not in summary.read_text()


def test_a_summary_shows_control_characters_of_its_command_line_escaped(tmp_path: Path, peru) -> None:
    odd, summary = tmp_path / "a\x1b[2J\u202e.safetensors", tmp_path / "s.md"
    save_file({"w": torch.ones(4)}, odd)
    peru("inspect", odd, "--summary", summary)
    text = summary.read_text("utf-8")
    assert text.startswith("### peru inspect") and all(line.isprintable() for line in text.split("\n"))


@pytest.mark.parametrize("revision", ["$(id)", "x;rm -rf ~", "`id`", "a|b", "<script>x</script>", "x\n# own"])
def test_a_command_line_in_a_card_is_one_command_whatever_base_is_named(tmp_path: Path, revision: str) -> None:
    """People copy it to their shells; an adapter's configuration may come from a stranger."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base", "revision": revision, "r": HOSTILE}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    text = card(contents({path.name: path for path in tmp_path.iterdir()}), "me/x")
    (line,) = [line for line in text.splitlines() if line.startswith("peru unpack")]
    words = shlex.split(line)
    assert words[:4] == ["peru", "unpack", "me/x", "--base"] and words[5:] == ["-o", "restored/"] and words[4].startswith("org/base@")
    assert f"--base {shlex.quote(words[4])} " in line
    assert Obeyed(text.partition("```sh")[0]).found == []
    assert not [line for line in text.splitlines() if line == "# own"]
