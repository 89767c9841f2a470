"""timm knows the models without an import, and no fault of ours breaks ``import torch`` or ``import timm``.

Every case runs in a fresh interpreter. Cases about the mechanics use small stand-ins for timm and timm_models.
"""

import json
import os
import re
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
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


@pytest.fixture
def stand_ins(tmp_path):
    """A folder with stand-ins for timm and timm_models; ``timm.NAMES`` is the registry."""
    files = {
        "timm/__init__.py": "from .models import NAMES\n",
        "timm/models/__init__.py": "NAMES = ['resnet50']\n",
        "timm/models/resnet.py": "BASE = 'ResNet'\n",
        "timm_models/__init__.py": """
            from timm.models import NAMES
            from timm.models.resnet import BASE
            NAMES.append('hbnet50')
        """,
    }
    return write(tmp_path / "stand_ins", files)


@pytest.fixture
def broken(tmp_path):
    """A folder whose timm_models raises on line 3 of broken.py."""
    files = {"timm_models/__init__.py": "from . import broken\n", "timm_models/broken.py": BROKEN}
    return write(tmp_path / "broken", files)


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


@pytest.fixture(scope="module")
def timm_folders(tmp_path_factory):
    """Version name -> what to put on the path for it: the installed timm needs nothing."""
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


def test_the_hook_fires_once_and_leaves_no_trace(stand_ins, tmp_path):
    code = f"""
        {INSTALL}; install(); print({HOOKS})
        import timm.models
        print(timm.models.NAMES, {HOOKS}, vars(timm.models.__loader__).keys() & {{"exec_module"}})
        print(type(timm.models.__loader__).__name__, timm.models.__loader__.get_source("timm.models"))
    """
    out = run(code, tmp_path, path=[stand_ins]).stdout.splitlines()
    assert out[:3] == ["1", "['resnet50', 'hbnet50'] 0 set()", "SourceFileLoader NAMES = ['resnet50']"]


def test_installed_after_timm_it_registers_at_once(stand_ins, tmp_path):
    code = f"import timm; {INSTALL}; print(timm.NAMES, {HOOKS})"
    assert run(code, tmp_path, path=[stand_ins]).stdout.strip() == "['resnet50', 'hbnet50'] 0"


def test_finding_timm_does_not_use_up_the_hook(stand_ins, tmp_path):
    code = f"""
        {INSTALL}
        import importlib.util, pathlib, types
        sys.modules["timm"] = stub = types.ModuleType("timm")
        stub.__path__ = [{str(stand_ins / "timm")!r}]
        print(importlib.util.find_spec("timm.models").name, "timm_models" in sys.modules, {HOOKS})
        import timm.models
        print(timm.models.NAMES, {HOOKS})
    """
    out = run(code, tmp_path, path=[stand_ins]).stdout.splitlines()
    assert out == ["timm.models False 1", "['resnet50', 'hbnet50'] 0"]


def test_timm_in_a_zip_archive(stand_ins, tmp_path):
    # One loader serves a folder of an archive, so it also loads a sibling while timm.models executes.
    models = {"timm/layers.py": "", "timm/models/__init__.py": "import timm.layers\nNAMES = ['resnet50']\n"}
    write(stand_ins, models)
    archive = tmp_path / "stand_ins.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for source in stand_ins.rglob("*.py"):
            file.write(source, source.relative_to(stand_ins))
    code = f"{INSTALL}; import timm; print(timm.NAMES, {HOOKS}, type(timm.models.__loader__).__name__)"
    done = run(code, tmp_path, path=[archive])
    assert (done.stdout.strip(), done.stderr) == ("['resnet50', 'hbnet50'] 0 zipimporter", "")


def test_a_finder_that_asks_the_others(stand_ins, tmp_path):
    code = f"""
        import sys

        class Asks:
            busy = False
            def find_spec(self, *args):
                for finder in sys.meta_path:
                    if finder is not self and (spec := finder.find_spec(*args)):
                        return spec

        from optinspired_plugins._autoload import install
        sys.meta_path.insert(0, Asks())
        install()
        import timm
        print(timm.NAMES, {HOOKS})
    """
    assert run(code, tmp_path, path=[stand_ins]).stdout.strip() == "['resnet50', 'hbnet50'] 0"


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
            print(error.args, error.__cause__, error.__context__, "timm_models" in sys.modules, {HOOKS})
        flag.FAULTY = False
        import timm
        print(timm.NAMES, {HOOKS})
    """
    done = run(code, tmp_path, path=[stand_ins])
    assert done.stdout.splitlines() == ["('of timm',) None None False 1", "['resnet50', 'hbnet50'] 0"]
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
    for file in stand_ins.rglob("__init__.py"):
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
        print(len(seen) == len(names), sys.modules["timm"].NAMES, {HOOKS})
    """
    done = run(code, tmp_path, path=[stand_ins])
    assert done.stdout.strip() == "True ['resnet50', 'hbnet50'] 0"
    assert done.stderr == ""
