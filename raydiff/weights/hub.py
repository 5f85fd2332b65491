"""The Hugging Face Hub: fetch only the files of a checkpoint that are used, or find them cached.

HF_HUB_OFFLINE, HF_HOME, HF_TOKEN and HF_ENDPOINT are honoured, as huggingface_hub documents them.
"""

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from huggingface_hub import (
    constants,
    model_info,
    parse_safetensors_file_metadata,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from raydiff.errors import ModelError
from raydiff.weights.aliases import read_alias
from raydiff.weights.components import Needed
from raydiff.weights.folder import FolderFiles, Variant, choose_files, list_names, read_json
from raydiff.weights.headers import TensorHeader, read_header

CONNECTION_ERROR = cast(type[Exception], HfHubHTTPError.__bases__[0])
"""The base error of huggingface_hub's HTTP client, which is httpx or httpx2 by its version."""

NUM_READERS = 8
"""Headers read at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HubFolder:
    """A snapshot of a repository; its weight files may be on the Hub alone."""

    repo: str
    path: Path
    """The snapshot's folder."""
    files: FolderFiles

    @property
    def commit(self) -> str:
        """What the snapshot is of."""
        return self.path.name

    def read_headers(self) -> dict[Path, dict[str, TensorHeader]]:
        """Return the tensors of each weight file by the path that it would have here.

        Files that are not in the cache are asked for their first bytes. Raises ModelError.
        """
        names = [name for files in self.files.weights.values() for name in files]
        with ThreadPoolExecutor(NUM_READERS) as pool, _explained(self.repo, self.commit):
            headers = pool.map(self._read_header, names)
            return {self.path / name: one for name, one in zip(names, headers, strict=True)}

    def _read_header(self, name: str) -> dict[str, TensorHeader]:
        if (self.path / name).exists():
            return read_header(self.path / name)
        try:
            header = parse_safetensors_file_metadata(self.repo, name, revision=self.commit)
        except SafetensorsParsingError as error:
            raise ModelError(f"{self.repo}: {name} is not safetensors: {error}") from None
        return {
            key: TensorHeader(
                dtype=tensor.dtype,
                shape=tuple(tensor.shape),
                size_bytes=tensor.data_offsets[1] - tensor.data_offsets[0],
                offset=tensor.data_offsets[0],
            )
            for key, tensor in header.tensors.items()
        }


def download_model(
    repo: str,
    *,
    revision: str | None,
    variant: Variant,
    dtype: str,
    needed: Needed | None = None,
    has_weights: bool = True,
) -> HubFolder:
    """Return the snapshot of a repository with all files that are used.

    Of components that are not `needed`, and of all without `has_weights`, it gets the configs
    alone.

    With HF_HUB_OFFLINE=1, or without a connection, the choice is among the files in the cache.
    Raises ModelError when they are neither in the cache nor to be had, and says the way out.
    """
    with _explained(repo, revision):
        # The indexes name the shards, so they come before the choice of files. Offline they are
        # not asked for: huggingface_hub would refuse a snapshot that lacks one, needed or not.
        indexes = [] if constants.HF_HUB_OFFLINE else ["*.safetensors.index*.json"]
        folder = _snapshot(repo, revision, ["model_index.json", *indexes])
        names = _repo_names(repo, folder.name)
        files = _choose(repo, folder, names, variant=variant, dtype=dtype, needed=needed)
        if names is not None:
            _snapshot(repo, folder.name, files.names if has_weights else files.small)
    return HubFolder(repo=repo, path=folder, files=files)


def download_tokenizer(family: str, name: str) -> Path:
    """Return the folder of a family's published tokenizer (`tokenizer` or `tokenizer_2`)."""
    alias = read_alias(family)
    repo = alias.hub_id
    with _explained(repo, alias.revision):
        folder = _snapshot(repo, alias.revision, [f"{name}/*"]) / name
    if not folder.is_dir():
        raise ModelError(
            f"{repo}: its {name}/ is not in the Hub's cache, and a single file carries no "
            f"tokenizer. Put a {name}/ folder (vocab.json, merges.txt) beside the file, or unset "
            "HF_HUB_OFFLINE"
        )
    return folder


def _snapshot(repo: str, revision: str | None, names: Collection[str]) -> Path:
    folder = snapshot_download(
        repo,
        revision=revision,
        allow_patterns=list(names),
        local_files_only=constants.HF_HUB_OFFLINE,
    )
    return Path(folder)


def _repo_names(repo: str, commit: str) -> list[str] | None:
    """Return the repository's files, or None when the Hub cannot be reached."""
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        # Not list_repo_files: that one tries for half a minute when there is no connection.
        return [file.rfilename for file in model_info(repo, revision=commit).siblings or ()]
    except HfHubHTTPError:
        raise
    except CONNECTION_ERROR:
        return None


def _choose(
    repo: str,
    folder: Path,
    names: Collection[str] | None,
    *,
    variant: Variant,
    dtype: str,
    needed: Needed | None,
) -> FolderFiles:
    def read(name: str) -> dict[str, object]:
        return read_json(folder / name)

    if names is not None:
        return choose_files(repo, names, read, variant=variant, dtype=dtype, needed=needed)
    there = list_names(folder)
    try:
        return choose_files(repo, there, read, variant=variant, dtype=dtype, needed=needed)
    except ModelError as error:
        raise ModelError(
            f"{error}\nThis was looked for in the Hub's cache, {folder}, as the Hub is not to be "
            f"reached: {_way_to_cache(repo)}"
        ) from None


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turn huggingface_hub's errors into ModelError with the way out."""
    try:
        yield
    except GatedRepoError:
        raise ModelError(
            f"{repo}: the Hub gives it only to accounts that accepted its licence. Accept it at "
            f"https://huggingface.co/{repo}, then run `hf auth login` or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{repo}: there is no such folder here, and on the Hub no such model that your account "
            "may see. Check the name; for a private one run `hf auth login` or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(
            f"{repo}: the Hub has no revision {revision!r} of it; see "
            f"https://huggingface.co/{repo}/commits/main, or leave the revision out"
        ) from None
    except LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise ModelError(
            f"{repo}: not in the Hub's cache {constants.HF_HUB_CACHE}, or not whole, and {why}: "
            f"{_way_to_cache(repo)}"
        ) from None
    except HFValidationError as error:
        raise ModelError(f"{repo}: {error}") from None
    except (CONNECTION_ERROR, OSError) as error:
        raise ModelError(f"{repo}: download failed: {error}. Try again") from None


def _way_to_cache(repo: str) -> str:
    return (
        f"unset HF_HUB_OFFLINE and run `raydiff models pull {repo}` where there is a connection "
        "(HF_HOME can then be copied), or name a local folder"
    )
