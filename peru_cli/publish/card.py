"""Model cards: a README.md for the Hub, made from what the files record. It never contains a local path."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from peru_cli.artifacts.container import Container, is_artifact
from peru_cli.artifacts.mixed.writer import KIND as MIXED
from peru_cli.artifacts.packs.masks import KINDS, open_pack
from peru_cli.artifacts.packs.pack import Pack
from peru_cli.artifacts.packs.routed import KIND as ROUTED
from peru_cli.artifacts.packs.routed import Routed, open_routed
from peru_cli.checkpoints.base_name import MERGED, BaseName, hub_repo, recorded
from peru_cli.checkpoints.names.renamed import RENAME, decode_rules
from peru_cli.console import count, si_bytes
from peru_cli.shown import markdown, printable
from peru_cli.version import __version__

PERU = f"[peru](https://pypi.org/project/peru-cli/) {__version__}"
ADAPTER_CONFIG = "adapter_config.json"


@dataclass
class Contents:
    """What to publish, by kind. Keys are paths in the repo."""

    artifacts: dict[str, Path] = field(default_factory=dict)
    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)  # maps a folder to its adapter_config.json
    files: dict[str, Path] = field(default_factory=dict)  # all files

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())

    @property
    def merged(self) -> bool:
        """Whether artifacts come with the merged model that is their base (PERU-FFT)."""
        return any(name.startswith(f"{MERGED}/") for name in self.files)


def contents(files: Mapping[str, Path]) -> Contents:
    """Sort files into artifacts, adapters and the rest."""
    found = Contents(files=dict(files))
    for name, path in files.items():
        folder = str(PurePosixPath(name).parent)
        if PurePosixPath(name).name == ADAPTER_CONFIG:
            config = json.loads(path.read_text("utf-8"))
            found.adapters[folder] = config if isinstance(config, dict) else {}
        elif is_artifact(path) and f"{folder}/{ADAPTER_CONFIG}".removeprefix("./") not in files:
            found.artifacts[name] = path
    return found


def front_matter(bases: Iterable[str], relation: str, library: str | None, tags: Sequence[str]) -> list[str]:
    """The card's first lines. `base_model` gets only names that the Hub accepts for a model."""
    repos = list(dict.fromkeys(repo[0] for repo in map(hub_repo, bases) if repo is not None))
    head = ["---"]
    if len(repos) == 1:
        head.append(f"base_model: {json.dumps(repos[0])}")
    elif repos:
        head += ["base_model:", *(f"- {json.dumps(repo)}" for repo in repos)]
    if repos:
        head.append(f"base_model_relation: {relation}")
    if library is not None:
        head.append(f"library_name: {library}")
    return [*head, "tags:", *(f"- {tag}" for tag in tags), "---", ""]


def card(found: Contents, repo: str, bases: Sequence[str] = ()) -> str:
    """The card of artifacts, adapters or a model, as published in `repo`: ORG/NAME or ORG/NAME@BRANCH.

    `bases` are those of a model, which does not record them."""
    if found.artifacts:
        lines = _artifacts_card(found, repo)
    elif found.adapters:
        lines = _adapters_card(found, repo)
    else:
        lines = _model_card(found, repo, bases)
    return as_text(lines) + "\n"


def as_text(lines: Iterable[str]) -> str:
    """Join a card's lines. None can contain a line break, or characters that a terminal or browser interprets."""
    return "\n".join(map(printable, lines))


def _artifacts_card(found: Contents, repo: str) -> list[str]:
    metadata, rows, names = {}, [], []
    packed: dict[str, list[str]] = {}  # tasks of files that hold several
    for file, path in found.artifacts.items():
        container = Container(path)
        try:
            metadata[file] = container.metadata
            if container.metadata["peru.kind"] == ROUTED:
                with open_routed(path) as routed:
                    rows.append(_routed_row(file, routed))
            elif container.metadata["peru.kind"] in KINDS:
                with open_pack(path) as pack:
                    packed[file] = list(pack.tasks)
                    rows.append(_pack_row(file, pack))
            else:
                rows.append(_artifact_row(file, container))
        finally:
            container.close()
        names.append(recorded(container.metadata))
    bases = list(dict.fromkeys(name for name in names if name is not None))
    kinds = sorted({m["peru.kind"] for m in metadata.values()})
    body = front_matter([name.name for name in bases], "adapter", "peru", ["peru", *kinds])
    body += [f"# {repo}", "", f"Fine-tunes of {_of(bases, found)}, stored by {PERU} as differences from it.", ""]
    body += [
        "| file | task | bytes | kept entries | density | bits a parameter | stored whole |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    unpacked = kinds != [ROUTED]
    heading = "## Unpack" if unpacked else "## Run"
    body += [*rows, "", f"Together {_bytes(found.nbytes)}.", "", heading, "", "```sh", "pip install peru-cli"]
    for file, name in zip(found.artifacts, names, strict=True):
        base = (
            "" if name is not None and hub_repo(name.name) else f" --base hf://models/{repo}/{MERGED}" if found.merged else " --base BASE"
        )
        tasks, name_one = packed.get(file), len(found.artifacts) > 1
        if metadata[file]["peru.kind"] == ROUTED:  # it has no single checkpoint
            on = base or f" --base {shlex.quote(name.name if name is not None else 'BASE')}"
            body.append(f"peru eval {shlex.quote(artifact_of(repo, file, name_one))}{on} --data TASK=FILE")
            continue
        for task in [PurePosixPath(file).stem] if tasks is None else tasks:
            which = f" --task {shlex.quote(task)}" if tasks is not None or name_one else ""
            named = shlex.quote(artifact_of(repo, file, name_one and tasks is not None))
            body.append(f"peru unpack {named}{which}{base} -o {shlex.quote(task)}/")
    checked = "unpacks, and the result afterwards." if unpacked else "adds the experts."
    body += ["```", "", f"peru checks the base before it {checked}"]
    for rules in dict.fromkeys(tuple(decode_rules(meta)) for meta in metadata.values() if RENAME in meta):
        said = " ".join(f"--rename {shlex.quote(rule)}" for rule in rules)
        body.append(f"Tensors come back under the base's names: the fine-tunes' own were changed by `{markdown(said)}`.")
    if packed:
        body.append(
            "The tasks of a pack share one sum of their task vectors, so each comes back approximately: `peru inspect` shows how closely."
        )
    if not bases and not found.merged:
        body.append("The artifacts do not name their base. They hold digests of its tensors, so peru refuses any other base.")
    return body


def _of(bases: Sequence[BaseName], found: Contents) -> str:
    if not bases:
        return f"the merged model in `{MERGED}/`" if found.merged else "a base model"
    return " and ".join(link(base.name) for base in bases)


def link(name: str) -> str:
    """A model's name, as a link if it is on the Hub."""
    split = hub_repo(name)
    if split is None:
        return f"`{markdown(name)}`"
    repo, revision = split
    return f"[{repo}](https://huggingface.co/{repo})" + (f" at `{revision}`" if revision else "")


def _artifact_row(file: str, container: Container) -> str:
    meta = container.metadata
    entries = int(meta["peru.entries"])
    delta = container.file_bytes - container.sizes["whole"] - container.sizes["files"]
    bits = 8 * delta / max(entries, 1)
    named, whole = f"| `{markdown(file)}` | {markdown(meta['peru.task'])} |", container.sizes["whole"]
    if meta["peru.kind"] == MIXED:
        energy, error = float(meta["peru.energy"]), float(meta["peru.error"])
        kept = f"{100 * (1 - error / energy if energy else 1):.3g}% of the task vector's energy"
        how = ", bytes chosen on examples" if meta["peru.goal"].startswith("agreement") else ", tuned on examples"
        density = f"mixed{how if 'peru.data' in meta else ''}"
    else:
        entries_kept = int(meta["peru.kept"])
        kept = f"{count(entries_kept)} of {count(entries)}"
        density = "lossless" if meta["peru.density"] == "lossless" else f"{100 * entries_kept / max(entries, 1):.3g}%"
    return f"{named} {container.file_bytes:,} | {kept} | {density} | {bits:.3f} | {whole:,} bytes |"


def artifact_of(repo: str, file: str, apart: bool) -> str:
    """How an artifact is named: by its repo, or as a file in it."""
    return f"hf://models/{repo}/{file}" if apart else repo


def _pack_row(file: str, pack: Pack) -> str:
    container = pack.container
    bits = 8 * container.sizes["blocks"] / max(pack.index.entries, 1)
    return (
        f"| `{markdown(file)}` | {markdown(', '.join(pack.tasks))} | {container.file_bytes:,}"
        f" | {count(pack.index.entries)} for all tasks |"
        f" | {bits:.3f} | {container.sizes['whole']:,} bytes |"
    )


def _routed_row(file: str, routed: Routed) -> str:
    container = routed.container
    return (
        f"| `{markdown(file)}` | {markdown(', '.join(routed.tasks))} | {container.file_bytes:,}"
        f" | {routed.card()} |"
        f" | | {container.sizes['whole']:,} bytes |"
    )


def _adapters_card(found: Contents, repo: str) -> list[str]:
    bases = {}
    for folder, config in found.adapters.items():
        base, revision = config.get("base_model_name_or_path"), config.get("revision")
        if isinstance(base, str) and hub_repo(base):
            bases[folder] = f"{base}@{revision}" if isinstance(revision, str) and revision else base
    body = front_matter(bases.values(), "adapter", "peft", ["peru", "lora"])
    links = [link(base) for base in dict.fromkeys(bases.values())]
    body += [f"# {repo}", "", "LoRA " + ("adapter" if len(found.adapters) == 1 else "adapters")
             + (f" of {' and '.join(links)}" if links else "") + f", made by {PERU}.", ""]  # fmt: skip
    body += ["| adapter | bytes | rank |", "| --- | --- | --- |"]
    for folder, config in found.adapters.items():
        inside = [path for name, path in found.files.items() if str(PurePosixPath(name).parent) == folder]
        ranks = [config.get("r"), *config.get("rank_pattern", {}).values()]
        known = [rank for rank in ranks if isinstance(rank, int)]
        rank = f"{min(known)} to {max(known)}" if len(set(known)) > 1 else str(known[0]) if known else ""
        body.append(f"| `{markdown(folder)}` | {sum(path.stat().st_size for path in inside):,} | {rank} |")
    body += [
        "",
        f"Together {_bytes(found.nbytes)}. PEFT loads it without peru. To write a whole checkpoint with base and adapter in one:",
        "",
    ]
    body += ["```sh", "pip install peru-cli"]
    for folder in found.adapters:
        name = f"hf://models/{repo}/{folder}" if folder != "." else repo
        body.append(f"peru unpack {shlex.quote(name)} --base {shlex.quote(bases.get(folder, 'BASE'))} -o restored/")
    return [*body, "```"]


def _model_card(found: Contents, repo: str, bases: Sequence[str]) -> list[str]:
    library = "transformers" if "config.json" in found.files else None
    body = front_matter(bases, "finetune", library, ["peru"])
    body += [f"# {repo}", "", f"A checkpoint written by {PERU}: {_bytes(found.nbytes)}.", "", "| file | bytes |", "| --- | --- |"]
    return body + [f"| `{markdown(name)}` | {path.stat().st_size:,} |" for name, path in found.files.items()]


def _bytes(nbytes: int) -> str:
    return f"{nbytes:,} bytes ({si_bytes(nbytes)})" if nbytes >= 1000 else f"{nbytes} bytes"
