"""JSON and safetensors of strangers, read with their mistakes named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (lets numpy, and so safetensors, know bfloat16)

from tpuvid.errors import InputError
from tpuvid.files.untrusted import check_header, check_size, parse_json


def read_json(path: Path, remedy: str = "download the checkpoint again") -> dict[str, Any]:
    """A JSON object, by default from a checkpoint folder; raises `InputError` for anything else."""
    try:
        check_size(path)
        value = parse_json(path, path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: is missing; {remedy}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is no readable JSON ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, not a JSON object; {remedy}")
    return value


@contextmanager
def readable_safetensors(path: Path) -> Iterator[None]:
    """Check the header of `path`, and turn what goes wrong in opening it as safetensors into an `InputError` with a remedy."""
    from safetensors import SafetensorError

    try:
        check_header(path)
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: does not exist; check the path, or run what makes it") from None
    except SafetensorError as error:
        raise InputError(
            f"{path}: is no complete safetensors file ({error}); it is truncated or foreign: make or fetch it again"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror or error})") from None
