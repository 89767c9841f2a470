"""Train the model of an mmengine config.

mmengine has no command for this; its Runner does the work.

    python examples/mm/train.py examples/mm/hbnet20_folder.py --data runs/digits --work-dir runs/mm

On torch ≥ 2.6, ``--resume`` needs TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 in the environment: mmengine's checkpoints hold
objects, and torch then reads them. Resume only from your own files.

Needs ``pip install ".[mm]"``.
"""

from __future__ import annotations

import argparse
import os

from mmengine.config import Config, DictAction
from mmengine.runner import Runner


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--data", help="the folder DATA of these configs, with train/<class>/ and val/<class>/")
    parser.add_argument("--work-dir", required=True, help="for checkpoints and logs")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in the work directory")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={}, help="key=value, dots for depth")
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    arguments = parser.parse_args()
    if arguments.data:
        os.environ["DATA"] = arguments.data
    config = Config.fromfile(arguments.config)
    config.merge_from_dict(arguments.cfg_options)
    config.work_dir, config.resume, config.launcher = arguments.work_dir, arguments.resume, arguments.launcher
    Runner.from_cfg(config).train()


if __name__ == "__main__":
    main()
