"""A script that searches in two processes; each writes down what it holds. Lightning starts it again for the second."""

import json
import os
import sys
from pathlib import Path

import torch

import nni_spaces.runs.search
from optinspired_plugins import Genotype


class Recording(nni_spaces.runs.search.RunCallback):
    def on_train_epoch_end(self, trainer, module):
        super().on_train_epoch_end(trainer, module)
        alphas = [alpha.detach().clone() for alpha in module.arch_parameters()]
        torch.save(alphas, self.folder / f"alpha-{trainer.global_rank}.pt")


def main(folder, settings):
    torch.set_num_threads(1)
    nni_spaces.runs.search.RunCallback = Recording
    save = Genotype.save

    def recorded_save(genotype, path):
        (folder / f"saved-by-{os.environ.get('LOCAL_RANK', 0)}").touch()
        save(genotype, path)

    Genotype.save = recorded_save
    genotype = nni_spaces.runs.search.search(
        nni_spaces.runs.search.SearchSettings(**settings), folder, accelerator="cpu", devices=2
    )
    (folder / f"returned-{os.environ.get('LOCAL_RANK', 0)}.json").write_text(genotype.to_json())


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
