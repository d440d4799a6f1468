"""Publish what peru wrote on the Hugging Face Hub: files and model card in one commit, or nothing.

Existing content decides what happens. Without `force` only an empty place (a new repo, a new branch, one with nothing but
.gitattributes) is written to, and a place that holds exactly the same content is left alone. With `force` the place
afterwards holds exactly what was published; its earlier content stays in the history."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peru_cli.checkpoints.sidefiles import is_side_file_name
from peru_cli.console import console, plural, si_bytes
from peru_cli.errors import PeruError, UsageError
from peru_cli.publish.card import card, contents
from peru_cli.shown import listed

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*", re.ASCII)
_CARD = "README.md"
_ATTRIBUTES = ".gitattributes"
_PUBLISHED = re.compile(
    r".*\.safetensors|.*\.safetensors\.index\.json|adapter_config\.json|README\.md"
)  # besides side files, these are all that is published


@dataclass(frozen=True)
class Destination:
    """Where on the Hub an output goes."""

    repo: str
    private: bool = False
    revision: str = "main"
    message: str | None = None
    force: bool = False

    def __str__(self) -> str:
        return self.repo if self.revision == "main" else f"{self.repo}@{self.revision}"


@dataclass(frozen=True)
class Published:
    """The result: the commit that holds everything."""

    repo: str
    commit: str
    url: str
    new: bool  # False: the place already held the same content

    def json(self) -> dict[str, Any]:
        """For machines."""
        return {"repo": self.repo, "commit": self.commit, "url": self.url, "new": self.new}


def destination(
    push: str | None, private: bool, revision: str | None, message: str | None, force: bool, output: str | None = None
) -> Destination | None:
    """Parse the options of --push. None without --push."""
    if push is None:
        if private or revision is not None or message is not None:
            raise UsageError("--private, --revision and --commit-message need --push", "add --push org/name")
        return None
    if not _REPO.fullmatch(push) or "--" in push or ".." in push or len(push) > 96:
        raise UsageError(f"--push {push!r} is not the name of a repo", "write it as org/name")
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise UsageError(f"--revision {revision!r} is not the name of a branch")
    if message is not None and not message.strip():
        raise UsageError("--commit-message is empty")
    if output == "-":
        raise UsageError("-o - leaves nothing to publish", "name a file or folder with -o")
    return Destination(push, private, revision or "main", message, force)


@dataclass(frozen=True)
class _State:
    """The state of a revision: its commit, and its files with their SHA-256 (LFS) or git blob id."""

    commit: str | None
    files: dict[str, str]


def check(place: Destination, taken: bool = True) -> None:
    """Refuse, before any work, what the Hub would refuse afterwards: token, rights, visibility and, if asked, a place that is taken."""
    with _explained(place):
        api = _api()
        who = api.whoami()
        role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
        names = [str(who.get("name")), *(str(org.get("name")) for org in who.get("orgs") or ())]
        owner = place.repo.split("/")[0]
        if role == "read":
            raise PeruError(f"{place.repo}: the token is read-only", _NEW_TOKEN)
        if who.get("name") and owner.lower() not in {name.lower() for name in names}:  # tokens of CI providers have no name
            raise PeruError(
                f"{place.repo}: the token belongs to {names[0]}, who is not a member of {owner}",
                f"name a repo of {' or '.join(names)}: {names[0]}/{place.repo.split('/')[1]}",
            )
        state = _state(api, place) if _exists(api, place) else None
    if state is not None and taken:
        _refuse_content(place, state)


def publish(paths: Sequence[Path], place: Destination, made_by: str, bases: tuple[str, ...] = ()) -> Published:
    """Upload files, or a folder, with their card in one commit.

    `made_by` is the command, for the commit message. `bases` are models that the files themselves do not record.
    Raises PeruError, which says that the local output is kept."""
    try:
        with _explained(place):
            return _publish(paths, place, made_by, bases)
    except PeruError as error:
        options = ["--private"] if place.private else []
        options += (["--revision", place.revision] if place.revision != "main" else []) + (["--force"] if place.force else [])
        options += ["--commit-message", place.message] if place.message is not None else []
        again = shlex.join(["peru", "push", *map(str, paths), place.repo, *options])
        hint = f"{error.hint}\n  " if error.hint else ""
        raise type(error)(f"{_names(paths)} is complete, but not published: {error.message}", f"{hint}then: {again}") from error
    except KeyboardInterrupt:
        console.warn(f"{_names(paths)} is complete; look at {place} to see whether it was published (all of it, or nothing)")
        raise


def _names(paths: Sequence[Path]) -> str:
    return " and ".join(str(path) for path in paths)


def _publish(paths: Sequence[Path], place: Destination, made_by: str, bases: tuple[str, ...]) -> Published:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    files = collect(paths)
    additions: dict[str, Path | bytes] = dict(files)
    if _CARD not in files:
        additions[_CARD] = card(contents(files), str(place), bases).encode()
    api = _api()
    if not _exists(api, place):
        api.create_repo(place.repo, private=place.private or None, exist_ok=True)
    found = _state(api, place)
    state = found or _new_branch(api, place)
    others = {name: blob for name, blob in state.files.items() if name != _ATTRIBUTES}
    if others and set(others) == set(additions) and all(_same(additions[name], blob) for name, blob in others.items()):
        return Published(place.repo, str(state.commit), f"{api.endpoint}/{place.repo}/commit/{state.commit}", new=False)
    if found is not None:
        _refuse_content(place, state)
    operations: list[Any] = [CommitOperationDelete(name, is_folder=False) for name in sorted(set(others) - set(additions))]
    operations += [CommitOperationAdd(name, content) for name, content in additions.items()]
    total = sum(file.stat().st_size for file in files.values())
    console.note(f"publishing {plural(len(additions), 'file')}, {si_bytes(total)}, on {api.endpoint}/{place.repo}")
    done = api.create_commit(
        place.repo,
        operations,
        commit_message=place.message or f"{made_by}: {listed(path.resolve().name for path in paths)}",
        revision=place.revision,
        parent_commit=state.commit,
    )
    return Published(place.repo, done.oid, done.commit_url, new=True)


def collect(paths: Sequence[Path]) -> dict[str, Path]:
    """Files to publish, by their path in the repo: weights, configurations, cards. Notes which other files are left out."""
    if all(path.is_file() for path in paths):
        if len({path.name for path in paths}) < len(paths):
            raise UsageError("two of the files have the same name", "publish them in separate repos")
        if odd := [str(path) for path in paths if path.suffix != ".safetensors"]:
            raise UsageError(f"{odd[0]} is not a .safetensors file", "peru publishes what it wrote")
        return {path.name: path for path in paths}
    if len(paths) > 1:
        raise UsageError("folders are published one at a time", "name one folder, or several files")
    path = paths[0]
    found = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
    chosen = {name: file for name, file in found.items() if _is_published(name, file)}
    inside = path.resolve()
    if out := [str(file) for file in chosen.values() if not file.resolve().is_relative_to(inside)]:
        raise UsageError(
            f"{path} holds links to files outside of it: {listed(out)}",
            "peru publishes only files in the folder: put the files themselves there, or remove the links",
        )
    if not any(name.endswith(".safetensors") for name in chosen):
        raise UsageError(f"{path} holds nothing that peru publishes", "name what peru wrote: an artifact, an adapter or a model")
    if left := sorted(set(found) - set(chosen)):
        console.warn(f"not published, because peru does not write such files: {', '.join(left[:5])}" + (", ..." if len(left) > 5 else ""))
    return chosen


def _is_published(name: str, file: Path) -> bool:
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and bool(_PUBLISHED.fullmatch(file.name) or is_side_file_name(file.name))


def _api() -> HfApi:
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if constants.HF_HUB_OFFLINE:
        raise PeruError("HF_HUB_OFFLINE is set, so peru cannot publish", "unset it")
    if not console.shows_progress:
        disable_progress_bars()
    if get_token() is None:
        raise PeruError("there is no token for the Hub", _NEW_TOKEN)
    return HfApi(library_name="peru")


_NEW_TOKEN = "create a token with write access at https://huggingface.co/settings/tokens, then set HF_TOKEN or run `hf auth login`"


def _exists(api: HfApi, place: Destination) -> bool:
    """Whether the repo exists. Refuses a public repo if a private one is wanted."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        about = api.model_info(place.repo)
    except RepositoryNotFoundError as error:
        if error.response.status_code != 404:
            raise
        return False
    if place.private and not about.private:
        raise UsageError(f"{place.repo} exists and is public: --private applies to new repos only", "first make it private in its settings")
    return True


def _state(api: HfApi, place: Destination) -> _State | None:
    """The current state of the revision. None if it does not exist."""
    from huggingface_hub.errors import RevisionNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        commit = api.model_info(place.repo, revision=place.revision).sha
    except RevisionNotFoundError:
        return None
    files = [f for f in api.list_repo_tree(place.repo, recursive=True, revision=commit) if isinstance(f, RepoFile)]
    return _State(commit, {file.path: file.lfs.sha256 if file.lfs is not None else file.blob_id for file in files})


def _new_branch(api: HfApi, place: Destination) -> _State:
    """Create the branch from the repo's first commit, which is empty unless the repo was made by other means."""
    if place.revision.startswith("refs/"):
        raise PeruError(f"{place}: no such reference", "open the pull request first, or name a branch")
    first = api.list_repo_commits(place.repo)[-1].commit_id
    api.create_branch(place.repo, branch=place.revision, revision=first, exist_ok=True)
    state = _state(api, place)
    assert state is not None
    return state


def _refuse_content(place: Destination, state: _State) -> None:
    others = sorted(name for name in state.files if name != _ATTRIBUTES)
    if others and not place.force:
        listed = ", ".join(others[:4]) + (", ..." if len(others) > 4 else "")
        raise UsageError(
            f"{place} holds {plural(len(others), 'file')} already: {listed}",
            "choose another repo, a new --revision, or --force to replace them (they stay in the repo's history)",
        )


def _same(content: Path | bytes, blob: str) -> bool:
    """Whether a file has this SHA-256 or git blob id on the Hub."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    digest = hashlib.sha256() if len(blob) == 64 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with open(content, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest() == blob


@contextmanager
def _explained(place: Destination) -> Iterator[None]:
    """Turn errors of the Hub and the network into messages for users."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    try:
        yield
    except PeruError:
        raise
    except HfHubHTTPError as error:
        raise _explain_answer(place, error.response.status_code if error.response is not None else 0, error) from None
    except (httpx.HTTPError, ConnectionError, TimeoutError) as error:
        raise PeruError(
            f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})", "check the network, the proxy and HF_ENDPOINT"
        ) from None
    except (RuntimeError, ValueError) as error:  # raised by the client for failed uploads and for cards that the Hub rejects
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            raise _explain_answer(place, cause.response.status_code, cause) from None
        if isinstance(cause, (httpx.HTTPError, ConnectionError, TimeoutError)):
            raise PeruError(
                f"{constants.ENDPOINT} cannot be reached ({type(cause).__name__})", "check the network, the proxy and HF_ENDPOINT"
            ) from None
        raise PeruError(f"{place}: the Hub's client says: {' '.join(str(error).split())[:300]}") from None


def _explain_answer(place: Destination, status: int, error: Any) -> PeruError:
    said = " ".join(str(getattr(error, "server_message", None) or "").split())[:200]
    tail = f" ({said})" if said else ""
    if status == 401:
        return PeruError(f"{place}: the Hub does not accept the token{tail}", _NEW_TOKEN)
    if status == 403:
        return PeruError(f"{place}: the token has no write access there{tail}", "ask the repo's owner for write access, or " + _NEW_TOKEN)
    if status in (409, 412):
        return PeruError(f"{place} was changed by somebody else in the meantime{tail}", "look at the change and push again")
    if status == 429:
        return PeruError(f"{place}: too many requests to the Hub{tail}", "try again in a few minutes")
    if status >= 500:
        return PeruError(f"{place}: the Hub failed with status {status}{tail}", "try again later; https://status.huggingface.co says more")
    return PeruError(f"{place}: the Hub refused it with status {status}{tail}")
