"""What timm saves makes the same network elsewhere, and what a stranger saved runs no module."""

import json
import os

import pytest
import timm
import torch
from equality import randomise
from extras import needs_version
from my_algorithms import LearnedHeavyBall, OptimizedGradient
from test_genotype import HB
from timm.models import save_for_hf

from optinspired_plugins import GENOTYPES, HeavyBall, Nesterov, TwoPath
from timm_models import _host

recorded = needs_version("timm", "1.0.31", "keeps no record of a model's arguments")
CELLNET = dict(num_classes=5, cells=3, channels=2)
OPTNET = dict(num_classes=5, layers=(4, 1, 3), channels=(4, 6, 8))


def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def build(name, **kwargs):
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **kwargs)).eval()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder of somebody else's, who has none of ours."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has what is in ``tmp_path``."""
    hub = pytest.importorskip("huggingface_hub")

    def download(repo_id, filename, **kwargs):
        file = tmp_path / repo_id / filename
        if not file.exists():
            raise hub.errors.EntryNotFoundError(filename)
        return str(file)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)


def save(net, folder, **kwargs):
    save_for_hf(net, folder, safe_serialization=True, **kwargs)
    return json.loads((folder / "config.json").read_text())["model_args"]


def assert_loads(net, folder):
    for source in (f"local-dir:{folder}", f"hf-hub:{folder.name}"):
        loaded = timm.create_model(source, pretrained=True).eval()
        assert type(loaded) is type(net)
        assert torch.equal(loaded(images()), net(images()))


FAMILIES = {
    "hbnet20": dict(layers=(2, 1, 1), beta2=-0.5, learn_beta=True),
    "hbnet18": dict(num_classes=5, post_act=True),
    "agdnet40_k12": dict(block_config=(2, 1, 1), beta=1.0),
    "optnet20": dict(algorithm="agd", reading="residual", layers=(2, 1, 1)),
    "cellnet_cifar": dict(genotype="darts_v2", cells=3, channels=2),
}


@recorded
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_saved_and_loaded_with_its_arguments(name, tmp_path, elsewhere, hub):
    net = build(name, **FAMILIES[name])
    save(net, tmp_path / "net")
    assert_loads(net, tmp_path / "net")


# --- what we save -----------------------------------------------------------------------------------------------------


@recorded
@pytest.mark.parametrize("given", ["name", "default", "path", "text", "data", "object"])
def test_a_searched_network_carries_its_genotype(given, tmp_path, elsewhere, hub):
    file = tmp_path / "genotype.json"
    HB.save(file)
    forms = dict(path=file, text=os.path.relpath(file), data=HB.to_dict(), object=HB, name="p_darts")
    net = build("cellnet_cifar", **CELLNET, **({} if given == "default" else dict(genotype=forms[given])))
    arguments = save(net, tmp_path / "published")
    file.unlink()
    known = {"name": GENOTYPES["p_darts"], "default": GENOTYPES["darts_v2"]}
    assert arguments["genotype"] == known.get(given, HB).to_dict()
    assert arguments.items() >= {"cells": 3, "channels": 2}.items()
    assert_loads(net, tmp_path / "published")


CONSTANT = {
    "hb": HeavyBall(0.7),
    "agd": Nesterov(0.4),
    "two paths": TwoPath(0.2, 0.7),
    "a class": OptimizedGradient,
    "a module's": "my_algorithms:OptimizedGradient",
}


@recorded
@pytest.mark.parametrize("algorithm", CONSTANT.values(), ids=CONSTANT)
def test_an_algorithm_of_constant_coefficients_is_saved_as_these(algorithm, tmp_path, elsewhere, hub):
    net = build("optnet20", algorithm=algorithm, **OPTNET)
    arguments = save(net, tmp_path / "published")
    assert arguments["algorithm"].keys() == {"version", "steps", "results"}
    assert len(arguments["algorithm"]["steps"]) == 4
    assert_loads(net, tmp_path / "published")
    again = timm.create_model(f"local-dir:{tmp_path / 'published'}")
    assert save(again, tmp_path / "again") == arguments


@recorded
@pytest.mark.parametrize("name", ["agd2", "dmrnet", None])
def test_an_algorithm_with_a_name_is_saved_by_it(name, tmp_path, elsewhere, hub):
    net = build("optnet20", **OPTNET, **({} if name is None else dict(algorithm=name)))
    assert save(net, tmp_path / "published")["algorithm"] == (name or "hb")
    assert_loads(net, tmp_path / "published")


@recorded
def test_four_stages_are_saved_too(tmp_path, hub):
    options = dict(num_classes=5, layers=(2, 1, 3, 1), channels=(8, 8, 8, 8))
    net = build("optnet18", algorithm=HeavyBall(0.7), **options)
    save(net, tmp_path / "published")
    assert_loads(net, tmp_path / "published")


@recorded
def test_an_algorithm_that_only_code_describes_is_the_readers_to_name(tmp_path):
    with pytest.raises(ValueError, match="'algorithm' is not serializable"):
        save(build("optnet20", algorithm=LearnedHeavyBall(0.5), **OPTNET), tmp_path / "object")
    net = build("optnet20", algorithm="my_algorithms:LearnedHeavyBall", **OPTNET)
    save(net, tmp_path / "published")
    with pytest.raises(ValueError, match=r"must not name a module in a model's config\.json; if you trust"):
        timm.create_model(f"local-dir:{tmp_path / 'published'}", pretrained=True)
    for algorithm in ("my_algorithms:LearnedHeavyBall", LearnedHeavyBall()):
        loaded = timm.create_model(f"local-dir:{tmp_path / 'published'}", pretrained=True, algorithm=algorithm).eval()
        assert torch.equal(loaded(images()), net(images()))


@needs_version("timm", "1.0.31", "cannot read safetensors in a folder")
def test_without_timms_record_the_arguments_are_the_callers(tmp_path, elsewhere):
    net = build("cellnet_cifar", genotype=HB, **CELLNET)
    arguments = dict(genotype=net.genotype.to_dict(), cells=3, channels=2)
    assert save(net, tmp_path / "published", model_args=arguments)["genotype"] == HB.to_dict()
    loaded = timm.create_model(f"local-dir:{tmp_path / 'published'}", pretrained=True).eval()
    assert torch.equal(loaded(images()), net(images()))


# --- what a stranger saved --------------------------------------------------------------------------------------------


@pytest.fixture
def stranger(tmp_path, monkeypatch, hub):
    """A published optnet that names a module, which is there and leaves a trace; the trace."""
    folder = tmp_path / "stranger"
    trace = tmp_path / "ran"
    folder.mkdir()
    code = f"open({str(trace)!r}, 'w')\nfrom optinspired_plugins import HeavyBall as Class\n"
    (tmp_path / "module_of_a_stranger.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg = dict(num_classes=10, input_size=[3, 32, 32])
    arguments = dict(algorithm="module_of_a_stranger:Class", layers=[1, 1, 1])
    config = dict(architecture="optnet20", model_args=arguments, pretrained_cfg=cfg)
    (folder / "config.json").write_text(json.dumps(config))
    return trace


@pytest.mark.parametrize("says_which", [True, False])
@pytest.mark.parametrize("architecture", ["optnet20", "optnet18"])
@pytest.mark.parametrize("options", [{}, dict(features_only=True)], ids=str)
@pytest.mark.parametrize("source", ["local-dir:{}/stranger", "hf-hub:stranger"])
def test_a_config_imports_no_module(source, options, architecture, says_which, tmp_path, stranger, monkeypatch):
    """Also with a timm that does not say whose the arguments are."""
    monkeypatch.setattr(_host, "_CONFIG_IS_SEPARATE", _host._CONFIG_IS_SEPARATE and says_which)
    file = tmp_path / "stranger" / "config.json"
    config = json.loads(file.read_text()) | dict(architecture=architecture)
    config["model_args"]["layers"] = [1] * (3 if architecture == "optnet20" else 4)
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="algorithm='module_of_a_stranger:Class': must not name a module in a model's"):
        timm.create_model(source.format(tmp_path), **options)
    assert not stranger.exists()
    object_instead = timm.create_model(source.format(tmp_path), algorithm=HeavyBall(0.5), **options)
    assert object_instead is not None
    assert not stranger.exists()


@recorded
def test_the_same_module_named_by_the_caller_is_imported(tmp_path, stranger):
    timm.create_model(f"local-dir:{tmp_path}/stranger", algorithm=":".join(["module_of_a_stranger", "Class"]))
    assert stranger.exists()


@recorded
def test_timms_scripts_ask_as_create_model_does(tmp_path, stranger):
    """They resolve the name by themselves, and create from the arguments that are found."""
    from timm.models._factory import resolve_model_input_args

    arguments = resolve_model_input_args(f"local-dir:{tmp_path}/stranger")
    with pytest.raises(ValueError, match="must not name a module in a model's config"):
        timm.create_model(**arguments)
    assert not stranger.exists()


@pytest.mark.parametrize(
    ("name", "argument", "value", "message"),
    [
        ("optnet20", "algorithm", dict(version=1, steps=[["os:system"]], results=[[[0, 1.0]]]), "register 'os:system'"),
        ("optnet20", "algorithm", dict(type="os:system"), r"algorithm has fields \['type'\]: must have version"),
        ("optnet20", "algorithm", "newton", "algorithm='newton': must be one of gd"),
        ("cellnet_cifar", "genotype", dict(version=1), "genotype has too many or too few fields"),
        ("cellnet_cifar", "genotype", "os:system", "genotype='os:system': must be a JSON file or one of"),
        ("cellnet_cifar", "genotype", "/dev/zero", "genotype='/dev/zero': must be a JSON file or one of"),
    ],
)
def test_other_arguments_of_a_stranger_are_named(name, argument, value, message, tmp_path):
    config = dict(architecture=name, model_args={argument: value}, pretrained_cfg=dict(num_classes=10))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        timm.create_model(f"local-dir:{tmp_path}")
