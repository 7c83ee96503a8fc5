"""The package as others get it: what a wheel holds, what an import costs, and that it works outside the clone."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path.stem for path in (ROOT / "hific_nb").glob("*.py") if not path.stem.startswith("_"))
# What `pip install hific_nb`, without extras, does not bring: the codec and the command line do without.
EXTRAS_ONLY = ["IPython", "anywidget", "constriction", "execnb", "fastcore", "hypothesis", "ipykernel", "ipywidgets", "jupyterlab",
               "matplotlib", "nbclient", "nbconvert", "nbdev", "nbformat", "papermill", "pillow_jxl", "playwright", "pytest",
               "torchac"]
# Installed, but slow to import: only the function that needs one imports it.
HEAVY = ["numba", "scipy", "skimage", "pytorch_msssim"]


def run(*command, cwd, **env):
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HIFIC_MODELS")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=inherited | env, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A copy of the tree to build in, with the left-overs of an older build."""
    copy = tmp_path_factory.mktemp("build") / "source"
    copy.mkdir()
    for path in ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "constraints.txt",
                 "hific_nb", "nbs"):
        if (ROOT / path).is_dir():
            shutil.copytree(ROOT / path, copy / path, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        elif (ROOT / path).exists():
            shutil.copyfile(ROOT / path, copy / path)
    stale = copy / "build" / "lib" / "hific_nb" / "stale.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    return copy


def build_wheel(what, out):
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", out, what,
        cwd=out.parent)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def wheel(source):
    return build_wheel(source, source.parent / "wheel")


def contents(wheel):
    with zipfile.ZipFile(wheel) as z:
        return {name: z.read(name) for name in z.namelist()}


def test_wheel_holds_modules_models_jobs_and_explorers(wheel, source):
    packed = contents(wheel)
    expected = {f"hific_nb/{path.name}": path for path in (ROOT / "hific_nb").glob("*.py")}
    for folder in ("jobs", "explore"):
        expected |= {f"hific_nb/notebooks/{folder}/{path.name}": path
                     for path in (ROOT / "nbs" / folder).glob("*.ipynb") if path.stem != "training_diary"}
    models = ROOT / "hific_nb" / "models"
    expected |= {f"hific_nb/{path.relative_to(ROOT / 'hific_nb').as_posix()}": path for path in models.rglob("*.*")
                 if path.suffix in (".json", ".safetensors", ".md", ".jpg")}
    assert {name for name in packed if name.startswith("hific_nb/")} == set(expected)
    for name, path in expected.items():
        assert packed[name] == path.read_bytes(), name
    assert "hific_nb/notebooks/jobs/compress.ipynb" in packed
    assert any(name.endswith(".safetensors") for name in packed), "no model is shipped"
    assert all(name.split("/")[0] in ("hific_nb", wheel.name.rsplit("-", 3)[0] + ".dist-info") for name in packed)
    assert not (source / "hific_nb" / "notebooks").exists()  # copied into the build alone


def test_sdist_holds_what_the_build_needs(source, wheel):
    code = "from setuptools import build_meta; print(build_meta.build_sdist('sdist'))"
    name = run(sys.executable, "-c", code, cwd=source).splitlines()[-1]
    again = build_wheel(source / "sdist" / name, source.parent / "wheel-of-sdist")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())


def test_metadata(wheel):
    (text,) = [data.decode() for name, data in contents(wheel).items() if name.endswith(".dist-info/METADATA")]
    assert re.search(r"^License(-Expression)?: Apache-2.0$", text, re.MULTILINE)
    assert "Requires-Python: >=3.10" in text and "# " in text.split("\n\n", 1)[1]  # README.md
    core = set(re.findall(r"^Requires-Dist: ([\w-]+)(?![^\n]*extra ==)", text, re.MULTILINE))
    assert core == {"torch", "numpy", "pillow", "safetensors", "filelock", "numba", "tqdm", "scikit-image", "pytorch-msssim"}
    assert set(re.findall(r"^Provides-Extra: (\w+)$", text, re.MULTILINE)) == {
        "notebooks", "train", "baselines", "urls", "cluster", "large", "coders", "dev"}
    (text,) = [data.decode() for name, data in contents(wheel).items() if name.endswith("entry_points.txt")]
    assert re.search(r"^hific ?= ?hific_nb\.cli:main$", text, re.MULTILINE)


def test_build_needs_setuptools_alone():
    """Built in isolation there is no torch yet, so the build may not import the package to learn its version."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))):
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {"setuptools"}


def test_constraints_pin_every_direct_dependency():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    asked = " ".join(v for k, v in config["DEFAULT"].items() if k.endswith("requirements")).split()
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines if "==" in line}
    direct = {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", r)[0]).lower() for r in asked}
    assert direct - pinned <= {"setuptools"}
    assert "torch==2.13.0" in lines
    assert not [line for line in lines if "@" in line or "/" in line or "+" in line], "a local path or version"


def imported(statement, cwd):
    """Top-level packages that `statement` brings into a fresh interpreter."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    return set(json.loads(run(sys.executable, "-c", code, cwd=cwd, PYTHONPATH=str(ROOT)).splitlines()[-1]))


def test_importing_the_package_is_cheap(tmp_path):
    assert imported("import hific_nb", tmp_path).isdisjoint({"torch", "numpy", "PIL", *HEAVY, *EXTRAS_ONLY})


def test_no_module_imports_what_is_heavy_or_of_an_extra(tmp_path):
    statement = "\n".join(f"import hific_nb.{module}" for module in MODULES)
    assert imported(statement, tmp_path).isdisjoint({*HEAVY, *EXTRAS_ONLY})


def test_public_names(tmp_path):
    code = "from hific_nb import Codec, HfcError, list_models; print(Codec.__module__, HfcError.__module__)"
    out = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert out.split() == ["hific_nb.codec", "hific_nb.hfc"]


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """A virtual environment with the wheel and its core dependencies alone; its bin folder.

    The dependencies are those of this environment; packages that only extras bring are hidden.
    """
    home = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", home / "venv", cwd=home)
    bin_folder = home / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = bin_folder / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=home)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (site / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hidden:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {EXTRAS_ONLY!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hidden)\n")
    return bin_folder


def test_installed_package_is_the_one_that_runs(installed, tmp_path):
    code = "import hific_nb, hific_nb.config as c; print(hific_nb.__file__); print(c.find_job('compress'))"
    for path in run(installed / "python", "-c", code, cwd=tmp_path).split():
        assert Path(path).resolve().is_relative_to(installed.parent.resolve()), path


def test_command_line_outside_the_clone(installed, tmp_path):
    """With the core dependencies alone: a photo to a file and back."""
    from PIL import Image

    hific = installed / "hific"
    assert "compress" in run(hific, "--help", cwd=tmp_path)
    assert "hific-lite" in run(hific, "models", cwd=tmp_path)
    Image.linear_gradient("L").resize((70, 50)).convert("RGB").save(tmp_path / "photo.png")
    run(hific, "compress", "photo.png", "--out", "there", cwd=tmp_path)
    (packed,) = tmp_path.rglob("*.hfc")
    assert "hific-lite" in run(hific, "info", packed, cwd=tmp_path)
    run(hific, "decompress", packed, "--out", "back", cwd=tmp_path)
    (picture,) = (p for p in tmp_path.rglob("*.png") if p.name != "photo.png" or p.parent != tmp_path)
    with Image.open(picture) as image:
        assert image.size == (70, 50)
