"""Downloads from the Hugging Face Hub, compared with what the Hub says of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from timm.models._hub import hf_split

__all__ = ["CONFIG", "WEIGHTS", "DamagedDownloadError", "verified_download"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"  # as timm names them


class DamagedDownloadError(RuntimeError):
    """What was downloaded is not what the Hub has."""


@contextmanager
def verified_download(model_id: str, cache_dir: str | Path | None = None) -> Iterator[None]:
    """Around a load from the Hub: refuse files whose bytes are not what the Hub has, and take them out of the cache.

    huggingface_hub compares sizes only. In its cache a file's name is its hash, where the system has links.

    Args:
        model_id: `OWNER/NAME`, or `OWNER/NAME@REVISION`.
        cache_dir: The Hub's cache, where it is not the usual one.

    Raises:
        DamagedDownloadError: A file is damaged. Loading again downloads it again.
    """
    try:
        yield
    finally:
        repo_id, revision = hf_split(model_id)
        for name in (CONFIG, WEIGHTS):
            found = try_to_load_from_cache(repo_id, name, cache_dir=cache_dir, revision=revision)
            if isinstance(found, str) and not _is_as_named(file := Path(found)):
                (file.parent / file.readlink()).unlink(missing_ok=True)
                file.unlink()
                raise DamagedDownloadError(
                    f"{name} of {model_id} was damaged in download, and is out of the cache: load it again"
                )


def _is_as_named(file: Path) -> bool:
    """Whether a file's bytes have the hash that the link to them names: of a large file SHA-256, else Git's."""
    if not file.is_symlink() or len(name := file.readlink().name) not in (40, 64):
        return True
    with open(file, "rb") as stream:
        return name == (git_hash(stream.read()) if len(name) == 40 else sha_fileobj(stream).hex())
