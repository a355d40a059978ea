"""Registration at LAVIS's import: with a stand-in for LAVIS where only the hook matters, as that takes no time."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest

import lavis_xformer
from lavis_xformer.autoload import SWITCH, LavisFinder

ROOT = Path(lavis_xformer.__file__).parent.parent
PREPARE = """
import lavis_xformer
from lavis_xformer import autoload
lavis_xformer.register = lambda: print("registered")
autoload.install()
autoload.install()
"""
installed = any(isinstance(finder, LavisFinder) for finder in sys.meta_path)
needs_install = pytest.mark.skipif(not installed, reason="lavis_xformer is not installed, only on the path")


def python(*arguments: str, path: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}", **variables}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


def at_once(*commands: tuple[str, ...], **variables: str) -> list[subprocess.CompletedProcess[str]]:
    """Run interpreters that import LAVIS itself side by side, as each takes seconds."""
    with ThreadPoolExecutor(len(commands)) as pool:
        return list(pool.map(lambda command: python(*command, **variables), commands))


@pytest.fixture
def fake_lavis(tmp_path: Path):
    """Write a package called lavis, with the source given; return where it is."""

    def write(source: str) -> Path:
        (tmp_path / "lavis").mkdir()
        (tmp_path / "lavis" / "__init__.py").write_text(source)
        (tmp_path / "lavis" / "models.py").write_text("")
        return tmp_path

    return write


def test_registers_once_after_lavis_has_run(fake_lavis):
    path = fake_lavis("import lavis.models\nprint('lavis ran')")
    done = python("-c", PREPARE + "import lavis.models, lavis\nimport lavis_xformer.errors", path=path)
    assert done.stdout.split("\n")[:-1] == ["lavis ran", "registered"], done.stderr


def test_errors_of_lavis_surface_unchanged(fake_lavis):
    path = fake_lavis("raise ImportError('numpy 2 and OpenCV')")
    done = python("-c", PREPARE + "import lavis", path=path)
    assert done.stderr.strip().endswith("\nImportError: numpy 2 and OpenCV")
    assert "registered" not in done.stdout


def test_a_failing_registration_says_so(fake_lavis):
    broken = PREPARE + "def fail(): raise ModuleNotFoundError('no fairscale')\nlavis_xformer.register = fail\n"
    done = python("-c", broken + "import lavis", path=fake_lavis(""))
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: lavis_xformer could not register with LAVIS: ModuleNotFoundError: no fair")
    assert SWITCH in last


def test_waits_for_a_module_of_ours_that_imports_lavis(fake_lavis, tmp_path: Path):
    half = "import lavis\nprint('still half')"
    body = PREPARE + (
        "import sys, pathlib\n"
        f"folder = pathlib.Path({str(tmp_path)!r}, 'extra'); folder.mkdir()\n"
        f"(folder / 'half.py').write_text({half!r})\n"
        "lavis_xformer.__path__.append(str(folder))\n"
        "import lavis_xformer.half"
    )
    done = python("-c", body, path=fake_lavis(""))
    assert done.stdout.split("\n")[:-1] == ["still half", "registered"], done.stderr


def test_threads_that_import_lavis_at_once_register_once(fake_lavis):
    body = PREPARE + (
        "import threading, importlib\n"
        "threads = [threading.Thread(target=importlib.import_module, args=('lavis',)) for _ in range(8)]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]"
    )
    done = python("-c", body, path=fake_lavis("import time; time.sleep(0.2)"))
    assert done.stdout == "registered\n", done.stderr


def test_answers_for_the_entry_points_that_lavis_lacks(fake_lavis):
    code = PREPARE + "from importlib.util import find_spec\nprint(find_spec('lavis.train'), find_spec('lavis.nothing'))"
    done = python("-c", code, path=fake_lavis(""))
    assert str(ROOT / "lavis_xformer" / "train.py") in done.stdout
    assert done.stdout.strip().endswith("None")


def test_leaves_an_entry_point_of_lavis_to_lavis(fake_lavis):
    path = fake_lavis("")
    (path / "lavis" / "train.py").write_text("")
    done = python("-c", PREPARE + "import lavis.train\nprint(lavis.train.__file__)", path=path)
    assert done.stdout.strip().endswith(str(path / "lavis" / "train.py"))


def run_pth(variable: str, after: str, *, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    line = (ROOT / "lavis_xformer.pth").read_text()
    assert line.count("\n") == 1, "site runs line by line"
    return python(*flags, "-c", line + after, **{SWITCH: variable})


def test_a_variable_switches_it_off():
    count = "import sys; print(sum(type(f).__name__ == 'LavisFinder' for f in sys.meta_path))"
    assert run_pth("1", count).stdout.strip() == "1"
    assert run_pth("0", count).stdout.strip() == "0"


def test_a_half_removed_package_disturbs_nobody():
    done = run_pth("1", "print('fine')", flags=("-S", "-E"))
    assert (done.stdout, done.stderr) == ("fine\n", "")


def test_costs_less_than_the_interpreters_own_start_where_lavis_is_not_imported(tmp_path: Path):
    line = (ROOT / "lavis_xformer.pth").read_text().strip()
    code = (
        f"import time, sys; start = time.process_time(); exec({line!r})\n"
        "print((time.process_time() - start) / start, 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(tmp_path), SWITCH: "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    ratios = []  # of CPU times within a process, so that a slow or busy machine does not count
    for _ in range(5):  # -S: without an installed hook, which would have paid already
        command = [sys.executable, "-S", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        ratio, torch_imported = done.stdout.split()
        assert torch_imported == "False"
        ratios.append(float(ratio))
    assert min(ratios) < 1


@needs_install
def test_a_fresh_interpreter_finds_our_models_by_lavis_alone_or_by_importing_one_of_ours_first():
    by_lavis = (
        "from lavis.models import load_model_and_preprocess, model_zoo\n"
        "from lavis.common.registry import registry\n"
        "import lavis.datasets.builders as builders\n"
        "assert 'xformer ' in str(model_zoo), model_zoo\n"
        "assert registry.get_task_class('xformer_stage1') and registry.get_runner_class('xformer_runner')\n"
        "assert registry.get_processor_class('xformer_image_eval')\n"
        "assert 'xformer_scenes' in builders.dataset_zoo.get_names()\n"
        "assert registry.get_path('cache_root') == '/some/cache', registry.get_path('cache_root')\n"
        "import lavis_xformer\n"
        "lavis_xformer.register(); lavis_xformer.register()\n"
        "print('found')"
    )
    by_ours = (
        "import lavis_xformer.models.stage1\n"
        "from lavis.common.registry import registry\n"
        "print(registry.get_model_class('xformer'), registry.get_task_class('xformer_stage1'))"
    )
    found, ours = at_once(("-c", by_lavis), ("-c", by_ours), LAVIS_XFORMER_CACHE="/some/cache")
    assert found.stdout.strip().endswith("found"), found.stderr
    assert "XFormer" in ours.stdout, ours.stderr
    assert "None" not in ours.stdout


@needs_install
def test_the_entry_points_run():
    for done in at_once(*(("-m", module, "--help") for module in ("lavis.train", "lavis.evaluate"))):
        assert done.returncode == 0, done.stderr
        assert "--cfg-path" in done.stdout
        assert "--options" in done.stdout


@needs_install
def test_modules_of_ones_own_are_imported_by_every_command(tmp_path: Path):
    """As docs/engine.md says."""
    (tmp_path / "my_things.py").write_text(
        "from lavis_xformer.models.fusion import FUSIONS, NoFusion\nFUSIONS['mine'] = NoFusion\n"
    )
    train = ("-m", "lavis.train", "--cfg-path", str(ROOT / "projects/xformer/pretrain.yaml"), "--options")
    wrong, gone = (
        python(*train, "model.fusion=mime", path=tmp_path, LAVIS_XFORMER_IMPORT=name) for name in ("my_things", "gone")
    )
    assert wrong.returncode == 2
    assert "model.fusion: 'mime'; did you mean 'mine'?" in wrong.stderr
    assert gone.returncode != 0
    assert "No module named 'gone'" in gone.stderr


def test_the_version_is_that_of_the_installation():
    if not installed:
        pytest.skip("not installed")
    assert metadata.version("lavis_xformer") == lavis_xformer.__version__
