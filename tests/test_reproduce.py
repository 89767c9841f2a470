"""The reproduction's trainings: the paper's recipe, resumed as if uninterrupted, and whole rows of results."""

import math
import shlex

import pytest
import timm
import torch
import torch.nn.functional as F
from extras import needs

needs("nni")

import rows
import stability
import table4
from architecture_table import count
from commands import Place
from networks import NETWORKS, _densenets, _resnets, count_network, learned_coefficients
from section_table4 import _pairs
from training import Recipe, make_loaders, make_optimizer, train

from nni_spaces.runs.data import ImageSet, read_images
from optinspired_plugins.run_folder import read_history


@pytest.fixture
def data(coloured_images):
    return coloured_images


def tiny(data, network="hbnet20", **kwargs):
    return Recipe(network, data, **{"train_images": 96, "test_images": 64, "epochs": 2, "batch_size": 32, **kwargs})


# --- the recipe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["hbnet56-learn-beta", "agdnet40"])
def test_full_is_the_papers_recipe(network, data):
    """§8.1: 300 epochs of batches of 64, 0.1 divided by 10 at 50 % and 75 %, Nesterov momentum 0.9, decay 1e-4."""
    (recipe,), _ = table4.parse_args(["--networks", network, "--full", "--seeds", "0", "--data", data])
    model = NETWORKS[network].build(10)
    optimizer, schedule = make_optimizer(model, recipe)
    rates = []
    for epoch in range(recipe.epochs):
        schedule.step(epoch)
        rates.append({group["lr"] for group in optimizer.param_groups})
    expected = [0.1] * 150 + [0.01] * 75 + [0.001] * 75
    assert [rate for (rate,) in rates] == pytest.approx(expected)
    assert type(optimizer) is torch.optim.SGD
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    for group in optimizer.param_groups:
        assert (group["momentum"], group["nesterov"], group["dampening"]) == (0.9, True, 0)
        for parameter in group["params"]:
            spared = names[parameter].rpartition(".")[2] in ("alpha", "beta1", "beta2")
            assert group["weight_decay"] == (0 if spared else 1e-4), names[parameter]
    assert (recipe.batch_size, recipe.train_images, recipe.test_images) == (64, None, None)
    assert (recipe.augment, recipe.padding) == (True, 4)


@pytest.mark.parametrize(("epochs", "expected"), [(10, [5, 8]), (12, [6, 9]), (300, [150, 225])])
def test_a_shortened_schedule_falls_at_the_same_shares(epochs, expected):
    recipe = Recipe("hbnet20", epochs=epochs)
    optimizer, schedule = make_optimizer(torch.nn.Linear(1, 1), recipe)
    rates = [0.1]
    for epoch in range(epochs):
        schedule.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    falls = [epoch for epoch in range(epochs) if rates[epoch + 1] < 0.5 * rates[epoch]]
    assert falls == expected == recipe.milestones


@pytest.mark.parametrize("augment", [True, False])
def test_every_image_once_an_epoch_as_the_paper_augments_it(data, augment):
    """Normalised, padded by 4 with 0, cropped to 32 × 32, mirrored or not."""
    images, test = read_images(data, 10), read_images(data, 10, "test")
    test = ImageSet(test.images[:4], test.labels[:4], test.classes)
    loader, (test_loader, seen) = make_loaders(images, test, tiny(data, augment=augment, batch_size=3))
    assert len(loader) == 4  # the last, smaller batch is kept
    pixels = images.images.double()
    deviation = pixels.std((0, 2, 3), keepdim=True)
    normalised = (pixels - pixels.mean((0, 2, 3), keepdim=True)) / deviation
    padded = F.pad(normalised, [4] * 4).float()
    crops = padded.unfold(2, 32, 1).unfold(3, 32, 1).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    crops = torch.cat([crops, crops.flip(-1)], 1)  # (image, way, channel, 32, 32)
    seen_ways = set()
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        labels = []
        for batch, batch_labels in loader:
            labels += batch_labels.tolist()
            for image, label in zip(batch, batch_labels):  # a class an image here
                ways = (crops[label] - image).abs().amax((1, 2, 3)) < 1e-4
                assert ways.sum() == 1
                seen_ways.add(int(ways.nonzero()))
        assert sorted(labels) == sorted(images.labels.tolist())
    middle = 4 * 9 + 4
    assert (seen_ways == {middle}) == (not augment)
    assert ({way >= 81 for way in seen_ways} == {True, False}) == augment
    again = torch.cat([batch for batch, _ in seen])
    torch.testing.assert_close(again, normalised[:4].float(), rtol=0, atol=1e-4)
    expected = (test.images.double() - pixels.mean((0, 2, 3), keepdim=True)) / deviation
    torch.testing.assert_close(torch.cat([b for b, _ in test_loader]), expected.float(), rtol=0, atol=1e-4)


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [20, 56])
def test_controls_have_resnets_size(depth):
    sizes = {name: count_network(NETWORKS[name], 10) for name in _resnets(depth)}
    assert len(sizes) == 14
    learned, normalised = (sizes.pop(f"hbnet{depth}-{name}") for name in ("learn-beta", "auto-final-norm"))
    parameters, macs = sizes[f"resnet{depth}"]
    assert set(sizes.values()) == {(parameters, macs)}
    assert learned[0] == parameters + 2 * 3 * ((depth - 2) // 6 - 1)
    assert normalised == (parameters + 2 * 64, macs)


def test_pre_activation_resnet_is_that_of_its_paper():
    """T is conv(relu(bn(conv(relu(bn(x)))))), the shortcut padded with zeros, one normalisation more at the end."""
    model = timm.create_model("preact20", num_classes=7).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
    x = image = torch.randn(2, 3, 32, 32)
    weights = dict(model.named_parameters()) | dict(model.named_buffers())

    def activated(x, name):
        parts = (weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts).relu()

    x = F.conv2d(x, weights["stem.conv.weight"], padding=1)
    for stage in range(3):
        for block in range(3):
            name, stride = f"stages.{stage}.blocks.{block}", 2 if stage and not block else 1
            t = F.conv2d(activated(x, f"{name}.norm1"), weights[f"{name}.conv1.weight"], padding=1, stride=stride)
            t = F.conv2d(activated(t, f"{name}.norm2"), weights[f"{name}.conv2.weight"], padding=1)
            # The shortcut of a block that changes the shape takes the activated input, as in timm.
            x = x if stride == 1 else activated(x, f"{name}.norm1")[:, :, ::2, ::2]
            missing = t.shape[1] - x.shape[1]
            x = t + F.pad(x, [0, 0, 0, 0, missing // 2, missing - missing // 2])
    features = activated(x, "norm").mean((2, 3))
    expected = features @ weights["head.fc.weight"].flatten(1).T + weights["head.fc.bias"]
    torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["resnet20", "hbnet20"])
def test_starts_of_the_normalisations(family):
    """γ of all of them from U(0, 1), of the last of each T from 1/√3, and nothing else differs."""

    def state(network):
        torch.manual_seed(0)
        return NETWORKS[network].build(10).state_dict()

    plain, uniform, small = (state(family + suffix) for suffix in ("", "-uniform-init", "-small-init"))
    norms = {key for key in plain if key.endswith(("bn1.weight", "bn2.weight"))}
    assert len(norms) == 19
    assert all(torch.equal(plain[key], uniform[key]) for key in plain.keys() - norms)
    drawn = torch.cat([uniform[key] for key in norms])
    assert 0 <= drawn.min() < 0.02
    assert 0.98 < drawn.max() <= 1
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.05)
    for key, value in plain.items():
        last = key.endswith("bn2.weight")
        assert torch.equal(small[key], torch.full_like(value, 3**-0.5) if last else value)


@pytest.mark.parametrize(
    ("ours", "peer"),
    [pair for pair in _pairs() if {*pair} <= {*_resnets(20), *_densenets(22)} and "preact" not in pair[1]],
)
def test_pairs_of_one_seed_share_their_initial_convolutions(ours, peer):
    """So paired differences compare rules and starts, and not two draws of the weights."""
    states = []
    for name in (ours, peer):
        torch.manual_seed(7)
        states.append(NETWORKS[name].build(10).state_dict())
    convolutions = [name for name, value in states[0].items() if value.dim() == 4]
    assert len(convolutions) > 18
    for name in convolutions:
        assert torch.equal(states[0][name], states[1][name]), name


def test_learned_coefficients_are_all_of_them():
    for network, expected in (("hbnet20-learn-beta", 12), ("agdnet22", 63), ("resnet20", 0)):
        found = learned_coefficients(NETWORKS[network].build(10).state_dict())
        assert len(found) == expected
        assert len({(row["layer"], row["coefficient"], row["index"]) for row in found}) == expected
        assert {float(row["value"]) for row in found} <= {1.0, -1.0}


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_training_that_goes_on_gives_what_an_uninterrupted_one_gives(data, tmp_path):
    recipe = tiny(data, "hbnet20-learn-beta", epochs=3)
    expected, state = train(recipe, tmp_path / "whole", "cpu")

    batches = []

    def interrupt():
        batches.append(1)
        if len(batches) == 5:  # in the second epoch
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        train(recipe, tmp_path / "parts", "cpu", on_batch=interrupt)
    epochs = []
    measured, resumed = train(recipe, tmp_path / "parts", "cpu", on_epoch=lambda entry: epochs.append(entry["epoch"]))
    assert epochs == [1, 2]
    rates = [entry["lr"] for entry in read_history(tmp_path / "parts")]
    assert rates == pytest.approx([0.1, 0.1, 0.01])
    assert all(torch.equal(state[name], value) for name, value in resumed.items())
    times = {"seconds", "resumed"}
    assert {k: v for k, v in measured.items() if k not in times} == {
        k: v for k, v in expected.items() if k not in times
    }
    with pytest.raises(ValueError, match="holds a run with network='hbnet20-learn-beta'"):
        train(tiny(data, "hbnet20", epochs=3), tmp_path / "parts", "cpu")


def test_what_is_measured_is_what_the_trained_network_does(data, tmp_path):
    recipe = tiny(data, augment=False)
    measured, state = train(recipe, tmp_path, "cpu")
    model = NETWORKS["hbnet20"].build(10)
    model.load_state_dict(state)
    model.eval()
    images, test = read_images(data, 96), read_images(data, 64, "test")
    for name, loader in zip(("test", "fit"), make_loaders(images, test, recipe)[1]):
        x, y = (torch.cat(parts) for parts in zip(*loader))
        with torch.no_grad():
            logits = model(x)
        assert len(y) == 64
        assert measured[f"{name}_loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-3)
        assert measured[f"{name}_error"] == pytest.approx(100 * (logits.argmax(1) != y).float().mean().item(), abs=1e-3)


def run_table4(data, folder, *more):
    options = ["--networks", "hbnet20", "agdnet22", "--epochs", "1", "--train-images", "64", "--test-images", "64"]
    places = ["--out", f"{folder}/runs", "--results", f"{folder}/results", "--accelerator", "cpu"]
    table4.main(["--data", data, "--seeds", "0", *options, *places, *more])
    return rows.read_rows(folder / "results" / "table4.csv")


def test_table4_writes_whole_rows_and_repeats_none(data, tmp_path, monkeypatch, capsys):
    found = run_table4(data, tmp_path)
    assert [row["network"] for row in found] == ["hbnet20", "agdnet22"]
    for row in found:
        assert 0 <= float(row["test_error"]) <= 100
        assert float(row["seconds"]) > 0
        assert (row["test_images"], row["diverged"], row["threads"]) == ("64", "0", str(torch.get_num_threads()))
        assert row["torch"] == torch.__version__.split("+")[0]
    assert (int(found[0]["parameters"]), int(found[0]["macs"])) == count("hbnet20")
    # The command of a row makes that row.
    words = shlex.split(found[1]["command"])
    assert words[:2] == ["python", "examples/reproduce/table4.py"]
    again = [data if word == "images.npz" else word for word in words[2:]]
    (recipe,), place = table4.parse_args(again)
    assert recipe == Recipe("agdnet22", data, train_images=64, test_images=64, epochs=1)
    assert {k: str(v) for k, v in {**table4.identity(recipe), **place.shared}.items()}.items() <= found[1].items()

    learned = rows.read_rows(tmp_path / "results" / "coefficients.csv")
    assert {(row["network"], row["coefficient"]) for row in learned} == {("agdnet22", "alpha")}
    assert len(learned) == 63

    monkeypatch.setattr(table4, "train", lambda *_: pytest.fail("trained again"))
    assert run_table4(data, tmp_path) == found
    assert capsys.readouterr().out.count("has its row") == 2


def test_a_run_that_diverges_is_a_row(data, tmp_path):
    recipe = tiny(data, lr=1e12)
    with pytest.raises(FloatingPointError, match="must be finite"):
        train(recipe, tmp_path / "alone", "cpu")
    place = Place(tmp_path / "runs", tmp_path / "table4.csv", {}, "cpu")
    assert table4.run(recipe, place) == "diverged"
    (row,) = rows.read_rows(place.results)
    assert (row["diverged"], row["test_error"], row["train_loss"]) == ("1", "", "")


# --- stability --------------------------------------------------------------------------------------------------------


def test_first_steps_are_written_by_run_and_by_step(data, tmp_path):
    places = ["--out", f"{tmp_path}/runs", "--results", f"{tmp_path}", "--accelerator", "cpu"]
    options = ["--networks", "hbnet20", "resnet20", "--seeds", "0", "--steps", "4"]
    for _ in range(2):
        stability.main(["--data", data, *options, *places])
    summary, curves = (rows.read_rows(tmp_path / f"stability{name}.csv") for name in ("", "_curves"))
    assert [row["network"] for row in summary] == ["hbnet20", "resnet20"]
    assert [(row["network"], row["step"]) for row in curves] == [
        (network, str(step)) for network in ("hbnet20", "resnet20") for step in range(4)
    ]
    for row in summary:
        steps = [step for step in curves if step["network"] == row["network"]]
        assert float(row["first_loss"]) == pytest.approx(float(steps[0]["loss"]), rel=1e-3)
        norms = [float(step["grad_norm"]) for step in steps]
        assert float(row["largest_grad_norm"]) == pytest.approx(max(norms), rel=1e-3)
        words = shlex.split(row["command"])
        assert words[:4] == ["python", "examples/reproduce/stability.py", "--data", "images.npz"]
        again = dict(zip(words[4::2], words[5::2]))
        assert again == {"--networks": row["network"], "--seeds": "0", "--steps": "4", "--lr": "0.1"}


def test_the_gradient_is_measured_and_not_clipped(data):
    """Two steps of plain SGD by hand, from the same weights and images."""
    recipe = Recipe("hbnet20", data, batch_size=32)
    made, _ = stability.first_steps(recipe, 2, torch.device("cpu"))
    torch.manual_seed(0)
    model = NETWORKS["hbnet20"].build(10).to(memory_format=torch.channels_last)
    images = read_images(data, 64)
    loader, _ = make_loaders(images, images, recipe)
    optimizer, _ = make_optimizer(model, recipe)
    for (x, y), step in zip(loader, made):
        loss = F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y)
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
        optimizer.step()
        assert step == pytest.approx((loss.item(), norm), rel=1e-4)


def test_a_run_that_is_not_finite_ends(data):
    made, _ = stability.first_steps(Recipe("resnet20", data, lr=1e12), 8, torch.device("cpu"))
    assert len(made) < 8
    row = stability.summarise(made, 8)
    assert (row["diverged"], row["last_loss"]) == (1, "")


def test_a_run_that_explodes_has_diverged_though_it_is_finite():
    steps = [stability.Step(3.0, 1.0)] + [stability.Step(29.0, 1.0)] * 9
    assert stability.summarise(steps, 10)["diverged"] == 0
    row = stability.summarise([*steps[:9], stability.Step(31.0, 1.0)], 10)
    assert (row["diverged"], row["last_loss"], row["steps_made"]) == (1, "", 10)


def test_the_last_loss_is_the_mean_of_the_last_tenth():
    steps = [stability.Step(float(loss), 1.0) for loss in range(30, 0, -1)]
    assert stability.summarise(steps, 30)["last_loss"] == "2.0000"
