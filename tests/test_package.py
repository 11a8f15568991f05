"""The package from outside: what it imports, what it exports, and one order of arguments everywhere."""

import ast
import inspect
import sys
import typing
from pathlib import Path

import pytest

import mfm_ref
from mfm_ref import ExactFlowMap, FlowMap, MetaFlowMap

FOLDER = Path(mfm_ref.__file__).parent
MODULES = sorted(FOLDER.rglob("*.py"))
ALLOWED = {"mfm_ref", "torch", "numpy", "scipy", "safetensors", "tqdm", "matplotlib"}
ORDER = ["s", "w", "u", "z", "t", "x", "y"]


def imports(source: str) -> set[str]:
    """Top-level packages that a module imports, anywhere in its text; a relative import is the package's own."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("mfm_ref" if node.level else node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_stay_within_the_core(path):
    """torch, numpy, scipy, safetensors, tqdm, matplotlib and the standard library; never the rungs built on it."""
    foreign = imports(path.read_text()) - ALLOWED - sys.stdlib_module_names
    assert not foreign, f"{path.name} imports {foreign}"
    assert not imports(path.read_text()) & {"toy", "imagenet", "tests"}


def test_the_import_check_sees_every_form():
    source = "import toy.mixture as m\ndef f():\n    from sklearn.datasets import load_digits\nfrom . import checks"
    assert imports(source) == {"toy", "sklearn", "mfm_ref"}


def test_public_names_exist_once_and_are_documented():
    assert len(set(mfm_ref.__all__)) == len(mfm_ref.__all__)
    for name in mfm_ref.__all__:
        exported = getattr(mfm_ref, name)
        assert exported.__module__.startswith("mfm_ref."), name
        assert (exported.__doc__ or "").strip(), f"{name} has no docstring"


CONTRACT = """GaussianMixture LinearReward GaussianLikelihood interpolate noise_scale glass_drift FlowMap ExactFlowMap
sample_posterior sample diagonal_loss semigroup_loss value value_gradient doob_drift steer finetune_loss
sliced_wasserstein mmd MLP"""
METHODS = ["sample", "log_prob", "marginal", "posterior", "denoiser", "drift", "score", "value", "tilt"]


def test_the_contract_of_names_is_kept():
    assert set(CONTRACT.split()) <= set(mfm_ref.__all__)
    assert all(callable(getattr(mfm_ref.GaussianMixture, method)) for method in METHODS)


def public_functions() -> dict:
    """Every exported function, and the public methods that exported classes define themselves."""
    found = {}
    for name in mfm_ref.__all__:
        exported = getattr(mfm_ref, name)
        members = {name: exported} if inspect.isfunction(exported) else vars(exported)
        for method, member in members.items():
            if inspect.isfunction(member) and (method == "__call__" or not method.startswith("_")):
                found[name if method == name else f"{name}.{method}"] = member
    return found


@pytest.mark.parametrize("name", sorted(set(public_functions()) - {"sliced_wasserstein", "mmd"}))
def test_arguments_come_in_one_order(name):
    """(s, w, u, z, t, x, y), each left out where it has no part; t·x and a network's context stand where x does.

    The two distances are left out: their x and y are two sets of samples.
    """
    parameters = inspect.signature(public_functions()[name]).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    symbols = ["x" if a in ("tx", "context") else a for a in positional]
    named = [a for a in symbols if a in ORDER]
    assert named == sorted(named, key=ORDER.index), f"{name}({', '.join(positional)})"


@pytest.mark.parametrize("owner", [MetaFlowMap, FlowMap, ExactFlowMap])
@pytest.mark.parametrize("method", ["__call__", "velocity", "from_tx", "velocity_from_tx"])
def test_networks_and_oracles_answer_to_one_protocol(owner, method):
    function = owner.forward if owner is FlowMap and method == "__call__" else getattr(owner, method)
    context = "tx" if method.endswith("from_tx") else "x"
    parameters = inspect.signature(function).parameters
    optional = ["guidance"] if owner is FlowMap else []
    assert list(parameters) == ["self", "s", "u", "z", "t", context, "y", *optional]
    assert all(parameters[name].default is None for name in optional)
    assert parameters["y"].default is None


@pytest.mark.parametrize("name", sorted(public_functions()))
def test_signatures_are_documented_and_name_their_options(name):
    """A docstring, a return type, and no `**kwargs` to pass anything through."""
    function = public_functions()[name]
    assert (function.__doc__ or "").strip()
    assert "return" in typing.get_type_hints(function)
    assert all(p.kind is not p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_modules_and_what_they_define_say_what_they_are(path):
    """Public functions and classes at the top of a module, exported or not."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_the_version_is_the_distributions():
    """Read from pyproject.toml where the tests run in a checkout."""
    pyproject = FOLDER.parent / "pyproject.toml"
    assert f'version = "{mfm_ref.__version__}"' in pyproject.read_text()
