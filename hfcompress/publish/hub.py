"""Push a checkpoint to the Hub: all of it in one commit, or nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, get_session, hf_raise_for_status, validate_repo_id

from hfcompress.checkpoint.files import INDEX, weights_digest
from hfcompress.errors import CheckpointError, HFCompressError
from hfcompress.progress import busy, say
from hfcompress.publish.card import CARD
from hfcompress.publish.facts import FILE_NAME, load_facts
from hfcompress.publish.uploads import FACTS, Upload, choose_files

_MAYBE_EMPTY = ", though an empty repository may have been made"
_AGAIN = (
    f"Nothing is half published: either all of it is there or nothing{_MAYBE_EMPTY}. Run the same command again; what "
    "was uploaded already is not sent twice."
)
_WITHOUT_XET = "If it fails again, HF_HUB_DISABLE_XET=1 sends the files another way."
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write there."


@dataclass(frozen=True)
class Pushed:
    """Where a checkpoint is now.  changed: False when everything was there already.  left_out: files not uploaded."""

    url: str
    commit: str
    changed: bool
    files: tuple[str, ...]
    left_out: tuple[str, ...]


@overload
def push(
    source: str | Path, repo_id: str | None = None, *, private: bool | None = None, revision: str | None = None,
    create_pr: bool = False, token: str | None = None,
) -> Pushed: ...  # fmt: skip


@overload
def push(
    source: Any, repo_id: str | None = None, *, private: bool | None = None, revision: str | None = None,
    create_pr: bool = False, token: str | None = None,
) -> Pushed | None: ...  # fmt: skip


def push(
    source: Any,
    repo_id: str | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> Pushed | None:
    """Upload a checkpoint folder, or a Trainer's model with a card of its training, in one commit.

    Of several processes that train together the first uploads, and the others get None, as from ``push_to_hub``.
    repo_id: None is a Trainer's ``hub_model_id``, or else the name of its ``output_dir``, as for ``push_to_hub``.
    private: of a repository that is made now; one that exists must not be public when True is asked for.  None is a
    Trainer's ``hub_private_repo``, as no token is its ``hub_token``.
    revision: the branch, made if it is not there.  create_pr: open a pull request instead of writing to the branch.
    Files of a large checkpoint go up one by one, and a second call sends only what is still missing; nobody sees any
    of it before the one commit at the end.  Uploading a large folder in many commits would show others half of one
    model and half of another in between.  Weights, facts, reports and pictures of an earlier push that
    this checkpoint lacks are removed by the same commit: they would be told of another model.
    Raises CheckpointError for a folder that is no whole checkpoint with a card, HFCompressError for what the Hub or
    the way to it refuses; the token is in no message.
    """
    if constants.HF_HUB_OFFLINE:
        raise HFCompressError("HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it and run this again.")
    if create_pr and revision not in (None, "main"):
        raise HFCompressError(f"A pull request is against main; leave revision={revision!r} or create_pr out.")
    repo_id = repo_id or _own_repository(source)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HFCompressError(f"'{repo_id}' cannot be a repository: {error}") from error
    if not isinstance(source, (str, Path)):
        from hfcompress.publish.trained import saved_for_push

        args = getattr(source, "args", None)
        private = getattr(args, "hub_private_repo", None) if private is None else private
        token = token or getattr(args, "hub_token", None)
        is_first = getattr(source, "is_world_process_zero", lambda: True)
        if not is_first():
            return None
        with saved_for_push(source) as folder:
            return push(folder, repo_id, private=private, revision=revision, create_pr=create_pr, token=token)
    folder = Path(source).expanduser()
    upload = choose_files(folder, repo_id)
    check_card(folder)
    refuse_other_weights(folder)
    with _explained(repo_id, token or get_token()):
        return _commit(HfApi(token=token), upload, repo_id, private, revision or "main", create_pr)


def _own_repository(source: Any) -> str:
    """Return where a Trainer would push to of itself."""
    if isinstance(source, (str, Path)) or not hasattr(source, "args"):
        raise HFCompressError("Name the repository to push to: push(folder, 'me/name').")
    return source.args.hub_model_id or Path(str(source.args.output_dir)).absolute().name


def check_card(folder: Path) -> None:
    """Raise CheckpointError unless the folder has a card whose metadata the Hub takes and which names the library."""
    file = folder / CARD
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no {CARD}, and a model without a card tells nobody what it is. `hfcompress run`, prune and "
            "quantize write one with what they measured; for a checkpoint made otherwise "
            "`hfcompress.write_model_card(folder, base_model=...)` does, or write your own with library_name and tags "
            "at its top."
        )
    try:
        data = ModelCard.load(file, ignore_metadata_errors=False).data
    except Exception as error:  # YAML and the Hub's own classes raise many kinds; each means the same to the user
        raise CheckpointError(f"The metadata at the top of {file} cannot be read: {error}") from error
    missing = [name for name in ("library_name", "tags") if not data.get(name)]
    if missing:
        raise CheckpointError(
            f"The metadata at the top of {file} lacks {' and '.join(missing)}, by which the Hub finds and loads it. "
            f"Add them, or let `hfcompress card {folder}` write the card anew."
        )


def refuse_other_weights(folder: Path) -> None:
    """Raise CheckpointError where a folder's measurements were taken on other weights than lie there now."""
    if not (folder / FILE_NAME).is_file():
        return
    measured = load_facts(folder).weights
    if measured is not None and measured != weights_digest(folder):
        raise CheckpointError(
            f"The weights in {folder} are not those that its card and {FILE_NAME} tell of: they were written later. "
            "Nothing was uploaded. Make the card anew as it was made, or, for what calls in Python changed, remove "
            f"{FILE_NAME} and call hfcompress.write_model_card(folder, base_model=...)."
        )


def _commit(api: HfApi, upload: Upload, repo_id: str, private: bool | None, revision: str, create_pr: bool) -> Pushed:
    say(f"pushing {len(upload.files)} files to {repo_id}")
    _let_hub_check(api, upload.files[CARD])
    url = _repository(api, repo_id, private, create_pr)
    repo_id = url or repo_id
    if revision != "main" and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    before = api.repo_info(repo_id, revision=revision)
    there = set(api.list_repo_files(repo_id, revision=revision))
    stale = sorted(name for name in there - set(upload.files) if _is_weight(name) or name in FACTS)
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in upload.files.items()]
    operations += [CommitOperationDelete(name) for name in stale]
    with _uploading(repo_id):
        # Somebody else's commit in between would leave a mixture of two models: parent_commit refuses it.
        made = api.create_commit(
            repo_id, operations, commit_message="Upload the model and its card with hfcompress", revision=revision,
            create_pr=create_pr, parent_commit=None if create_pr else before.sha,
        )  # fmt: skip
    shown = made.pr_url or f"{api.endpoint}/{repo_id}" + ("" if revision == "main" else f"/tree/{revision}")
    return Pushed(shown, made.oid, made.oid != before.sha, tuple(upload.files), upload.left_out)


@contextmanager
def _uploading(repo_id: str) -> Iterator[None]:
    """Show the client's own bars, of the bytes that are there, or that it goes on where they are switched off.

    The client tells nobody else how far it is, and a moving display of ours makes a new line of every change of a bar.
    """
    what = f"uploading to {repo_id}"
    if are_progress_bars_disabled():
        with busy(what):
            yield
    else:
        say(what)
        yield


def _let_hub_check(api: HfApi, card: Path | bytes) -> None:
    """Raise CheckpointError for metadata that the Hub does not take, before there is anything of it there."""
    text = (card if isinstance(card, bytes) else card.read_bytes()).decode()
    answer = get_session().post(f"{api.endpoint}/api/validate-yaml", json={"content": text, "repoType": "model"})
    if answer.status_code == 400:
        faults = "; ".join(str(one.get("message")) for one in answer.json().get("errors", []))
        raise CheckpointError(
            f"The Hub does not take the metadata at the top of {CARD}: {faults}. Nothing was uploaded."
        )
    hf_raise_for_status(answer)


def _repository(api: HfApi, repo_id: str, private: bool | None, create_pr: bool) -> str:
    """Return the full id of the repository, which is made unless it is there."""
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    if api.repo_exists(repo_id):
        if private and api.repo_info(repo_id).private is False:
            raise HFCompressError(
                f"{repo_id} exists and is public, but private=True was asked for. Nothing was uploaded; choose "
                "another name or change its visibility first."
            )
        return repo_id
    if create_pr:
        raise HFCompressError(f"{repo_id} does not exist, so there is nothing to open a pull request against.")
    return str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)


def _is_weight(name: str) -> bool:
    return "/" not in name and (name.endswith((".safetensors", ".bin")) or name == INDEX)


@contextmanager
def _explained(repo_id: str, token: str | None) -> Iterator[None]:
    """Turn whatever a push raises into one message that says what to do and holds no token."""
    try:
        yield
    except HFCompressError:
        raise
    except Exception as error:
        # The uploading threads' errors come wrapped in a RuntimeError.
        found = _explanation(error, repo_id) or (error.__cause__ and _explanation(error.__cause__, repo_id))
        # The way through Xet raises plain RuntimeErrors and ValueErrors, with whatever the server said in them.
        found = found or f"Pushing to {repo_id} failed: {type(error).__name__}: {error}. {_AGAIN} {_WITHOUT_XET}"
        raise HFCompressError(_without_token(found, token)) from None


def _explanation(error: BaseException, repo_id: str) -> str | None:
    """Return what an error means to the user, None for one that is not of the Hub or the way to it."""
    if isinstance(error, LocalTokenNotFoundError):
        return f"There is no token to write to {repo_id} with. {_LOG_IN}"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        meaning = _MEANING.get(status, f"The Hub failed (status {status}) while pushing to {{repo}}. {_AGAIN}")
        said = error.server_message or str(error).splitlines()[0]
        return f"{meaning.format(repo=repo_id)} ({said})"
    if isinstance(error, (OSError, HTTPError)):
        return f"The connection to the Hub broke while pushing to {repo_id}: {type(error).__name__}: {error}. {_AGAIN}"
    return None


_MEANING = {
    400: f"The Hub refuses what was sent to {{repo}}; nothing was published{_MAYBE_EMPTY}.",
    401: f"The Hub does not know you, or not as one who may write to {{repo}}. {_LOG_IN}",
    403: f"You may not write to {{repo}}. {_LOG_IN} Or propose it: --create-pr.",
    404: "The Hub has no {repo} that you may see, or not that revision. Check the name and the token.",
    409: "Somebody else changed {repo} at the same time, so nothing was published. Run the same command again.",
    412: "Somebody else changed {repo} at the same time, so nothing was published. Run the same command again.",
}


def _without_token(text: str, token: str | None) -> str:
    """Take the token in use, and all that looks like one, out of a message; ours never hold one, a server's may."""
    return re.sub(r"\bhf_[A-Za-z0-9_]+", "hf_***", text.replace(token, "***") if token else text)
