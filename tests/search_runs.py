"""What a process of a killed search runs: imported by name from a fork server, so that each starts in no time."""

import multiprocessing
import os
import signal
from pathlib import Path

import torch


def run(folder, settings, workers=0, kill_at=None, kill_in_save=None, retraining=False):
    """Search or retrain; end by SIGKILL after a batch, or while the so-manieth file of an epoch is renamed."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for loaders, as in a process that a user starts
    from nni_spaces.runs.retrain import retrain
    from nni_spaces.runs.search import search
    from nni_spaces.runs.settings import RetrainSettings, SearchSettings

    seen = {"batches": 0, "saves": 0}

    def on_batch():
        seen["batches"] += 1
        if seen["batches"] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    if kill_in_save is not None:
        rename = os.replace

        def killing_rename(source, target):
            if Path(target).name in ("checkpoint.pt", "history.json"):
                seen["saves"] += 1
                if seen["saves"] == kill_in_save:
                    os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        os.replace = killing_rename
    if retraining:
        retrain(RetrainSettings(**settings), folder, workers, "cpu", on_batch=on_batch)
    else:
        search(SearchSettings(**settings), folder, workers, "cpu", on_batch=on_batch)


def hold(folder, held, done):
    """Hold a run's folder until told to let go."""
    from optinspired_plugins.run_folder import lock_folder

    with lock_folder(Path(folder)):
        held.set()
        done.wait(60)


def run_in_stages(folder, settings, stages, kill_at=None, kill_before=None):
    """Search stage by stage; end by SIGKILL after a batch of all, or before a file of the run is written."""
    torch.set_num_threads(1)
    from nni_spaces.runs.progressive import SearchStage, search_progressively
    from nni_spaces.runs.settings import SearchSettings

    batches, rename = [], os.replace

    def on_batch():
        batches.append(1)
        if len(batches) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def killing_rename(source, target):
        if kill_before is not None and Path(target) == Path(folder) / kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = killing_rename
    options = dict(stages=[SearchStage(*stage) for stage in stages], accelerator="cpu", on_batch=on_batch)
    search_progressively(SearchSettings(**settings), folder, **options)
