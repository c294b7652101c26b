"""Plans and profiles on the Hugging Face Hub: pushed into a repository with a card, and read from one, or from a folder.

The names and arguments are those of huggingface_hub's own mixin for models. huggingface_hub is imported where it is used.
"""

import tempfile
import warnings
from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Self

from arrowhead.errors import CardKept, HubUnavailable, InputsInvalid
from arrowhead.plans import atomic_write, limits
from arrowhead.plans.card import LIBRARY, OF_ARROWHEAD, Card, Measured
from arrowhead.versions import versions

CARD = "README.md"


class OnHub:
    """What is one file in a repository on the Hub: `file_name`, of at most `most_bytes`."""

    file_name: ClassVar[str]
    most_bytes: ClassVar[int]

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write the file."""

    @classmethod
    @abstractmethod
    def load(cls, path: str | Path) -> Self:
        """Read the file."""

    @abstractmethod
    def card(self, name: str) -> Card:
        """What the card of the repository `name` says."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Self:
        """Read from a repository on the Hugging Face Hub, or from a local folder or file.

        The file is checked as `load` checks any file, and nothing larger than that allows is downloaded. With
        `HF_HUB_OFFLINE=1` in the environment, as with `local_files_only`, what was downloaded before is used.

        Args:
            pretrained_model_name_or_path: a repository, such as `org/name`; a folder that `save_pretrained` wrote; or a file.
            revision: a branch, a tag or a commit of the repository; None: its main branch.
            token: an access token; True, or None: the one that is logged in; False: none.
            cache_dir: the folder for downloads; None: that of huggingface_hub.
            local_files_only: whether to ask no server.
            force_download: whether to download again what was downloaded before.

        Raises:
            HubUnavailable: there is no such repository, revision or file, or it cannot be reached.
            InputsInvalid: the file is no profile, or too large.
            PlanInvalid: the file is no plan.

        Examples:
                profile = ah.Profile.from_pretrained("org/name", revision="v1")
                plan = ah.Plan.from_pretrained("org/name")
        """
        name = pretrained_model_name_or_path
        if not isinstance(name, str | Path) or not str(name):
            raise InputsInvalid(f"got {name!r}, wanted the name of a repository on the Hub, such as org/name, or a folder")
        local = Path(name)
        if _is_there(local):
            path = local / cls.file_name if local.is_dir() else local
            if not path.exists():
                raise HubUnavailable(f"got the folder {name} without {cls.file_name}, wanted one that save_pretrained wrote")
            return cls.load(path)
        where: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
        where |= {"local_files_only": local_files_only, "force_download": force_download}
        return cls.load(_downloaded(str(name), cls.file_name, cls.most_bytes, where))

    def save_pretrained(
        self, save_directory: str | Path, *, repo_id: str | None = None, measured: Measured | None = None
    ) -> None:
        """Write the file, and a card (README.md), into a folder, which `from_pretrained` reads.

        A README.md that arrowhead did not write, such as a model's, is left as it is.

        Args:
            save_directory: the folder; it is made if it is missing.
            repo_id: the repository that the card's example names; None: the folder.
            measured: metrics for the card, see `push_to_hub`.

        Raises:
            InputsInvalid: `measured` is no mapping of names to mappings of numbers.
            FileUnwritable: a file cannot be written.

        Warns:
            CardKept: the folder has a README.md that arrowhead did not write.
        """
        folder = Path(save_directory)
        text = self.card(str(save_directory) if repo_id is None else repo_id).text(measured)
        atomic_write.make_folder(folder)
        self.save(folder / self.file_name)
        if _is_of_others(folder / CARD):
            warnings.warn(
                f"{folder} has a {CARD} that arrowhead did not write, which was left as it is", CardKept, stacklevel=2
            )
        else:
            atomic_write.write(folder / CARD, text.encode())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        measured: Measured | None = None,
    ) -> str:
        """Push into a repository on the Hugging Face Hub, which is made if it is missing. Returns the commit's address.

        In the repository the file has a fixed name, `plan.json` or `profile.safetensors`, and beside it is a card, README.md.
        A README.md that arrowhead did not write, such as a model's, is left as it is.

        Args:
            repo_id: the repository, such as `org/name`.
            commit_message: None: what is pushed.
            private: whether a new repository is private; None: as is usual for its owner.
            token: an access token; True, or None: the one that is logged in.
            branch: the branch to commit to, which is made if it is missing; None: the main branch.
            create_pr: whether to open a pull request in place of a commit to the branch.
            measured: metrics for the card, by the names of plans: `{score.name: score.metrics for score in found.scores}`
                for what `arrowhead.evaluate` found.

        Raises:
            HubUnavailable: the repository cannot be made, reached or written to.
            InputsInvalid: `measured` is no mapping of names to mappings of numbers.

        Warns:
            CardKept: the repository has a README.md that arrowhead did not write.

        Examples:
                profile.push_to_hub("org/name", private=True)
                plan.push_to_hub("org/name", measured={"40 %": {"lpips": 0.0003}})
        """
        with tempfile.TemporaryDirectory() as folder:

            def save(name: str) -> None:
                self.save_pretrained(folder, repo_id=name, measured=measured)

            save(repo_id)  # before a repository is made: this may be refused
            message = commit_message or f"{type(self).__name__} of {LIBRARY} {versions()[LIBRARY]}"
            return _pushed(Path(folder), save, self.file_name, repo_id, message, private, token, branch, create_pr)


def _is_there(path: Path) -> bool:
    """Whether there is a file or folder of this name.

    Raises:
        HubUnavailable: the system cannot tell.
    """
    try:
        return path.exists()
    except OSError as error:
        raise HubUnavailable(
            f"cannot read {str(path)!r:.100}: {error.strerror}; wanted a repository on the Hub, such as org/name, or a folder"
        ) from error


def _is_of_others(card: Path) -> bool:
    """Whether there is a card that arrowhead did not write, or one that cannot be read."""
    try:
        return OF_ARROWHEAD.search(limits.read_bytes(card).decode(errors="replace")) is None
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True


def _downloaded(repo_id: str, file: str, most: int, where: dict[str, Any]) -> str:
    """The path of a repository's file in the folder for downloads."""
    from huggingface_hub import hf_hub_download  # noqa: PLC0415  # takes time to import, and most plans are files

    asked = {**where, "library_name": LIBRARY, "library_version": versions()[LIBRARY]}
    try:
        found = hf_hub_download(repo_id, file, **asked, dry_run=True)
        if found.file_size is not None and found.file_size > most:
            raise HubUnavailable(
                f"{file} of {repo_id} has {found.file_size} bytes, wanted {most} at most; it was not downloaded"
            )
        path = hf_hub_download(repo_id, file, **{**asked, "revision": found.commit_hash})  # the branch may have moved
    except HubUnavailable:
        raise
    except Exception as error:  # those of the library for HTTP, too, which differs by version
        revision = where["revision"] or "its main branch"
        raise HubUnavailable(
            f"cannot read {file} of {repo_id} at {revision}: {_reason(error)}; wanted a repository that has this file, or one "
            "downloaded before; check the name, the revision, the connection, and the token (hf auth login)"
        ) from error
    _remember(Path(path), where["revision"] or "main", found.commit_hash)
    return path


def _remember(path: Path, revision: str, commit: str) -> None:
    """Note in the folder for downloads which commit a branch or tag was at: offline, a file is looked up by it.

    `path` is that of a downloaded file, `snapshots/<commit>/<file>`. huggingface_hub notes nothing where a commit is asked for.
    """
    noted = path.parents[2] / "refs" / revision
    with suppress(OSError):  # the folder may be read-only
        if revision != commit and not (noted.is_file() and noted.read_text() == commit):
            noted.parent.mkdir(parents=True, exist_ok=True)
            atomic_write.write(noted, commit.encode())


def _pushed(
    folder: Path,
    save: Callable[[str], None],
    file: str,
    repo_id: str,
    message: str,
    private: bool | None,
    token: str | bool | None,
    branch: str | None,
    create_pr: bool | None,
) -> str:
    """The address of the commit of a folder's file and card, which `save` writes anew for another name of the repository."""
    from huggingface_hub import CommitOperationAdd, HfApi  # noqa: PLC0415

    api = HfApi(token=token, library_name=LIBRARY, library_version=versions()[LIBRARY])
    try:
        made = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if made != repo_id:  # it was given without its owner
            save(made)
        repo_id = made
        if branch is not None and not create_pr:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        keep = _has_card_of_others(repo_id, token, branch)
        names = [file, *[CARD] * (not keep)]
        operations = [CommitOperationAdd(name, folder / name) for name in names]
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=branch, create_pr=create_pr)
    except Exception as error:
        raise HubUnavailable(
            f"cannot push {file} to {repo_id}: {_reason(error)}; wanted a repository that you may write to; check the name, "
            "the connection, and the token (hf auth login)"
        ) from error
    if keep:
        warnings.warn(f"{repo_id} has a {CARD} that arrowhead did not write, which was left as it is", CardKept, stacklevel=3)
    return str(commit)


def _has_card_of_others(repo_id: str, token: str | bool | None, branch: str | None) -> bool:
    """Whether a repository has a card that arrowhead did not write."""
    from huggingface_hub import hf_hub_download  # noqa: PLC0415
    from huggingface_hub.errors import RemoteEntryNotFoundError  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as cache:
        try:
            found = hf_hub_download(repo_id, CARD, revision=branch, token=token, cache_dir=cache, dry_run=True)
            if found.file_size is not None and found.file_size > limits.MAX_BYTES:
                return True
            path = hf_hub_download(repo_id, CARD, revision=found.commit_hash, token=token, cache_dir=cache)
        except RemoteEntryNotFoundError:
            return False
        return _is_of_others(Path(path))


def _reason(error: Exception) -> str:
    """The message of an error of huggingface_hub, in one line."""
    return " ".join(limits.shortened(error).split()) or type(error).__name__
