"""Folders of runs: what binds a run is recorded, and whatever a file holds, an error is one line that names it."""

import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from extras import needs

needs("nni", "sklearn")

import folder_kinds
import rows
import search_runs
from folder_kinds import FILES, READERS, RECIPE, RETRAIN, SEARCH, contents, copied, open_run, rewrite, settings_of
from trial_runs import TINY as SPACE
from trial_runs import sized

from nni_spaces import HBSpace, run_trials
from nni_spaces.runs.callback import RunCallback
from nni_spaces.runs.checkpoints import read_checkpoint, seal
from nni_spaces.runs.progressive import search_progressively
from nni_spaces.runs.retrain import retrain
from nni_spaces.runs.search import search
from optinspired_plugins._files import clear_temporaries, printable, read_file
from optinspired_plugins.cells.genotype import Genotype, load_genotype
from optinspired_plugins.report.page import write_report
from optinspired_plugins.run_folder import digest_of, lock_folder, read_history, resolve_devices
from optinspired_plugins.simulation import simulate

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    folder_kinds.make_folders(root)
    return root


@contextmanager
def within(seconds):
    """Let what would wait for ever fail."""

    def give_up(*_):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def error_of(read, *args):
    """The message of what must be one line."""
    with pytest.raises((ValueError, OSError)) as caught:
        read(*args)
    message = str(caught.value)
    assert message.isprintable(), message
    assert len(message) < 3_000
    return message


# --- every file of every kind of run ----------------------------------------------------------------------------------


def check_mutations(folders, to, seed, count):
    """A damaged file is refused in one line that names it, or means what it meant; nothing is overwritten."""
    draw, refused = random.Random(seed), 0
    for kind in READERS:
        copied(folders, kind, to)
    for _ in range(count):
        kind, name = draw.choice(FILES)
        folder, path = to / kind, to / kind / name
        good = path.read_bytes()
        path.write_bytes(folder_kinds.damage(name, good, draw))
        before = contents(folder)
        try:
            READERS[kind](folder)
        except (ValueError, OSError) as error:
            message, refused = str(error), refused + 1
            assert message.isprintable()
            assert len(message) < 3_000
            assert name in message or str(folder) in message, message
        else:
            assert_harmless(kind, path, good)
        # Where only the place of the images was damaged, settings are written as they are.
        assert contents(folder) in (before, {**before, path: good})
        path.write_bytes(good)
    return refused


def assert_harmless(kind, path, good):
    """What a run relies on is what it was."""
    if kind not in ("search", "retraining"):
        return
    if path.suffix in (".pt", ".safetensors"):
        assert path.read_bytes() == good or (path.suffix == ".pt" and forged(path))
    if path.name == "history.json":
        assert digest_of(read_history(path.parent)[:2]) == digest_of(json.loads(good))
    if path.name == "settings.json":
        stored = {**folder_kinds.written_settings(kind), **json.loads(path.read_text())}
        assert stored == folder_kinds.written_settings(kind)


def forged(path):
    """A right digest, and none of what binds the checkpoint changed."""
    return "RunCallback" in read_checkpoint(path)["callbacks"]


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_file_is_refused_in_one_line_or_harmless(folders, seed, tmp_path):
    assert check_mutations(folders, tmp_path, seed, 100) > 50


@pytest.mark.every_model
@pytest.mark.parametrize("seed", range(100, 110))
def test_five_thousand_damaged_files(folders, seed, tmp_path):
    assert check_mutations(folders, tmp_path, seed, 500) > 250


@pytest.mark.parametrize("kind", ["search", "retraining"])
def test_no_flipped_bit_of_a_checkpoint_is_accepted(kind, folders, tmp_path):
    folder, draw = copied(folders, kind, tmp_path), random.Random(0)
    good = (folder / "checkpoint.pt").read_bytes()
    for position in [*draw.sample(range(len(good)), 50), *range(len(good) - 80, len(good))]:
        flipped = good[:position] + bytes([good[position] ^ 1 << draw.randrange(8)]) + good[position + 1 :]
        (folder / "checkpoint.pt").write_bytes(flipped)
        message = error_of(open_run, folder, settings_of(kind))
        assert "checkpoint.pt: damaged; remove it to begin anew, and history.json with it" in message


@pytest.mark.parametrize(("kind", "name"), FILES, ids=lambda value: value)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_named_and_waited_for_by_none(make, kind, name, folders, tmp_path):
    folder = copied(folders, kind, tmp_path)
    (folder / name).unlink()
    make(folder / name)
    with within(60):
        assert name in error_of(READERS[kind], folder)


def test_files_of_a_stranger_may_be_links_but_not_pipes_or_large(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert read_file(tmp_path / "link", 5) == b"12345"
    with pytest.raises(ValueError, match="larger than 4 bytes: must be less"):
        read_file(tmp_path / "file", 4)
    os.mkfifo(tmp_path / "pipe")
    for read in (Genotype.load, load_genotype):
        with within(60):
            assert "pipe" in error_of(read, tmp_path / "pipe")


def test_text_of_a_file_is_printed_without_what_a_terminal_obeys():
    assert printable("a\x1b[31m\n\x9b\u202e\ud800é") == r"a\x1b[31m\n\x9b\u202e\ud800é"


# --- what binds a run -------------------------------------------------------------------------------------------------


def test_precision_and_devices_are_recorded_and_compared(folders):
    written = json.loads((folders / "retraining" / "settings.json").read_text())
    assert (written["precision"], written["devices"]) == ("32-true", 1)
    message = r"holds a run with precision='32-true' \(here 'bf16-mixed'\): choose another folder"
    with pytest.raises(ValueError, match=message):
        retrain(RETRAIN, folders / "retraining", accelerator="cpu", precision="bf16-mixed")
    with pytest.raises(ValueError, match=r"holds a run with devices=1 \(here 2\)"):
        retrain(RETRAIN, folders / "retraining", accelerator="cpu", devices=2)
    with pytest.raises(ValueError, match=r"holds a run with devices=1 \(here 2\)"):
        search(SEARCH, folders / "search", accelerator="cpu", devices=2)
    assert json.loads((folders / "search" / "run.json").read_text())["accelerator"] == "cpu"


class Started(Exception):
    pass


def start(folder, settings, begin=search):
    """Run until the first batch is done."""

    def on_batch():
        raise Started

    with pytest.raises(Started):
        begin(settings, folder, accelerator="cpu", on_batch=on_batch)


@pytest.mark.parametrize(("begin", "settings"), [(search, SEARCH), (retrain, RETRAIN)])
def test_a_folder_in_which_nothing_has_finished_binds_nothing(begin, settings, tmp_path, monkeypatch):
    """The disk is full at the first checkpoint, after the history was written."""
    rename = os.replace

    def full(source, target):
        if os.fspath(target).endswith("checkpoint.pt"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            begin(settings, tmp_path, accelerator="cpu")
    assert len(read_history(tmp_path)) == 1
    start(tmp_path, replace(settings, seed=5), begin)
    assert json.loads((tmp_path / "settings.json").read_text())["seed"] == 5
    assert not (tmp_path / "history.json").exists()


@pytest.mark.parametrize("name", ["settings.json", "run.json", "history.json"])
def test_a_file_of_another_program_is_not_overwritten(name, tmp_path):
    (tmp_path / name).write_text('{"editor.fontSize": 12}')
    assert name in error_of(search, SEARCH, tmp_path)
    assert (tmp_path / name).read_text() == '{"editor.fontSize": 12}'


BAD_SETTINGS = {
    "deep": ("[" * 100_000, "nests deeper than 64 levels"),
    "huge": ('{"epochs": ' + "9" * 5_000 + "}", "Exceeds the limit"),
    "large": (json.dumps(dict(epochs=2**70)), "epochs=1180591620717411303424: must be of type int"),
    "not finite": ('{"lr": NaN}', "lr=nan: must be of type float"),
    "other type": ('{"lr": "high"}', "lr='high': must be of type float"),
    "truth": ('{"seed": true}', "seed=True: must be of type int"),
    "list": ("[]", "content is a list: must be a JSON object"),
    "map": ('{"allowed": [1]}', "allowed=[1]: must be of type Mapping[str, Sequence[str]] | None"),
    "map of what": ('{"allowed": {"a": 5}}', "allowed={'a': 5}: must be of type Mapping"),
    "unknown": ('{"\\u001b[31mcolour": 1}', r"'\x1b[31mcolour': must be one of space, init"),
    "out of range": ('{"epochs": 0}', "epochs=0: must be an integer ≥ 1"),
    "no Unicode": ('{"data": "\\ud800"}', "can't encode character"),
    "bytes": (b"\xff", "can't decode byte"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_settings_that_are_none_are_named(case, folders, tmp_path):
    content, expected = BAD_SETTINGS[case]
    folder = copied(folders, "search", tmp_path)
    (folder / "settings.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    message = error_of(search, SEARCH, folder)
    assert "settings.json: not the settings of such a run (" in message
    assert expected in message


def changed(**changes):
    return lambda found: {**found, **changes}


def without(name):
    return lambda found: {key: value for key, value in found.items() if key != name}


def with_nan(found):
    name = next(name for name, value in found["state_dict"].items() if value.is_floating_point())
    found["state_dict"][name].view(-1)[0] = float("nan")
    return found


def with_text(found):
    name = next(iter(found["state_dict"]))
    return {**found, "state_dict": {**found["state_dict"], name: "\x1b[31m"}}


BAD_CHECKPOINTS = {
    "text": (with_text, ": is a str, must be a tensor"),
    "no state": (without("state_dict"), "state_dict is a NoneType: must be a dict"),
    "no optimiser": (without("optimizer_states"), "optimizer_states is a NoneType: must be a list"),
    "no record": (changed(callbacks={}), "has no record of its run"),
    "record of other type": (changed(callbacks={"RunCallback": 5}), "has no record of its run"),
    "truth": (changed(epoch=True), "epoch is a bool: must be a int"),
    "too far": (changed(epoch=2), "epoch=2: must be below epochs=2"),
    "negative": (changed(epoch=-1), "epoch=-1: must be below epochs=2"),
    "NaN": (with_nan, ": must be finite"),
    "list": (lambda found: [found], "is a list: must be a dict"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
@pytest.mark.parametrize("kind", ["search", "retraining"])
def test_a_checkpoint_that_is_none_is_named(kind, case, folders, tmp_path):
    change, expected = BAD_CHECKPOINTS[case]
    folder = copied(folders, kind, tmp_path)
    path = folder / "checkpoint.pt"
    path.write_bytes(folder_kinds.reseal(change(torch.load(path, weights_only=True))))
    message = error_of(open_run, folder, settings_of(kind))
    assert "checkpoint.pt: damaged; remove it to begin anew" in message
    assert expected in message


def test_a_checkpoint_without_its_digest_is_refused(folders, tmp_path):
    folder = copied(folders, "search", tmp_path)
    torch.save(torch.load(folder / "checkpoint.pt", weights_only=True), folder / "checkpoint.pt")
    assert "checkpoint.pt: damaged" in (message := error_of(open_run, folder, SEARCH))
    assert "has no digest" in message


def test_a_checkpoint_of_another_kind_or_run_is_refused(folders, tmp_path):
    folder = copied(folders, "search", tmp_path)
    shutil.copy(folders / "retraining" / "checkpoint.pt", folder)
    assert "holds a run with genotype=" in error_of(open_run, folder, SEARCH)
    shutil.copy(folders / "search" / "checkpoint.pt", folder)
    rewrite(folder / "settings.json", seed=3)
    assert "holds a run with seed=0 (here 3)" in error_of(open_run, folder, replace(SEARCH, seed=3))
    (folder / "settings.json").unlink()
    assert "holds a run with seed=0 (here 3)" in error_of(open_run, folder, replace(SEARCH, seed=3))
    assert open_run(folder, SEARCH).first_epoch == 2


def test_a_checkpoint_of_another_network_is_named_before_it_is_loaded(folders):
    run = open_run(folders / "search", SEARCH)
    message = error_of(run.setup, None, torch.nn.Linear(2, 2), "fit")
    assert "checkpoint.pt: damaged" in message
    assert "must have None" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: [], "has 0 epochs: must have the 2 of checkpoint.pt"),
        (lambda entries: entries[:1], "has 1 epochs: must have the 2 of checkpoint.pt"),
        (lambda entries: entries[1:], "entry 0, epoch=1: must be 0"),
        (lambda entries: [entries[0], {**entries[1], "train_loss": 0.5}], "entries 0 to 1 differ from checkpoint.pt"),
        (lambda entries: [entries[0], without("seconds")(entries[1])], "entry 1, seconds: is missing"),
        (lambda entries: [entries[0], {**entries[1], "train_top1": 101}], "entry 1, 'train_top1'=101: must be"),
    ],
)
@pytest.mark.parametrize("kind", ["search", "retraining"])
def test_a_history_that_is_not_the_checkpoints_is_refused(kind, change, message, folders, tmp_path):
    folder = copied(folders, kind, tmp_path)
    (folder / "history.json").write_text(json.dumps(change(read_history(folder))))
    found = error_of(READERS[kind], folder)
    assert "history.json: " in found
    assert message in found


@pytest.mark.parametrize("kind", ["search", "retraining"])
def test_a_history_or_checkpoint_that_is_gone_is_refused(kind, folders, tmp_path):
    folder, history = copied(folders, kind, tmp_path), (folders / kind / "history.json").read_bytes()
    (folder / "history.json").unlink()
    assert "history.json: has 0 epochs: must have the 2 of checkpoint.pt" in error_of(READERS[kind], folder)
    (folder / "history.json").write_bytes(history)
    (folder / "checkpoint.pt").unlink()
    assert "checkpoint.pt: is missing, and history.json has 2 epochs" in error_of(READERS[kind], folder)


def test_a_history_that_is_an_epoch_ahead_goes_on(folders, tmp_path):
    """Of a run that was killed between history and checkpoint."""
    folder = copied(folders, "search", tmp_path)
    entries = read_history(folder)
    (folder / "history.json").write_text(json.dumps([*entries, {**entries[1], "epoch": 2}]))
    assert open_run(folder, SEARCH).first_epoch == 2


def test_weights_that_are_not_the_checkpoints_are_refused(folders, tmp_path):
    folder = copied(folders, "retraining", tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(ValueError, match=r"model.safetensors: is not the network of checkpoint.pt; remove it to have"):
        retrain(RETRAIN, folder, accelerator="cpu")


def test_a_sealed_archive_is_one_that_others_read(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    sealed = seal((tmp_path / "a.pt").read_bytes())
    assert seal(sealed) == sealed
    (tmp_path / "a.pt").write_bytes(sealed)
    assert torch.load(tmp_path / "a.pt", weights_only=True)["a"].tolist() == [1, 1, 1]


# --- locks and what a kill leaves -------------------------------------------------------------------------------------

LOCKS = {
    "run": (".lock", lambda folder: lock_folder(folder)),
    "table": (".table4.csv.lock", lambda folder: rows._locked(folder / "table4.csv")),
    "simulation": (".table2.csv.lock", lambda folder: simulating(folder)),
}


@contextmanager
def simulating(folder):
    """Be in the middle of a simulation."""

    def on_run(run, found):
        raise Started

    with pytest.raises(Started):
        simulate(folder / "table2.csv", ("gd",), (1,), (0,), RECIPE, on_run=on_run)
    yield


def enter(context):
    with context:
        pass


@pytest.mark.parametrize("kind", LOCKS)
def test_a_lock_follows_no_link_empties_nothing_and_waits_for_no_pipe(kind, tmp_path):
    name, hold = LOCKS[kind]
    folder, lock = tmp_path / "run", tmp_path / "run" / LOCKS[kind][0]
    folder.mkdir()
    (tmp_path / "precious").write_text("kept")
    for target in ("precious", "nothing"):
        lock.symlink_to(tmp_path / target)
        assert f"{name}: is a link: must be a regular file" in error_of(enter, hold(folder))
        lock.unlink()
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == {"precious": "kept"}
    os.mkfifo(lock)
    with within(60):
        assert f"{name}: must be a regular file" in error_of(enter, hold(folder))
    lock.unlink()
    lock.write_text("kept")
    enter(hold(folder))
    assert lock.read_text() == "kept"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.parametrize("kind", LOCKS)
def test_a_file_system_without_locks_is_named_with_a_way_out(kind, number, tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.lockf", lockf)
    with pytest.raises(
        OSError, match=r"its file system does not lock files .*: must be a folder on one that"
    ) as caught:
        enter(LOCKS[kind][1](tmp_path))
    assert caught.value.errno == number
    assert f"out={str(tmp_path)!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name"), [("run", "history.json"), ("table", "table4.csv"), ("simulation", "table2.csv")]
)
def test_what_a_kill_left_is_removed_at_the_next_start_and_nothing_else(kind, name, tmp_path):
    (tmp_path / f".{name}.9d6d1cb2").write_text("half")
    others = {f".{name}.backup", f".{name}.9d6d1cb2~", ".notes.9d6d1cb2", f"{name}.9d6d1cb2", f".{name}.9D6D1CB2"}
    for other in others:
        (tmp_path / other).write_text("kept")
    (tmp_path / f".{name}.00000000").symlink_to("elsewhere")
    (tmp_path / f".{name}.11111111").mkdir()
    enter(LOCKS[kind][1](tmp_path))
    left = {path.name for path in tmp_path.iterdir()} - {LOCKS[kind][0], name}
    assert left == others | {f".{name}.00000000", f".{name}.11111111"}


@pytest.mark.slow
def test_what_another_process_is_writing_stays(tmp_path):
    context = multiprocessing.get_context("forkserver")
    held, done = context.Event(), context.Event()
    process = context.Process(target=search_runs.hold, args=(tmp_path, held, done))
    process.start()
    assert held.wait(120)
    (tmp_path / ".history.json.9d6d1cb2").write_text("half")
    with pytest.raises(RuntimeError, match="another process is running there"):
        enter(lock_folder(tmp_path))
    assert (tmp_path / ".history.json.9d6d1cb2").exists()
    done.set()
    process.join(60)
    enter(lock_folder(tmp_path))
    assert not (tmp_path / ".history.json.9d6d1cb2").exists()


def test_a_killed_write_is_found_by_the_name_that_it_has(tmp_path):
    code = """if True:
        import os, signal
        from pathlib import Path
        from optinspired_plugins._files import write_atomically
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        write_atomically(Path("table2.csv"), "text")
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    clear_temporaries(tmp_path, ["table2.csv"])
    assert not list(tmp_path.iterdir())


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "devices", "expected"),
    [
        ({}, None, 1),
        ({}, 3, 3),
        ({"WORLD_SIZE": "2", "RANK": "1"}, None, 2),
        ({"WORLD_SIZE": "2", "RANK": "1"}, 2, 2),
        ({"WORLD_SIZE": "1"}, None, 1),
        ({"WORLD_SIZE": "2", "RANK": "1"}, 1, "devices=1: must be 2, the number of processes by WORLD_SIZE"),
        ({"WORLD_SIZE": "1", "RANK": "0"}, 2, "devices=2: must be 1, the number of processes by WORLD_SIZE"),
        ({"WORLD_SIZE": "two"}, None, "WORLD_SIZE='two': must be an integer ≥ 1"),
        ({"WORLD_SIZE": "0"}, None, "WORLD_SIZE='0': must be an integer ≥ 1"),
        ({"LOCAL_RANK": "1"}, None, "devices=1: must be above the number of this process, RANK=1"),
        ({}, 0, "devices=0: must be an integer ≥ 1"),
    ],
)
def test_the_processes_that_there_are_is_how_many_share_a_run(environment, devices, expected, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, int):
        assert resolve_devices(devices) == expected
    else:
        with pytest.raises(ValueError, match=re.escape(expected)):
            resolve_devices(devices)


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    "begin",
    [
        lambda folder: search(SEARCH, folder, devices=1),
        lambda folder: search_progressively(replace(SEARCH, strategy="p-darts"), folder, devices=1),
        lambda folder: retrain(RETRAIN, folder, devices=1),
        lambda folder: run_trials(HBSpace(**SPACE), None, sized(), folder, 1),
        lambda folder: enter(lock_folder(folder)),
    ],
    ids=["search", "progressive", "retrain", "trials", "locked"],
)
def test_other_processes_than_devices_are_refused_before_anything_is_written(begin, rank, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(ValueError, match="devices=1: must be 2"):
        begin(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_search_under_torchrun_is_one_search(tmp_path):
    """Without a number of devices: in both processes, and each file written once."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from nni_spaces.runs.search import SearchSettings, search\n"
        "settings = SearchSettings(data='digits', limit=128, epochs=1, channels=2, cells=3, nodes=1, batch_size=16)\n"
        "search(settings, sys.argv[1], accelerator='cpu')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "run")], env=env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["devices"] == 2
    assert len(read_history(tmp_path / "run")) == 1


def test_the_report_of_a_damaged_run_writes_nothing(folders, tmp_path):
    folder = copied(folders, "report", tmp_path)
    rewrite(folder / "settings.json", data="\ud800")
    assert "settings.json" in error_of(write_report, folder)
    assert not (folder / "report.html").exists()


def test_a_callbacks_state_is_what_binds_a_checkpoint(folders):
    run = open_run(folders / "search", SEARCH)
    assert isinstance(run, RunCallback)
    assert run.state_dict()["settings"].keys() == json.loads(
        (folders / "search" / "settings.json").read_text()
    ).keys() - {"data"}
