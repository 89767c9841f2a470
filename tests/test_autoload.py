"""timm knows the models without an import, and no fault of ours breaks ``import torch`` or ``import timm``.

Every case runs in a fresh interpreter. Cases about the mechanics use small stand-ins for timm and timm_models.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from optinspired_plugins import _autoload

ROOT = Path(__file__).parents[1]
PYPROJECT = ROOT / "pyproject.toml"
SWITCHES = ("OPTINSPIRED_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD")
HIDDEN = {"PYTHONPATH", "PYTHONWARNINGS", "PYTHONSAFEPATH", *SWITCHES}

KNOWN = "import timm; print(timm.is_model('hbnet50'), len(timm.list_models('agdnet*')) > 0)"
HOOKS = "[type(f).__name__ for f in sys.meta_path].count('_HostFinder')"
INSTALL = "import sys; from optinspired_plugins._autoload import install; install()"
BROKEN = "import math\n\nraise KeyError('a broken\\nmodel file')\n"


def execute(*args, folder, path=(), check=True, **env):
    """Run a fresh interpreter in ``folder``, with ``path`` first on its PYTHONPATH."""
    inherited = {k: v for k, v in os.environ.items() if k not in HIDDEN}
    if path:
        env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    done = subprocess.run(
        [sys.executable, *args], cwd=folder, env={**inherited, **env}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 or not check, done.stderr
    return done


def run(code, folder, *flags, **options):
    return execute(*flags, "-c", textwrap.dedent(code), folder=folder, **options)


def write(folder, files):
    for name, source in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(source), encoding="utf-8")
    return folder


def beside_ours(folder, files):
    """A folder with files, and beside them the part of our package that has the hook."""
    write(folder, files)
    (folder / "optinspired_plugins").mkdir()
    for name in ("__init__.py", "_autoload.py"):
        shutil.copy(ROOT / "optinspired_plugins" / name, folder / "optinspired_plugins" / name)
    return folder


MODELS = """
    NAMES = ['resnet50']

    def is_model(name):
        return name in NAMES
"""


@pytest.fixture
def stand_ins(tmp_path):
    """A folder with stand-ins for timm and timm_models; ``timm.NAMES`` is the registry."""
    files = {
        "timm/__init__.py": "from .models import NAMES\n",
        "timm/models/__init__.py": MODELS,
        "timm/models/resnet.py": "BASE = 'ResNet'\n",
        "timm_models/__init__.py": """
            from timm.models import NAMES
            from timm.models.resnet import BASE
            NAMES.append('hbnet50')
        """,
    }
    return beside_ours(tmp_path / "stand_ins", files)


@pytest.fixture
def broken(tmp_path):
    """A folder with a timm_models that raises on line 3 of broken.py."""
    files = {"timm_models/__init__.py": "from . import broken\n", "timm_models/broken.py": BROKEN}
    return beside_ours(tmp_path / "broken", files)


# The installed torch and timm


@pytest.mark.parametrize(
    "first",
    ["", "import torch", "import timm_models, torch", "import optinspired_plugins, torch"],
)
def test_names_are_known(first, tmp_path):
    assert run(f"{first}\n{KNOWN}", tmp_path).stdout.split() == ["True", "True"]


def test_names_are_known_after_timm_and_then_torch(tmp_path):
    done = run(
        "import sys, timm.models.resnet, torch; print(timm.is_model('hbnet50'), 'timm_models' in sys.modules)", tmp_path
    )
    assert done.stdout.split() == ["True", "True"]
    assert done.stderr == ""


def test_importing_the_package_costs_nothing(tmp_path):
    code = """
        import sys, optinspired_plugins, optinspired_plugins._autoload
        print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'timm', 'timm_models', 'numpy'}))
    """
    assert run(code, tmp_path).stdout.strip() == "[]"


def test_importing_torch_costs_nothing(tmp_path):
    code = f"import sys, torch; print('timm' in sys.modules, 'timm_models' in sys.modules, {HOOKS})"
    assert run(code, tmp_path).stdout.split() == ["False", "False", "1"]


@pytest.mark.parametrize("switch", SWITCHES)
def test_switched_off_it_is_an_import(switch, tmp_path):
    code = f"import sys; {KNOWN}; print({HOOKS}); import timm_models; {KNOWN}"
    done = run(code, tmp_path, **{switch: "0"})
    assert done.stdout.split() == ["False", "False", "0", "True", "True"]


def test_a_module_of_the_current_folder_is_not_ours(tmp_path):
    write(tmp_path, {"timm_models.py": "open('ran', 'w')\nraise SystemExit\n"})
    done = run(KNOWN, tmp_path)
    assert (done.stdout.split(), done.stderr) == (["True", "True"], "")
    assert not (tmp_path / "ran").exists()


def test_names_are_known_to_every_timm_of_a_process(tmp_path):
    """Where all of timm goes, and where its registry stays."""
    code = """
        import sys, timm
        for gone in (lambda n: n == "timm" or n.startswith("timm."), lambda n: n == "timm.models"):
            first = sys.modules["timm.models"]
            for name in [name for name in sys.modules if gone(name)]:
                del sys.modules[name]
            import timm, timm.models
            print(timm.models is first, timm.is_model("hbnet50"), timm.create_model("hbnet20").num_classes)
    """
    done = run(code, tmp_path)
    assert (done.stdout.split(), done.stderr) == (["False", "True", "10"] * 2, "")


def test_names_of_others_are_theirs(tmp_path):
    """Where the warning is an error none of ours is registered, else all but those."""
    code = """
        import warnings
        from timm.models import is_model, list_models, model_entrypoint, register_model

        @register_model
        def hbnet50(pretrained=False, **kwargs):
            return None

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                import timm_models
            except UserWarning as warning:
                print(warning)
        print(list_models(["hbnet*", "agdnet*", "optnet*", "cellnet*"]))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import timm_models
        print(*(warning.message for warning in caught))
        print(model_entrypoint("hbnet50") is hbnet50, is_model("hbnet18"), is_model("cellnet_cifar"))
    """
    text = "timm has other models under names of timm_models, and keeps them: hbnet50 (of __main__)"
    done = run(code, tmp_path, OPTINSPIRED_AUTOLOAD="0")
    assert done.stdout.splitlines() == [text, "['hbnet50']", text, "True True True"]


def test_a_broken_model_file_is_one_warning(broken, tmp_path):
    code = """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import timm
        ours = [w for w in caught if "optinspired" in str(w.message)]
        print(len(ours), ours[0].category.__name__, ours[0].message)
        assert timm.is_model("resnet50") and not timm.is_model("hbnet50")
    """
    text = run(code, tmp_path, path=[broken]).stdout
    assert text.startswith("1 RuntimeWarning ")
    assert "KeyError: 'a broken\\nmodel file'" in text
    assert f"{broken / 'timm_models' / 'broken.py'}:3" in text
    assert "`import timm_models`" in text
    assert "OPTINSPIRED_AUTOLOAD=0" in text


def test_without_timm_torch_is_silent(tmp_path):
    code = """
        import sys
        sys.modules["timm"] = None
        import torch
        try:
            import timm
        except ModuleNotFoundError as error:
            print(torch.ones(2).sum().item(), error.name)
    """
    done = run(code, tmp_path)
    assert (done.stdout.split(), done.stderr) == (["2.0", "timm"], "")


WORKERS = """
    import multiprocessing
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Names(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            import timm
            return timm.is_model("hbnet50")

    def known(queue):
        import timm
        queue.put(timm.is_model("hbnet50"))

    if __name__ == "__main__":
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=known, args=(queue,))
        process.start()
        print(queue.get(timeout=120))
        process.join()
        loader = DataLoader(Names(), batch_size=2, num_workers=1, multiprocessing_context="spawn")
        print(next(iter(loader)).tolist())
"""


@pytest.mark.slow
def test_spawned_workers_know_the_names(tmp_path):
    write(tmp_path, {"workers.py": WORKERS})
    done = execute("workers.py", folder=tmp_path)
    assert done.stdout.splitlines()[:2] == ["True", "[True, True]"]


# timm versions


def oldest_timm():
    return re.search(r'"timm>=([\d.]+)"', PYPROJECT.read_text())[1]


def test_the_bound_is_that_of_the_package():
    assert oldest_timm() == _autoload._OLDEST_TIMM


@pytest.mark.parametrize(
    ("version", "old"), [("0.9.16", True), ("1.0.9", True), ("1.0.22", False), ("1.0.22.dev0", False), ("2.0", False)]
)
def test_a_timm_below_the_bound_is_named(version, old, stand_ins, tmp_path):
    write(stand_ins, {"timm/__init__.py": f"__version__ = {version!r}\nfrom .models import NAMES\n"})
    write(stand_ins, {"timm_models/__init__.py": "from timm.models import no_such_name\n"})
    done = run(f"{INSTALL}; import timm", tmp_path, path=[stand_ins])
    assert "cannot import name 'no_such_name'" in done.stderr
    assert (f"timm {version} is installed, and {oldest_timm()} or later is needed" in done.stderr) == old


@pytest.fixture(scope="module")
def timm_folders(tmp_path_factory):
    """Version name -> folders for the path; the installed timm needs none."""
    folder = tmp_path_factory.mktemp("oldest_timm")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", str(folder), f"timm=={oldest_timm()}"], check=True)
    return {"installed": [], "oldest": [folder]}


REGISTRY = """
    import json, timm
    modules = {name: timm.model_entrypoint(name).__module__ for name in timm.list_models()}
    print(json.dumps({"version": timm.__version__, "modules": modules}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", ["oldest", "installed"])
def test_names_are_added_and_none_is_replaced(version, timm_folders, tmp_path):
    before = run(REGISTRY, tmp_path, path=timm_folders[version], OPTINSPIRED_AUTOLOAD="0")
    after = run(REGISTRY, tmp_path, path=timm_folders[version])
    assert "Overwriting" not in after.stderr
    old, new = json.loads(before.stdout), json.loads(after.stdout)
    assert (old["version"] == oldest_timm()) or version == "installed"
    assert old["modules"].items() <= new["modules"].items()
    added = {name: module for name, module in new["modules"].items() if name not in old["modules"]}
    assert {"hbnet50", "agdnet121"} <= added.keys()
    assert {module.split(".")[0] for module in added.values()} == {"timm_models"}


# The hook, on stand-ins


@pytest.mark.parametrize("value", ["0", "false", "OFF", "No", " 0 "])
def test_values_that_switch_it_off(value, stand_ins, tmp_path):
    done = run(f"{INSTALL}; import timm; print(timm.NAMES)", tmp_path, path=[stand_ins], OPTINSPIRED_AUTOLOAD=value)
    assert done.stdout.strip() == "['resnet50']"


@pytest.mark.parametrize("value", ["1", "", "true", "on"])
def test_other_values_leave_it_on(value, stand_ins, tmp_path):
    done = run(f"{INSTALL}; import timm; print(timm.NAMES)", tmp_path, path=[stand_ins], OPTINSPIRED_AUTOLOAD=value)
    assert done.stdout.strip() == "['resnet50', 'hbnet50']"


def test_the_hook_fires_once_and_leaves_timm_as_it_is(stand_ins, tmp_path):
    code = f"""
        {INSTALL}; install(); print({HOOKS})
        import timm.models
        timm.models = timm.models
        print(timm.models.NAMES, type(timm).__name__, sorted(vars(timm.models.__loader__)))
        print(type(timm.models.__loader__).__name__, timm.models.__loader__.get_source("timm.models").split()[0])
    """
    out = run(code, tmp_path, path=[stand_ins]).stdout.splitlines()
    assert out == ["1", "['resnet50', 'hbnet50'] module ['name', 'path']", "SourceFileLoader NAMES"]


def test_installed_after_timm_it_registers_at_once(stand_ins, tmp_path):
    code = f"import timm; {INSTALL}; print(timm.NAMES)"
    assert run(code, tmp_path, path=[stand_ins]).stdout.strip() == "['resnet50', 'hbnet50']"


def test_finding_timm_does_not_use_up_the_hook(stand_ins, tmp_path):
    code = f"""
        {INSTALL}
        import importlib.util, pathlib, types
        sys.modules["timm"] = stub = types.ModuleType("timm")
        stub.__path__ = [{str(stand_ins / "timm")!r}]
        print(importlib.util.find_spec("timm.models").name, "timm_models" in sys.modules)
        import timm.models
        print(timm.models.NAMES)
    """
    out = run(code, tmp_path, path=[stand_ins]).stdout.splitlines()
    assert out == ["timm.models False", "['resnet50', 'hbnet50']"]


STRAYS = {
    "module": {"timm_models.py": "open('ran', 'w')\n"},
    "package": {"timm_models/__init__.py": "open('ran', 'w')\n"},
    "one that exits": {"timm_models.py": "open('ran', 'w')\nraise SystemExit(3)\n"},
    "namespace": {"timm_models/hbnet.py": "open('ran', 'w')\n"},
}


@pytest.mark.parametrize("stray", STRAYS)
def test_what_the_current_folder_has_does_not_run(stray, stand_ins, tmp_path):
    write(tmp_path / "here", STRAYS[stray])
    done = run(f"{INSTALL}; import timm; print(timm.NAMES)", tmp_path / "here", path=[stand_ins])
    assert (done.stdout.strip(), done.stderr) == ("['resnet50', 'hbnet50']", "")
    assert not (tmp_path / "here" / "ran").exists()


def test_a_module_of_our_name_that_is_imported_before_is_named(stand_ins, tmp_path):
    write(tmp_path / "here", {"timm_models.py": "MINE = 1\n"})
    code = f"import timm_models; {INSTALL}; import timm; print(timm.NAMES, timm_models.MINE)"
    done = run(code, tmp_path / "here", path=[stand_ins])
    assert done.stdout.strip() == "['resnet50'] 1"
    file = tmp_path / "here" / "timm_models.py"
    assert done.stderr.count("RuntimeWarning: optinspired-plugins") == 1
    assert f"another module is called timm_models: {file}" in done.stderr


def test_a_folder_without_our_package_is_named(stand_ins, tmp_path):
    (stand_ins / "timm_models" / "__init__.py").unlink()
    done = run(f"{INSTALL}; import timm; print(timm.NAMES)", tmp_path, path=[stand_ins])
    assert done.stdout.strip() == "['resnet50']"
    assert f"there is no package timm_models in {stand_ins}" in done.stderr


GONE = {
    "timm": "lambda n: n == 'timm' or n.startswith('timm.')",
    "timm and timm_models": "lambda n: n.startswith('timm')",
    "timm.models": "lambda n: n == 'timm.models'",
}


@pytest.mark.parametrize("gone", GONE)
def test_an_import_of_timm_anew_is_served_too(gone, stand_ins, tmp_path):
    code = f"""
        {INSTALL}
        import timm.models
        for _ in range(2):
            for name in filter({GONE[gone]}, list(sys.modules)):
                del sys.modules[name]
            import timm.models
            print(timm.models.NAMES)
    """
    done = run(code, tmp_path, path=[stand_ins])
    assert (done.stdout.splitlines(), done.stderr) == (["['resnet50', 'hbnet50']"] * 2, "")


# What others put before our finder. The loader of the first is a new one, as jaxtyping's and typeguard's are.
BEFORE = {
    "a loader of its own": """
        class Loader(SourceFileLoader):
            pass

        class First:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "timm":
                    spec = PathFinder.find_spec(name, path, target)
                    spec.loader = Loader(spec.loader.name, spec.loader.path)
                    return spec
    """,
    "lazy": """
        class First:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "timm":
                    spec = PathFinder.find_spec(name, path, target)
                    spec.loader = LazyLoader(spec.loader)
                    return spec
    """,
    "asks the others": """
        class First:
            def find_spec(self, *args):
                for finder in sys.meta_path:
                    if finder is not self and (spec := finder.find_spec(*args)):
                        return spec
    """,
    "path hook": """
        def first(path):
            return FileFinder(path, (SourceFileLoader, [".py"]))

        sys.path_hooks.insert(0, first)
        sys.path_importer_cache.clear()

        class First:
            def find_spec(self, *args):
                return None
    """,
}


@pytest.mark.parametrize("first", ["torch", "timm"])
@pytest.mark.parametrize("before", BEFORE)
def test_finders_before_ours_lose_no_name(before, first, stand_ins, tmp_path):
    """Import torch before timm, or timm first: the stand-in for torch calls its entry points as torch does."""
    write(stand_ins, {"pretended_torch.py": f"{INSTALL}\n", "timm/layers.py": "import pretended_torch\nACT = 1\n"})
    write(stand_ins, {"timm/__init__.py": "from .layers import ACT\nfrom .models import NAMES\n"})
    code = textwrap.dedent(f"""
        import sys
        from importlib.machinery import *
        from importlib.util import LazyLoader
        import {"timm" if first == "timm" else "pretended_torch"}
    """)
    code += textwrap.dedent(BEFORE[before])
    code += textwrap.dedent("""
        sys.meta_path.insert(0, First())
        for _ in range(2):
            for name in [name for name in sys.modules if name.startswith("timm")]:
                del sys.modules[name]
            import timm
            print(timm.NAMES)
    """)
    done = run(code, tmp_path, path=[stand_ins])
    assert (done.stdout.splitlines(), done.stderr) == (["['resnet50', 'hbnet50']"] * 2, "")


def test_torch_may_come_while_the_models_execute(stand_ins, tmp_path):
    write(stand_ins, {"timm/models/__init__.py": f"\n    {INSTALL}{MODELS}"})
    code = f"""
        import sys, types
        sys.modules["timm"] = stub = types.ModuleType("timm")
        stub.__path__ = [{str(stand_ins / "timm")!r}]
        import timm.models
        print(timm.models.NAMES)
    """
    assert run(code, tmp_path, path=[stand_ins]).stdout.strip() == "['resnet50', 'hbnet50']"


def test_a_lazy_timm_stays_lazy_and_knows_the_names(stand_ins, tmp_path):
    """Made as Python's documentation of LazyLoader has it, before torch and so our hook are there."""
    write(stand_ins, {"timm/models/__init__.py": MODELS + "\n    print('executed')\n"})
    code = f"""
        import sys, importlib.util
        spec = importlib.util.find_spec("timm")
        spec.loader = importlib.util.LazyLoader(spec.loader)
        timm = sys.modules["timm"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(timm)
        {INSTALL}
        print("installed")
        print(timm.NAMES)
    """
    out = run(code, tmp_path, path=[stand_ins]).stdout.splitlines()
    assert out == ["installed", "executed", "['resnet50', 'hbnet50']"]


def test_timm_in_a_zip_archive(stand_ins, tmp_path):
    # One loader serves a folder of an archive, so it also loads a sibling while timm.models executes.
    models = {"timm/layers.py": "", "timm/models/__init__.py": f"\n    import timm.layers{MODELS}"}
    write(stand_ins, models)
    write(tmp_path, {"timm_models.py": "raise SystemExit"})
    archive = tmp_path / "stand_ins.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for source in stand_ins.rglob("*.py"):
            file.write(source, source.relative_to(stand_ins))
    code = f"{INSTALL}; import timm; print(timm.NAMES, type(timm.models.__loader__).__name__)"
    done = run(code, tmp_path, path=[archive])
    assert (done.stdout.strip(), done.stderr) == ("['resnet50', 'hbnet50'] zipimporter", "")


def test_an_error_of_timm_is_the_users_to_see_and_a_retry_works(stand_ins, tmp_path):
    write(stand_ins, {"flag.py": "FAULTY = True\n"})
    models = stand_ins / "timm" / "models" / "__init__.py"
    models.write_text("import flag\nif flag.FAULTY: raise ZeroDivisionError('of timm')\n" + models.read_text())
    code = f"""
        {INSTALL}
        import flag
        try:
            import timm
        except ZeroDivisionError as error:
            print(error.args, error.__cause__, error.__context__, "timm_models" in sys.modules)
        flag.FAULTY = False
        import timm
        print(timm.NAMES)
    """
    done = run(code, tmp_path, path=[stand_ins])
    assert done.stdout.splitlines() == ["('of timm',) None None False", "['resnet50', 'hbnet50']"]
    assert done.stderr == ""


FAULTS = {
    "raises": ("x = 1\nraise ValueError('bad α')\n", "ValueError: bad α", 2),
    "syntax": ("x = 1\n\nx = = 2\n", "SyntaxError", 3),
    "missing": ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'", 1),
    "dynamic": (
        "from importlib import import_module\nimport_module('no_such_module')\n",
        "ModuleNotFoundError: No module named 'no_such_module'",
        2,
    ),
    "unprintable": ("class E(Exception):\n    def __str__(self): return 1 / 0\nraise E\n", "E: ", 3),
    "exits": ("import sys\nsys.exit(3)\n", "SystemExit: 3", 2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_warning_names_cause_and_line(fault, stand_ins, tmp_path):
    source, cause, line = FAULTS[fault]
    file = stand_ins / "timm_models" / "__init__.py"
    file.write_text(source, encoding="utf-8")
    done = run(f"{INSTALL}; import timm; print(timm.NAMES)", tmp_path, path=[stand_ins], PYTHONIOENCODING="utf-8")
    assert done.stdout.strip() == "['resnet50']"
    assert done.stderr.count("RuntimeWarning: optinspired-plugins") == 1
    assert cause in done.stderr
    assert f"(at {file}:{line})" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_timm_models_is_a_warning_too(stand_ins, tmp_path):
    code = f"{INSTALL}; sys.modules['timm_models'] = None; import timm; print(timm.NAMES)"
    done = run(code, tmp_path, path=[stand_ins])
    assert done.stdout.strip() == "['resnet50']"
    assert done.stderr.count("RuntimeWarning: optinspired-plugins") == 1


def test_the_advice_shows_the_full_traceback(stand_ins, broken, tmp_path):
    done = run(f"{INSTALL}; import timm; import timm_models", tmp_path, path=[broken, stand_ins], check=False)
    assert done.returncode == 1
    assert re.search(r"Traceback[^$]*broken\.py\", line 3[^$]*\nKeyError", done.stderr)


def test_warnings_as_errors_do_not_break_timm(stand_ins, broken, tmp_path):
    code = f"{INSTALL}; import timm; print(timm.NAMES)"
    done = run(code, tmp_path, "-W", "error", path=[broken, stand_ins])
    assert done.stdout.strip() == "['resnet50']"
    assert done.stderr.count("optinspired-plugins could not register") == 1
    assert "broken.py:3" in done.stderr


def test_warnings_as_errors_with_sound_models(stand_ins, tmp_path):
    done = run(f"{INSTALL}; import timm; print(timm.NAMES)", tmp_path, "-W", "error", path=[stand_ins])
    assert (done.stdout.strip(), done.stderr) == ("['resnet50', 'hbnet50']", "")


def test_threads_that_import_at_once(stand_ins, tmp_path):
    for file in stand_ins.glob("timm*/**/__init__.py"):
        file.write_text("import time; time.sleep(0.05)\n" + file.read_text())
    code = f"""
        {INSTALL}
        import threading
        from importlib import import_module

        def work(name):
            barrier.wait()
            seen.append(import_module(name))

        names = ["timm", "timm_models", "timm.models", "timm.models.resnet"] * 4
        barrier, seen = threading.Barrier(len(names)), []
        threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        print(len(seen) == len(names), sys.modules["timm"].NAMES)
    """
    done = run(code, tmp_path, path=[stand_ins])
    assert done.stdout.strip() == "True ['resnet50', 'hbnet50']"
    assert done.stderr == ""


@pytest.mark.slow
def test_models_need_nothing_of_posix(tmp_path):
    names = ["hbnet20", "agdnet40_k12", "optnet20", "cellnet_cifar"]
    code = f"""
        import sys
        sys.modules.update(dict.fromkeys(("fcntl", "grp", "pwd", "resource", "termios")))  # None: no such module
        import timm, torch
        for name in {names}:
            timm.create_model(name)(torch.zeros(2, 3, 32, 32)).sum().backward()
            print(name)
    """
    assert run(code, tmp_path, path=[ROOT]).stdout.split() == names
