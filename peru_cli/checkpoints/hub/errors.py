"""Errors of the Hub and the network as messages: which repo, which file, which environment variable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_token
from huggingface_hub import errors as hub
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

from peru_cli.errors import PeruError


class HubError(PeruError):
    """The Hub did not return what was requested."""

    passes = True


def unreachable(error: BaseException) -> bool:
    """Whether the Hub could not be reached at all: offline, no connection, no answer."""
    return isinstance(error, (hub.OfflineModeIsEnabled, httpx.TransportError, hub.LocalEntryNotFoundError))


@contextmanager
def explained(what: str, revision: str | None = None) -> Iterator[None]:
    """Turn the client's exceptions into a HubError; `what` is a repo or a file in one."""
    try:
        yield
    except (hub.HfHubHTTPError, hub.OfflineModeIsEnabled, hub.EntryNotFoundError, hub.FileMetadataError, httpx.HTTPError) as error:
        raise explain(error, what, revision) from error
    except OSError as error:
        if str(error).startswith("Consistency check failed"):  # the client's message for a body shorter or longer than announced
            raise HubError(
                f"{what}: the download ended early or late: other bytes than the Hub announced", "run the command again"
            ) from error
        raise


def explain(error: BaseException, what: str, revision: str | None = None) -> HubError:
    """Explain an exception of huggingface_hub or httpx to the user. Never quotes it: URLs can be signed."""
    with_token = get_token() is not None
    cause = error.__cause__ if isinstance(error, hub.LocalEntryNotFoundError) and error.__cause__ is not None else error
    if isinstance(cause, hub.HfHubHTTPError):
        return _answered(cause, what, revision, with_token)
    if isinstance(cause, hub.OfflineModeIsEnabled):
        return HubError(
            f"{what} is not in the cache, and HF_HUB_OFFLINE is set",
            f"unset HF_HUB_OFFLINE, or check HF_HOME (the cache is {constants.HF_HUB_CACHE})",
        )
    if isinstance(cause, hub.EntryNotFoundError):
        return HubError(f"{what}: no such file in the cache, and the Hub could not be asked", "check the connection and HF_ENDPOINT")
    if isinstance(cause, hub.FileMetadataError):
        return HubError(f"{what}: {constants.ENDPOINT} does not answer as the Hub does", "check HF_ENDPOINT and proxies")
    if isinstance(cause, httpx.TimeoutException):
        return HubError(f"{what}: no answer in time from {constants.ENDPOINT}", "try again, or set HF_HUB_DOWNLOAD_TIMEOUT to more seconds")
    return HubError(f"{what}: cannot reach {constants.ENDPOINT} ({type(cause).__name__})", "check the connection, proxies and HF_ENDPOINT")


def _answered(error: hub.HfHubHTTPError, what: str, revision: str | None, with_token: bool) -> HubError:
    status = error.response.status_code
    login = "set HF_TOKEN, or log in with `hf auth login`"
    if isinstance(error, hub.GatedRepoError):
        page = f"{constants.ENDPOINT}/{what.split('@')[0]}"
        return HubError(
            f"{what} is gated: its authors grant access", f"ask for access at {page}" + ("" if with_token else f", then {login}")
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return HubError(
            f"{what.split('@')[0]} has no revision {revision or 'main'!r}", "name a branch, a tag or a commit: ORG/NAME@REVISION"
        )
    if isinstance(error, hub.EntryNotFoundError):
        return HubError(f"{what}: the repo has no such file", "`peru inspect ORG/NAME` shows what it holds")
    if isinstance(error, hub.RepositoryNotFoundError):
        hint = (
            "check the name; the token in use (HF_TOKEN) may lack access to it"
            if with_token
            else f"check the name; if it is private, {login}"
        )
        return HubError(f"{what}: no such repo at {constants.ENDPOINT}, or a private one", hint)
    if status in (401, 403):
        return HubError(f"{what}: the Hub refuses access ({status})", "check what the token in HF_TOKEN may read" if with_token else login)
    if status == 429:
        return HubError(
            f"{what}: too many requests, and waiting did not help (429)", "try again in a few minutes; HF_TOKEN raises the limit"
        )
    return HubError(f"{what}: {constants.ENDPOINT} answers with status {status}", "try again later" if status >= 500 else None)
