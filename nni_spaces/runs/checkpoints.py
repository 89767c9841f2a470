"""Checkpoints of a run: sealed with a digest, and read as data alone."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from optinspired_plugins._checks import short
from optinspired_plugins._files import printable, read_file, write_atomically

__all__ = ["SealedCheckpoints", "read_checkpoint"]

# What Lightning needs to go on, and which type it must have.
CHECKPOINT = {
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
    "state_dict": dict,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}


# A zip archive, as torch writes checkpoints, ends with this, 16 bytes, the length of a comment, and the comment.
END_OF_ARCHIVE = b"PK\x05\x06"


SEAL = re.compile(rb"sha256:[0-9a-f]{64}")


SEAL_BYTES = 71


def seal(archive: bytes) -> bytes:
    """Return a zip archive with its SHA-256 as its comment, so that no kill can part them.

    Raises:
        ValueError: it is no zip archive.
    """
    body = archive[: archive.rindex(END_OF_ARCHIVE) + 20]
    comment = b"sha256:" + hashlib.sha256(body).hexdigest().encode()
    return body + len(comment).to_bytes(2, "little") + comment


def _is_sealed(archive: bytes) -> bool:
    """Whether an archive has a digest.

    Raises:
        ValueError: it is another's.
    """
    if not SEAL.fullmatch(archive, max(0, len(archive) - SEAL_BYTES)):
        return False
    if seal(archive[: -SEAL_BYTES - 2] + bytes(2)) != archive:
        raise ValueError("its digest is that of another content")
    return True


def read_checkpoint(path: Path) -> tuple[dict[str, Any], bool]:
    """Return a checkpoint, and whether it has a digest, as those of older versions have not.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged; its weights are not finite.
    """
    content = read_file(path, limit=None)
    try:
        sealed = _is_sealed(content)
        found = _unpickled(content)
        for name, kind in CHECKPOINT.items():
            if not isinstance(found.get(name), kind) or isinstance(found[name], bool):
                raise ValueError(f"{name} is a {type(found.get(name)).__name__}: must be a {kind.__name__}")
        for name, value in found["state_dict"].items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"state_dict, {short(name)}: is a {type(value).__name__}, must be a tensor")
        wrong = not_finite(found["state_dict"])
        if wrong is not None:
            raise ValueError(f"state_dict, {short(wrong)}: must be finite")
    except ValueError as error:
        raise damaged(path, str(error)) from None
    return found, sealed


def damaged(path: Path, why: str) -> ValueError:
    """Return the error of a checkpoint that cannot be used, with the ways out."""
    ways = "damaged; remove it to begin anew, and history.json with it, or choose another folder"
    return ValueError(f"{printable(path)}: {ways} ({printable(why)})")


def _unpickled(content: bytes) -> dict[str, Any]:
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # there is no end to the ways in which a damaged pickle fails
        raise ValueError(f"{type(error).__name__} when it is read") from None
    if not isinstance(found, dict):
        raise ValueError(f"is a {type(found).__name__}: must be a dict")
    return found


def not_finite(state: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of a weight or statistic that is not finite, ``None`` where all are."""
    return next((name for name, value in state.items() if not value.isfinite().all()), None)


class SealedCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints, written whole or not at all, with a digest that is checked when they are read."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        archive = io.BytesIO()
        torch.save(checkpoint, archive)
        write_atomically(Path(path), seal(archive.getvalue()))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, to the CPU and without objects, whatever the arguments say."""
        return read_checkpoint(Path(path))[0]
