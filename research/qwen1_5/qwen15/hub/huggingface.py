"""A model from Hugging Face, by huggingface_hub: its cache, tokens, endpoint and offline mode are those users know.

HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_TOKEN and HF_HUB_OFFLINE are read by huggingface_hub itself.
"""

from __future__ import annotations

import sys
import time
from typing import Any, Callable, Dict, Optional

from ..device import env_rank
from ..errors import EXIT_FAILED, EXIT_USAGE, UserError
from ..progress import human_bytes
from . import files
from .names import HubName

_ANSWER_S = 15.0  # time for the hub to list a repository
_AT_ONCE = 4  # files
_HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "requests", "urllib3")
_PAUSES_S = (1.0, 2.0, 4.0)  # after a connection that was cut; the download goes on where it stopped


def fetch(name: HubName, tell: Callable[[str], None]) -> str:
    """The folder of a model in huggingface_hub's cache; what is missing there is downloaded.

    Raises:
        UserError: the hub has no such model, refuses it or sent something else; or it cannot be reached and the cache
            has no whole copy.
    """
    from huggingface_hub import HfApi, constants, utils

    if env_rank() != 0 or not sys.stderr.isatty():
        utils.disable_progress_bars()
    if constants.HF_HUB_OFFLINE:
        return _cached(name, "HF_HUB_OFFLINE is set")
    try:
        info = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True, timeout=_ANSWER_S)
    except Exception as error:
        if not _is_network(error):
            raise _explained(error, name) from None
        folder = _cached(name, f"{constants.ENDPOINT}: {_reason(error)}")
        tell(f"{name}: {constants.ENDPOINT} does not answer; the copy in the cache is used")
        return folder
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    return _download(name, {file: sizes[file] for file in files.needed(sizes)}, tell)


def _download(name: HubName, wanted: Dict[str, int], tell: Callable[[str], None]) -> str:
    from huggingface_hub import constants, snapshot_download

    if not _have(name, wanted):
        tell(f"{name}: {len(wanted)} files, {human_bytes(sum(wanted.values()))}, from {constants.ENDPOINT} to "
             f"{constants.HF_HUB_CACHE}")
    for pause_s in (*_PAUSES_S, None):
        try:
            folder = snapshot_download(name.repo, revision=name.revision, allow_patterns=sorted(wanted),
                                       max_workers=_AT_ONCE)
            break
        except Exception as error:
            if pause_s is None or not _is_network(error):
                raise _explained(error, name) from None
            time.sleep(pause_s)
    missing = files.absent(folder)
    if missing is not None:
        raise UserError(f"has no {missing}", name, "It is not a model of Qwen2's kind in Hugging Face's format.")
    files.verify(folder, str(name))
    return folder


def _have(name: HubName, wanted: Dict[str, int]) -> bool:
    """Whether every wanted file is in the cache already."""
    from huggingface_hub import try_to_load_from_cache

    return all(isinstance(try_to_load_from_cache(name.repo, file, revision=name.revision), str) for file in wanted)


def _cached(name: HubName, why: str) -> str:
    """The copy in the cache, when it is whole."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name.repo, revision=name.revision, local_files_only=True)
    except Exception:  # not in the cache: huggingface_hub has several names for that
        raise UserError(f"cannot be fetched ({why}), and is not in the cache", name,
                        "Fetch it where there is a network (hf download), or give a folder.", EXIT_FAILED) from None
    missing = files.absent(folder)
    if missing is not None:
        raise UserError(f"cannot be fetched ({why}), and its copy in the cache is not whole: {missing} is missing",
                        name, "Run again with the network to get the rest.", EXIT_FAILED)
    files.verify(folder, str(name))
    return folder


def _status(error: Exception) -> Any:
    return getattr(getattr(error, "response", None), "status_code", None)


def _answered(error: Exception) -> Exception:
    """Of an error and its causes the one with the hub's answer; the first cause where there is none."""
    while _status(error) is None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _is_network(error: Exception) -> bool:
    """No answer came, whichever library says so: huggingface_hub has changed from requests to httpx."""
    if _status(_answered(error)) is not None:  # huggingface_hub has tried it again itself where that helps
        return False
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _HTTP_LIBRARIES


def _reason(error: BaseException) -> str:
    """Why there was no answer: what the system said, where it did, else the library's own words."""
    text = " ".join(str(error).split()) or type(error).__name__
    cause: Optional[BaseException] = error
    while cause is not None:
        if isinstance(cause, OSError) and isinstance(cause.errno, int) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return text if len(text) <= 150 else text[:147] + "..."


def _explained(error: Exception, name: HubName) -> Exception:
    """The line for what went wrong; the error itself when it is not the hub's."""
    from huggingface_hub import constants, errors

    error = _answered(error)
    status, code = _status(error), EXIT_USAGE
    if isinstance(error, errors.GatedRepoError):
        what = "is for those who have accepted its terms"
        fix = f"Accept them at {constants.ENDPOINT}/{name.repo}, then: hf auth login"
    elif isinstance(error, errors.RevisionNotFoundError):
        what, fix = f"has no revision {name.revision!r}", "Branches, tags and commits count: OWNER/NAME@main"
    elif isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403, 404):
        what = f"is neither a file or folder here nor a model that {constants.ENDPOINT} shows (status {status})"
        fix = "Check the name; a private model needs HF_TOKEN or: hf auth login. From ModelScope: --hub modelscope"
    elif status == 429:
        what, code = f"{constants.ENDPOINT} takes no more requests for now (status 429)", EXIT_FAILED
        fix = "Try later, or with HF_TOKEN set."
    elif status is not None:
        what, code = f"{constants.ENDPOINT} answers with status {status}", EXIT_FAILED
        fix = "Try later; the download goes on where it stopped."
    elif _is_network(error) or isinstance(error, RuntimeError):
        what, code = f"could not be fetched whole ({_reason(error)})", EXIT_FAILED
        fix = "Run again: the download goes on where it stopped. What is not whole is not used."
    else:
        return error
    return UserError(what, name, fix, code)


