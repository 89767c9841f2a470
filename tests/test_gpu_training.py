"""Paired trainings of the GPU's benchmark, small and on the CPU: batches, starts, steps, turns and rows."""

import csv
import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import gpu
import gpu_training
import numpy as np
import pytest
import torch
from gpu_training import Batches, Data, Job, Recipe, Setting, Trainings
from PIL import Image
from torch import nn
from torch.testing import assert_close

CPU = torch.device("cpu")
SMALL = {"layers": (2, 2, 2), "channels": (4, 8, 8)}
RECIPE = Recipe(epochs=2, batch=8, warm_up=2)
ROUNDS = 6  # steps of RECIPE on 30 images


@pytest.fixture(autouse=True)
def networks(monkeypatch):
    """Two small networks."""
    small = {"HBNet": ("hbnet20", SMALL, ("0.1", "rule/3")), "ResNet": ("hbnet20_resnet", SMALL, ("0",))}
    everything = gpu_training.NETWORKS
    monkeypatch.setattr(gpu_training, "NETWORKS", small)
    return everything


@pytest.fixture
def arrays():
    """Images of noise: 30 to train, 20 to test."""
    generator = np.random.default_rng(0)
    counts = {"train": 30, "test": 20}
    x = {f"x_{part}": generator.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for part, n in counts.items()}
    return x | {f"y_{part}": np.arange(n) % 10 for part, n in counts.items()}


@pytest.fixture
def data(arrays):
    return Data.of(arrays, CPU)


@pytest.fixture
def train(data):
    """Train by two jobs at a time; return the rows, and the errors."""

    def run(jobs=2, settings=None, until=float("inf")):
        rows, errors = [], []
        trainings = Trainings(
            data, RECIPE, jobs, lambda **row: rows.append(row), lambda error, **row: errors.append((error, row))
        )
        trainings.run(gpu_training.settings(2) if settings is None else settings, until)
        return rows, errors

    return run


def job(data, start="0.1", seed=0):
    return Job(Setting("HBNet", start, seed), Batches(data, RECIPE, seed), RECIPE)


def by_setting(rows):
    return {(row["model"], row["start"], row["seed"]): row for row in rows}


# --- starts -----------------------------------------------------------------------------------------------------------


def test_every_network_takes_its_starts_and_small_images(networks, monkeypatch):
    monkeypatch.setattr(gpu_training, "NETWORKS", networks)
    for name, (_, options, starts) in networks.items():
        for start in starts:
            net = gpu_training.network(Setting(name, start, 0))
            for stage in net.stages() if hasattr(net, "replace_stages") else ():
                n = len(stage.transforms())
                if "reading" in options:
                    rule = min(1.0, sum(w * w for w in stage.gains()) ** -0.5)
                else:
                    rule = (n - n // 3 if name.startswith("HBNet") else n) ** -0.5
                gamma = {"rule": rule, "rule/3": rule / 3}.get(start) if start.startswith("rule") else float(start)
                for transform in stage.transforms():
                    assert_close(transform.last_norm().weight, torch.full_like(transform.last_norm().weight, gamma))
        assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(("start", "is_zero"), [("0", True), ("1", False)])
def test_the_last_convolutions_of_the_preactivation_resnet_start_at_0_or_as_the_others(
    networks, monkeypatch, start, is_zero
):
    monkeypatch.setattr(gpu_training, "NETWORKS", networks)
    net = gpu_training.network(Setting("pre-activation ResNet-56", start, 0))
    blocks = [block for stage in net.stages for block in stage.blocks]
    assert len(blocks) == 27
    assert {block.conv2.weight.abs().max().item() == 0 for block in blocks} == {is_zero}
    assert all(block.conv1.weight.abs().max() > 0 for block in blocks)


def test_a_seed_starts_with_the_same_weights_but_for_the_start():
    def weights(name, start, seed):
        net = gpu_training.network(Setting(name, start, seed))
        last = {id(transform.last_norm().weight) for stage in net.stages() for transform in stage}
        return [p for p in net.parameters() if id(p) not in last]

    first = weights("HBNet", "0.1", 0)
    for name, start in (("HBNet", "rule/3"), ("ResNet", "0")):
        assert all(a.equal(b) for a, b in zip(first, weights(name, start, 0), strict=True))
    assert not first[0].equal(weights("HBNet", "0.1", 1)[0])


def test_a_seed_is_complete_before_the_next():
    found = gpu_training.settings(2)
    assert [(s.model, s.start) for s in found[:3]] == [("HBNet", "0.1"), ("HBNet", "rule/3"), ("ResNet", "0")]
    assert [s.seed for s in found] == [0, 0, 0, 1, 1, 1]


# --- batches ----------------------------------------------------------------------------------------------------------


def test_networks_of_a_seed_see_the_same_batches(data, train, monkeypatch):
    seen = {}
    at = Batches.at

    def watched(batches, position):
        x, y = at(batches, position)
        seen.setdefault(int(position), []).append(x)
        return x, y

    monkeypatch.setattr(Batches, "at", watched)
    train(jobs=1)
    assert sorted(seen) == list(range(ROUNDS))
    for first, *others in seen.values():
        assert [other.equal(first) for other in others] == [True, True, False, False, False]


def test_an_epoch_takes_no_image_twice(data):
    batches = Batches(data, RECIPE, 0)
    assert (batches.steps, batches.per_epoch) == (ROUNDS, 3)
    for epoch in batches.draws[:, 0].split(3):
        assert epoch.unique().numel() == 24
    assert not batches.draws[:3, 0].equal(batches.draws[3:, 0])


def test_images_are_cropped_and_mirrored():
    padded = torch.zeros(1, 12, 12, 3)
    padded[:, 4:8, 4:8] = torch.arange(1.0, 17).reshape(4, 4, 1)
    data = Data(padded.expand(64, -1, -1, -1), torch.arange(64), torch.zeros(1, 4, 4, 3), torch.zeros(1))
    x, y = Batches(data, Recipe(1, 64), 0).at(torch.zeros(1, dtype=torch.long))
    windows = [padded[0, i : i + 4, j : j + 4, 0] for i in range(9) for j in range(9)]
    windows += [window.flip(1) for window in windows]
    seen = {next(i for i, window in enumerate(windows) if window.equal(crop)) for crop in x[:, 0]}
    assert len(seen) > 30
    assert min(seen) < 81 <= max(seen)
    assert torch.equal(x[:, 0], x[:, 2])
    assert sorted(y.tolist()) == list(range(64))


def test_images_are_normalised_before_they_are_padded(data):
    inner = data.train[:, 4:-4, 4:-4]
    assert_close(inner.mean((0, 1, 2)), torch.zeros(3), atol=1e-5, rtol=0)
    assert_close(inner.std((0, 1, 2)), torch.ones(3))
    assert data.train.shape == (30, 40, 40, 3)
    assert data.train[:, :4].abs().max() == 0


def test_packed_images_are_read_back(arrays, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_training, "ROWS", 2)  # more than ten files of a part
    np.savez(tmp_path / "c.npz", **arrays)
    folder = tmp_path / "packed"
    gpu_training.main(["pack", str(folder), "--data", str(tmp_path / "c.npz"), "--train", "25", "--test", "20"])
    assert len(list(folder.glob("train_*.webp"))) == 13
    found = gpu_training.load(folder)
    for name, values in gpu_training.load(tmp_path / "c.npz").items():
        np.testing.assert_array_equal(found[name], values[:25])
    assert found["x_train"].dtype == np.uint8


def test_png_sprites_are_read_and_counted(arrays, tmp_path):
    for part in ("train", "test"):
        Image.fromarray(arrays[f"x_{part}"].reshape(-1, 1024, 3)).save(tmp_path / f"{part}.png")
    labels = tmp_path / "labels.json"
    labels.write_text(str({part: arrays[f"y_{part}"].tolist() for part in ("train", "test")}).replace("'", '"'))
    np.testing.assert_array_equal(gpu_training.load(tmp_path)["x_test"], arrays["x_test"])
    labels.write_text('{"train": [0], "test": [0]}')
    with pytest.raises(ValueError, match="1 labels of 30 images in 'train'"):
        gpu_training.load(tmp_path)


# --- steps ------------------------------------------------------------------------------------------------------------


def test_rates_are_those_of_the_schedule():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    expected = []
    for _ in range(20):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert_close(gpu_training.rates(20, Recipe()), torch.tensor(expected))
    rising = gpu_training.rates(25, Recipe(warm_up=5))
    assert_close(rising, torch.tensor([0.02, 0.04, 0.06, 0.08, 0.1, *expected]))


def test_sgd_is_that_of_torch():
    torch.manual_seed(0)
    shapes = [(4, 3, 3, 3), (8, 4, 1, 1), (5,)]
    own = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    own[0].data = own[0].data.contiguous(memory_format=torch.channels_last)  # other strides than its gradient
    theirs = [nn.Parameter(w.detach().clone()) for w in own]
    momenta = [torch.zeros_like(w, requires_grad=False) for w in own]
    optimizer = torch.optim.SGD(theirs, 0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    for rate in (0.1, 0.05, 0.2):
        gradients = [torch.randn(shape) for shape in shapes]
        for w, gradient in zip(theirs, gradients, strict=True):
            w.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        kept = [gradient.clone() for gradient in gradients]
        gpu_training.sgd(own, gradients, momenta, torch.tensor(rate))
        assert_close(own, theirs)
        assert all(a.equal(b) for a, b in zip(gradients, kept, strict=True))


def test_kernels_over_lists_get_equal_strides(monkeypatch):
    seen, add = [], torch._foreach_add
    monkeypatch.setattr(torch, "_foreach_add", lambda a, b, alpha: (seen.append((a, b)), add(a, b, alpha=alpha))[1])
    weight = torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    gpu_training.sgd([weight], [torch.randn(4, 3, 3, 3)], [torch.zeros_like(weight)], torch.tensor(0.1))
    ((gradients, weights),) = seen
    assert gradients[0].stride() == weights[0].stride() == weight.stride()


def test_a_step_takes_its_batch_and_its_rate_by_its_position(data):
    a, b = job(data), job(data)
    for _ in range(2):
        a.step()
    with torch.no_grad():
        for mine, other in zip(b.state(), a.state(), strict=True):
            mine.copy_(other)
    b.rates[2:] = 0  # step 2 of b changes no weight
    before = [w.detach().clone() for w in b.weights]
    a.step(), b.step()
    assert a.losses[2] == b.losses[2] != 0
    assert int(a.position) == int(b.position) == 3
    assert all(x.equal(y) for x, y in zip(b.weights, before, strict=True))
    assert not a.weights[0].equal(before[0])


def test_the_state_is_restored_after_steps_for_warm_up(data):
    fresh, warmed = job(data), job(data)
    with gpu_training.restored(warmed.state()):
        for _ in range(3):
            warmed.step()
        assert not warmed.weights[0].equal(fresh.weights[0])
    for a, b in zip(warmed.state(), fresh.state(), strict=True):
        assert a.equal(b)
    for each in (fresh, warmed):
        for _ in range(ROUNDS):
            each.step()
    assert warmed.losses.equal(fresh.losses)
    assert warmed.losses.count_nonzero() == ROUNDS


def test_a_state_is_all_that_a_step_changes(data):
    net = job(data)
    tensors = {name: value for name, value in vars(net).items() if isinstance(value, torch.Tensor)}
    known = {id(tensor) for tensor in net.state()}
    rest = [t for t in [*net.net.state_dict(keep_vars=True).values(), *tensors.values()] if id(t) not in known]
    before = [t.clone() for t in rest]
    net.step()
    assert all(t.equal(b) for t, b in zip(rest, before, strict=True))
    assert [name for name, t in tensors.items() if id(t) not in known] == ["rates"]
    assert all(t.is_floating_point() for t in net.net.buffers())  # no counters, each a kernel


def test_a_network_is_evaluated_by_its_running_statistics(data):
    net = job(data)
    for module in net.net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.running_mean, 3.0)
    expected = net.net.eval()(data.test.permute(0, 3, 1, 2)).argmax(1)
    assert len(expected.unique()) == 1
    net.net.train()
    hits = (expected == data.test_labels).sum().item()
    assert net.results()["value"] == 100 - 5 * hits
    assert net.results()["finite"]


@pytest.fixture
def graphs(monkeypatch):
    """Graphs on the CPU: a replay takes the step that was captured."""
    steps = []

    class Graph:
        def replay(self):
            self.step()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)

    def graph(made, stream):
        made.step = steps[-1]
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "graph", graph)
    return steps


def test_a_captured_training_equals_an_eager_one(data, graphs, monkeypatch):
    monkeypatch.setattr(gpu_training, "REPLAYS", 4)
    eager, captured = job(data), job(data)
    graphs.append(captured.step)
    captured.capture()
    assert captured.note == ""
    for _ in range(ROUNDS):
        eager.advance()
    captured.advance()
    assert captured.done == 4
    captured.advance()
    assert captured.done == eager.done == ROUNDS
    results = captured.results()
    assert (eager.results()["form"], results["form"]) == ("eager", "captured")
    assert captured.losses.equal(eager.losses)
    assert results["loss"] == pytest.approx(eager.losses[3:].mean().item())
    assert int(captured.position) == ROUNDS


@pytest.mark.skipif(torch.cuda.is_available(), reason="a step on a GPU can be captured")
def test_a_training_that_cannot_be_captured_is_eager_and_says_so(data):
    eager, other = job(data), job(data)
    other.capture()
    assert other.note.startswith("not captured: ")
    for _ in range(ROUNDS):
        eager.advance(), other.advance()
    assert other.results()["form"] == "eager"
    assert other.losses.equal(eager.losses)


# --- turns and rows ---------------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_the_number_of_jobs(train):
    names = ("value", "loss", "finite", "form", "note")
    one, three = (by_setting(train(jobs)[0]) for jobs in (1, 3))
    assert len(one) == 6
    assert one.keys() == three.keys()
    for setting, row in one.items():
        assert [row[name] for name in names] == [three[setting][name] for name in names]
    assert len({row["loss"] for row in one.values()}) == 6


def test_no_more_jobs_run_than_asked_for(train, monkeypatch):
    counts, turn = [], Trainings.turn

    def watched(trainings, one):
        counts.append(len(trainings.running))
        return turn(trainings, one)

    monkeypatch.setattr(Trainings, "turn", watched)
    train(jobs=2)
    assert max(counts) == 2


def test_a_training_waits_while_the_device_is_busy(data, train, monkeypatch):
    """The device finishes the work of a job's turn when it is asked for the third time."""

    class Event:
        asked = 0

        def query(self):
            self.asked += 1
            return self.asked > 2

    depths, advance, results = [], Job.advance, Job.results

    def queue(one):
        advance(one)
        one.events.append(Event())
        depths.append(len(one.events))

    def finish(one):
        assert not one.events
        return results(one)

    monkeypatch.setattr(Job, "advance", queue)
    monkeypatch.setattr(Job, "results", finish)
    rows, errors = train()
    assert (len(rows), errors) == (6, [])
    assert max(depths) == 2


def test_a_row_is_written_as_soon_as_a_job_ends(arrays, tmp_path, monkeypatch):
    np.savez(tmp_path / "c.npz", **arrays)
    results, calls = Job.results, []

    def once(one):
        calls.append(one)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return results(one)

    monkeypatch.setattr(Job, "results", once)
    command = ["--device", "cpu", "--blocks", "cifar10", "--tiny", "--data", str(tmp_path / "c.npz")]
    sizes = ["--epochs", "1", "--seeds", "1", "--jobs", "1"]
    monkeypatch.setattr(gpu, "Recipe", lambda epochs, batch, warm_up, lr, bfloat16: Recipe(epochs, 8, warm_up, lr))
    with pytest.raises(KeyboardInterrupt):
        gpu.main([*command, *sizes, "--out", str(tmp_path)])
    with (tmp_path / "cifar10.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["model"], row["start"], row["lr"], row["seed"]) == ("HBNet", "0.1", "0.1", "0")
    assert row["form"] == "eager"
    assert 0 <= float(row["value"]) <= 100

    calls.clear()  # resumed, with a pattern that leaves out the ResNet
    gpu.main([*command, *sizes, "--resume", "--networks", "HBNet: ", "--out", str(tmp_path)])
    with (tmp_path / "cifar10.csv").open(newline="", encoding="utf-8") as file:
        kept, added = csv.DictReader(file)
    assert (kept, added["start"]) == (row, "rule/3")

    calls.clear()
    other = ["--lr", "0.05", "--resume", "--networks", "HBNet: 0.1"]  # not trained at this learning rate
    gpu.main([*command, *sizes, *other, "--out", str(tmp_path)])
    with (tmp_path / "cifar10.csv").open(newline="", encoding="utf-8") as file:
        *_, last = csv.DictReader(file)
    assert (last["start"], last["lr"]) == ("0.1", "0.05")
    assert last["loss"] != row["loss"]

    calls.clear()
    longer = [*command, *sizes, "--epochs", "2", "--resume", "--networks", "HBNet: 0.1"]  # another recipe
    gpu.main([*longer, "--out", str(tmp_path)])
    with (tmp_path / "cifar10.csv").open(newline="", encoding="utf-8") as file:
        *_, last = csv.DictReader(file)
    images = len(arrays["x_train"])
    assert (row["recipe"], last["recipe"]) == tuple(f"{images} images, {n} epochs, batches of 8" for n in (1, 2))


def test_a_recipe_names_what_differs_from_its_defaults(data):
    images = f"{len(data.train)} images"
    assert Recipe().name(data) == f"{images}, 10 epochs"
    changed = Recipe(2, 32, 5, 0.05, True).name(data)
    assert changed == f"{images}, 2 epochs, batches of 32, warm-up of 5 steps, bfloat16"


def test_rows_of_another_version_are_not_resumed(tmp_path, capsys):
    (tmp_path / "cifar10.csv").write_text("model,start,seed,value\nHBNet-56,rule,0,20\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--blocks", "cifar10", "--resume", "--out", str(tmp_path)])
    assert "argument --resume: " in (message := capsys.readouterr().err)
    assert "cifar10.csv, line 1: names the fields" in message
    assert (tmp_path / "cifar10.csv").read_text(encoding="utf-8").count("\n") == 2


def test_the_time_is_kept_between_steps(train, monkeypatch):
    clock, steps = itertools.count(), []
    monkeypatch.setattr(
        gpu_training, "time", SimpleNamespace(perf_counter=lambda: next(clock), sleep=lambda seconds: None)
    )
    advance = Job.advance
    monkeypatch.setattr(Job, "advance", lambda one: (steps.append(one.setting), advance(one)))
    rows, errors = train(until=25)
    assert errors == []
    assert 0 < len(steps) < 25
    found = by_setting(rows)
    assert len(rows) == len(found) == 6
    done = [row for row in rows if row["quantity"] == "test error"]
    stopped = [row for row in rows if "after" in row.get("note", "")]
    assert len(done) >= 1
    assert {row["quantity"] for row in rows if row not in done} == {"left out"}
    assert all("value" not in row for row in rows if row not in done)
    assert stopped
    for row in stopped:
        taken = steps.count(Setting(row["model"], row["start"], row["seed"]))
        assert row["note"] == f"no time left after {taken} of {ROUNDS} steps"
    assert rows[-1]["note"] == "no time left"


def test_bfloat16_is_the_same_training_on_a_cpu(data):
    """Activations are bfloat16, weights float32, and the first loss is close to the one in float32."""
    losses = []
    for recipe in (RECIPE, RECIPE._replace(bfloat16=True)):
        one, dtypes = Job(Setting("HBNet", "0.1", 0), Batches(data, recipe, 0), recipe), []
        one.net.layer1.register_forward_hook(lambda module, inputs, out, dtypes=dtypes: dtypes.append(out.dtype))
        one.step()
        losses.append(one.losses[0])
        assert {weight.dtype for weight in one.weights} == {torch.float32}
        assert dtypes == [torch.bfloat16 if recipe.bfloat16 else torch.float32]
    assert_close(*losses, rtol=0.02, atol=0)
    assert not losses[0].equal(losses[1])


def test_divergence_is_a_result(train):
    rows, errors = train(settings=[Setting("HBNet", "1e38", 0), Setting("HBNet", "0.1", 0)])
    assert errors == []
    found = by_setting(rows)
    assert not found["HBNet", "1e38", 0]["finite"]
    assert found["HBNet", "0.1", 0]["finite"]
    assert all(0 <= row["value"] <= 100 for row in rows)


def test_a_network_that_fails_does_not_cost_the_others(train, monkeypatch):
    networks = {"No such net": ("no_such_net", {}, ("0",)), **gpu_training.NETWORKS}
    monkeypatch.setattr(gpu_training, "NETWORKS", networks)
    step = Job.step

    def fail(one):
        if one.setting.start == "rule/3" and one.done == 2:
            raise RuntimeError("out of memory")
        step(one)

    monkeypatch.setattr(Job, "step", fail)
    rows, errors = train(settings=gpu_training.settings(1))
    assert {row["start"] for row in rows} == {"0.1", "0"}
    assert [(type(error).__name__, row["model"]) for error, row in errors] == [
        ("RuntimeError", "No such net"),
        ("RuntimeError", "HBNet"),
    ]
