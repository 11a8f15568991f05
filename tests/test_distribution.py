"""The sdist and the wheel: what they hold, and that the wheel works alone."""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import mfm_ref

ROOT = Path(mfm_ref.__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = f"{PROJECT['name']}-{PROJECT['version']}"
# Not installed by the wheel alone: what the extras bring, and the folders beside the package.
ABSENT = "sklearn diffusers transformers pandas pytest hypothesis pdoc nbformat toy imagenet benchmarks tests tutorials"


def tracked() -> list[str]:
    """The files of the working tree that git tracks or would, as paths from its root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints; it must end with code 0."""
    result = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that is built from it, of a copy of the tree."""
    folder = tmp_path_factory.mktemp("dist")
    for name in tracked():
        if (ROOT / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "tree" / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "tree", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def unpacked(built) -> Path:
    """The wheel as pip would lay it out."""
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as wheel:
        wheel.extractall(built / "site")
    return built / "site"


def test_the_wheel_installs_the_package_and_nothing_else(built, unpacked):
    assert {path.name for path in unpacked.iterdir()} == {"mfm_ref", f"{NAME}.dist-info"}
    sources = {path.name for path in (ROOT / "mfm_ref").glob("*.py")}
    held = {str(path.relative_to(unpacked / "mfm_ref")) for path in (unpacked / "mfm_ref").rglob("*") if path.is_file()}
    assert sources <= held
    assert {name for name in held - sources if name != "py.typed"} == set()
    assert (unpacked / f"{NAME}.dist-info" / "top_level.txt").read_text().split() == ["mfm_ref"]
    assert list((unpacked / f"{NAME}.dist-info").rglob("LICENSE"))


def test_the_sdist_holds_the_package_and_not_the_tests(built):
    """The package, readme and licence; the tests are left to a clone, whose folders they read."""
    with tarfile.open(built / f"{NAME}.tar.gz") as sdist:
        names = {name.removeprefix(f"{NAME}/") for name in sdist.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "PKG-INFO", "mfm_ref/__init__.py"} <= names
    assert names >= {f"mfm_ref/{path.name}" for path in (ROOT / "mfm_ref").glob("*.py")}
    folders = {name.split("/")[0] for name in names if "/" in name}
    assert folders == {"mfm_ref", "mfm_ref.egg-info"}


def test_the_metadata_is_that_of_the_project(unpacked):
    metadata = email.message_from_string((unpacked / f"{NAME}.dist-info" / "METADATA").read_text())
    assert (metadata["Name"], metadata["Version"]) == (PROJECT["name"], PROJECT["version"])
    assert metadata["License-Expression"] == PROJECT["license"]
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert [line.replace(" ", "") for line in needed] == [line.replace(" ", "") for line in PROJECT["dependencies"]]


ALONE = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT.split()!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import importlib, pathlib, pkgutil, torch
import mfm_ref
print(pathlib.Path(mfm_ref.__file__).parent.parent)
if "--all" in sys.argv:
    for module in pkgutil.iter_modules(mfm_ref.__path__):
        importlib.import_module("mfm_ref." + module.name)
p1 = mfm_ref.GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
print(mfm_ref.sample_posterior(mfm_ref.ExactFlowMap(p1), 0.5, torch.ones(3, 2), 4).shape)
"""


def test_the_wheel_works_from_another_folder_without_the_extras(unpacked, tmp_path):
    """Every module is imported; what only the extras bring is made absent."""
    folder, shape = run(sys.executable, "-c", ALONE, "--all", cwd=tmp_path, PYTHONPATH=str(unpacked)).splitlines()
    assert Path(folder) == unpacked
    assert shape == "torch.Size([4, 3, 2])"
    some = "import mfm_ref.verify as v; print(v.__file__, all(r.passed for r in v.verify(0, v.EQUATIONS[:6])))"
    assert run(sys.executable, "-c", some, cwd=tmp_path, PYTHONPATH=str(unpacked)).split() == [
        str(unpacked / "mfm_ref" / "verify.py"),
        "True",
    ]


def test_the_absence_is_noticed(tmp_path):
    with pytest.raises(AssertionError, match="ModuleNotFoundError: sklearn"):
        run(sys.executable, "-c", ALONE.split("import importlib")[0] + "import sklearn", cwd=tmp_path)


@pytest.mark.slow
def test_the_wheel_in_an_environment_of_its_own(built, tmp_path):
    """pip, as it is configured where the test runs, installs the wheel and the pinned versions of what it needs."""
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    wheel, pins = built / f"{NAME}-py3-none-any.whl", ROOT / "constraints.txt"
    run(python, "-m", "pip", "install", "--quiet", "-c", pins, wheel, cwd=tmp_path)
    installed = run(python, "-m", "pip", "list", "--format", "freeze", cwd=tmp_path).lower()
    assert "torch==" in installed
    for extra in ("scikit-learn", "diffusers", "transformers", "pytest"):
        assert f"{extra}==" not in installed
    folder, shape = run(python, "-I", "-c", ALONE, "--all", cwd=tmp_path).splitlines()
    assert Path(folder).is_relative_to(tmp_path)
    assert shape == "torch.Size([4, 3, 2])"
    assert "E12" in run(python, "-I", "-m", "mfm_ref.verify", cwd=tmp_path)
