"""Write the weights of a checkpoint of timm's train.py as this package ships them.

    python examples/reproduce/pack_weights.py output/train/hbnet20-cifar10/last.pth.tar hbnet20.cifar10.safetensors

Weights are rounded to float16. Running statistics keep float32, since a variance can exceed float16's range.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.models import load_state_dict

__all__ = ["pack"]

FULL_PRECISION = ("running_mean", "running_var", "rule")


def pack(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the entries in the precision of the file."""
    rounded = {name: value.is_floating_point() and not name.endswith(FULL_PRECISION) for name, value in state.items()}
    return {name: (value.half() if rounded[name] else value).contiguous() for name, value in state.items()}


def main() -> None:
    """Convert a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, help="the file to write, .safetensors")
    args = parser.parse_args()
    save_file(pack(load_state_dict(str(args.checkpoint))), args.out)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
