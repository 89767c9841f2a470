"""Checkpoints of a run: they end with a digest, and are read without unpickling objects."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nni_spaces._nni  # noqa: F401

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from optinspired_plugins._checks import short
from optinspired_plugins._files import printable, read_file, write_atomically

__all__ = ["SealedCheckpoints", "read_checkpoint"]

# Entries that Lightning needs to resume, and their types.
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
    """Return a zip archive with its SHA-256 as its comment.

    Archive and digest are one file, so that a killed process cannot write only one of them. ValueError for other bytes.
    """
    body = archive[: archive.rindex(END_OF_ARCHIVE) + 20]
    comment = b"sha256:" + hashlib.sha256(body).hexdigest().encode()
    return body + len(comment).to_bytes(2, "little") + comment


def _check_seal(archive: bytes) -> None:
    """ValueError unless an archive ends with its digest."""
    if not SEAL.fullmatch(archive, max(0, len(archive) - SEAL_BYTES)):
        raise ValueError("has no digest")
    if seal(archive[: -SEAL_BYTES - 2] + bytes(2)) != archive:
        raise ValueError("its digest does not match its content")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint.

    Raises:
        OSError: the file cannot be read.
        ValueError: the checkpoint is damaged, or its weights are not finite.
    """
    content = read_file(path, limit=None)
    try:
        _check_seal(content)
        checkpoint = _load(content)
        for name, kind in CHECKPOINT.items():
            if not isinstance(checkpoint.get(name), kind) or isinstance(checkpoint[name], bool):
                raise ValueError(f"{name} is a {type(checkpoint.get(name)).__name__}: must be a {kind.__name__}")
        for name, value in checkpoint["state_dict"].items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"state_dict, {short(name)}: is a {type(value).__name__}, must be a tensor")
        wrong = non_finite_name(checkpoint["state_dict"])
        if wrong is not None:
            raise ValueError(f"state_dict, {short(wrong)}: must be finite")
    except ValueError as error:
        raise damaged_checkpoint(path, str(error)) from None
    return checkpoint


def damaged_checkpoint(path: Path, why: str) -> ValueError:
    """Return the error for a checkpoint that cannot be used; its message names the ways out."""
    ways = "damaged; remove it to begin anew, and history.json with it, or choose another folder"
    return ValueError(f"{printable(path)}: {ways} ({printable(why)})")


def _load(content: bytes) -> dict[str, Any]:
    try:
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise any error
        raise ValueError(f"{type(error).__name__} when it is read") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"is a {type(checkpoint).__name__}: must be a dict")
    return checkpoint


def non_finite_name(state: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of a weight or statistic that is not finite, ``None`` if all are finite."""
    return next((name for name, value in state.items() if not value.isfinite().all()), None)


class SealedCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints with a digest; a file is replaced as a whole, and its digest is checked."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        archive = io.BytesIO()
        torch.save(checkpoint, archive)
        write_atomically(Path(path), seal(archive.getvalue()))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint to the CPU without unpickling objects; the other arguments have no effect."""
        return read_checkpoint(Path(path))
