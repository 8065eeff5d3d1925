"""Repositories of the Hugging Face Hub, fetched part by part."""

from __future__ import annotations

from pathlib import Path

from tpuvid.errors import InputError, TpuvidError


def download(repo_id: str, pattern: str) -> Path:
    """The local snapshot of a Hub repository, holding at least the files of `pattern`; safetensors only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(repo_id, allow_patterns=[pattern], ignore_patterns=["*.bin", "*.pt", "*.pth", "*.msgpack"])
        )
    except HFValidationError:
        raise InputError(f"{repo_id!r} is neither a folder nor a valid Hub id; give one of the form owner/name") from None
    except GatedRepoError:
        raise InputError(f"{repo_id}: is gated; accept its terms on the Hub and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise InputError(f"{repo_id}: is no repository on the Hub (or a private one: set HF_TOKEN)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TpuvidError(
            f"{repo_id}: could not be fetched from the Hub ({reason}); check the network, or give a local folder as --model"
        ) from None
