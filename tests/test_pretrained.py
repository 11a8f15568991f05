"""Maps on disk: the same outputs bit by bit, and refusals that say what does not fit."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mfm_ref import MLP, FlowMap, files
from mfm_ref.files import save_weights


class Tied(nn.Module):
    """A network of a user's own, with a weight that two layers share."""

    shape = (2, 3)
    reads_tx = False

    def __init__(self, width: int, scale: float = 1.0):
        super().__init__()
        self.config = {"width": width, "scale": scale}
        self.scale = scale
        self.inlet, self.outlet = nn.Linear(6, width, bias=False), nn.Linear(width, 6, bias=False)
        self.again = nn.Linear(6, width, bias=False)
        self.again.weight = self.inlet.weight

    def velocity(self, s, u, z, t, context, y):
        h = torch.tanh(self.inlet(z.flatten(1)) + self.again(context.flatten(1)))
        return self.scale * self.outlet(h).view_as(z)


def mlp(dtype=torch.float32, **options):
    """Random weights, and a mean and a covariance that no constructor would guess."""
    rng = torch.Generator().manual_seed(0)
    root = torch.randn(3, 3, generator=rng, dtype=dtype)
    X = FlowMap(MLP(torch.randn(3, generator=rng, dtype=dtype), root @ root.T, hidden=16, **options))
    with torch.no_grad():
        for parameter in X.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=dtype))
    return X


def velocities(X, dtype=torch.float32, y=None, guidance=None):
    rng = torch.Generator().manual_seed(1)
    z, x = torch.randn(2, 5, *X.shape, generator=rng, dtype=dtype)
    return X.velocity(0.3, 0.6, z, 0.4, x, y, guidance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": 1, "min_std": 0.5},
        {"depth": 3, "normalise": True, "n_classes": 4},
        {"n_classes": 2, "reads_guidance": True},
    ],
)
def test_an_mlp_comes_back_bit_by_bit(tmp_path, dtype, options):
    X = mlp(dtype, **options)
    torch.manual_seed(5)
    X.save_pretrained(tmp_path / "map")
    loaded = FlowMap.from_pretrained(str(tmp_path / "map"))
    call = {"y": torch.tensor([0, 1, 2, 1, 0]) if options.get("n_classes") else None}
    call["guidance"] = 2.0 if options.get("reads_guidance") else None
    assert torch.equal(velocities(X, dtype, **call), velocities(loaded, dtype, **call))
    assert loaded.dtype == dtype
    assert loaded.network.config == X.network.config
    assert {path.name for path in (tmp_path / "map").iterdir()} == {"model.safetensors", "config.json"}
    assert os.listdir(tmp_path) == ["map"]
    assert all(parameter.requires_grad for parameter in loaded.parameters())  # it can be trained on


def test_a_network_of_ones_own_comes_back_with_its_ties(tmp_path):
    X = FlowMap(Tied(5, scale=0.25).double())
    X.save_pretrained(tmp_path)
    loaded = FlowMap.from_pretrained(tmp_path, network=Tied)
    assert torch.equal(velocities(X, torch.float64), velocities(loaded, torch.float64))
    assert loaded.network.again.weight is loaded.network.inlet.weight
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "format": "mfm_ref model 1",
        "network": "Tied",
        "config": {"width": 5, "scale": 0.25},
    }


def test_saving_replaces_what_was_there(tmp_path):
    mlp().save_pretrained(tmp_path / "map")
    X = mlp(depth=2)
    X.save_pretrained(tmp_path / "map")
    assert torch.equal(velocities(FlowMap.from_pretrained(tmp_path / "map")), velocities(X))
    assert len(os.listdir(tmp_path / "map")) == 2
    assert os.listdir(tmp_path) == ["map"]


def test_saving_deletes_nothing_but_a_saved_model(tmp_path):
    mlp().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "thesis.txt").write_text("the work of years")
    with pytest.raises(ValueError, match=r"must be a new folder or hold a saved model alone, found thesis.txt$"):
        mlp(depth=2).save_pretrained(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "the work of years"
    assert (tmp_path / "model.safetensors").read_bytes() == before
    for name in "abcde":
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"found a, b, c, d and 2 more$"):
        mlp().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"thesis.txt must be a new folder"):
        mlp().save_pretrained(tmp_path / "thesis.txt")


def test_a_saved_map_has_its_name_at_every_moment(tmp_path, monkeypatch):
    """No call that names or deletes anything leaves the name without a whole map, if the disk can exchange names."""
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.touch()
    if not files._exchange(a, b):
        pytest.skip("this disk cannot")
    assert a.is_file() and b.is_dir()
    mlp().save_pretrained(tmp_path / "map")
    found = []

    def spied(call):
        def spy(*arguments, **options):
            returned = call(*arguments, **options)
            found.append(FlowMap.from_pretrained(tmp_path / "map").network.config["depth"])
            return returned

        return spy

    for module, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree"), (files, "_exchange")):
        monkeypatch.setattr(module, name, spied(getattr(module, name)))
    mlp(depth=2).save_pretrained(tmp_path / "map")
    monkeypatch.undo()
    assert found == sorted(found, reverse=True) and set(found) == {4, 2}


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_saved_map_is_whole_while_its_predecessor_is_deleted(tmp_path, monkeypatch, exchanges):
    """Deleting takes long, so a process may die within; what one left that had this one's number is in no way."""
    if not exchanges:  # as on a system that cannot
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    first, second, found = mlp(), mlp(depth=2), []
    first.save_pretrained(tmp_path / "map")
    left = tmp_path / f".{os.getpid()}.old.map"
    left.mkdir()
    (left / "config.json").touch()
    delete = shutil.rmtree

    def spy(path, **options):
        found.append((path.exists(), FlowMap.from_pretrained(tmp_path / "map").network.config["depth"]))
        delete(path, **options)

    monkeypatch.setattr(shutil, "rmtree", spy)
    second.save_pretrained(tmp_path / "map")
    monkeypatch.undo()
    assert found[-1] == (True, 2)
    assert {depth for _, depth in found} == {first.network.config["depth"], 2}
    assert os.listdir(tmp_path) == ["map"]


def test_a_config_that_another_network_comes_of_is_refused(tmp_path):
    FlowMap(Tied(5, scale=3.0)).save_pretrained(tmp_path / "map")
    path = tmp_path / "map" / "config.json"
    whole = json.loads(path.read_text())
    del whole["config"]["scale"]
    path.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=r"must have the same config, got .*'scale': 1.0"):  # the default
        FlowMap.from_pretrained(tmp_path / "map", network=Tied)


def test_a_checkpoint_says_where_its_models_are(tmp_path):
    mlp().save_pretrained(tmp_path / "step-00000001" / "ema")
    with pytest.raises(ValueError, match="step-00000001 is a checkpoint: its folder ema holds a model"):
        FlowMap.from_pretrained(tmp_path / "step-00000001")


def changed(folder, change):
    """Rewrite the weights of a saved map."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("network.mean"), "must fit the model: network.mean is missing$"),
        (lambda w: w.update(extra=torch.zeros(1)), "must fit the model: extra is not in the model$"),
        (lambda w: w.update({"network.mean": torch.zeros(4)}), r"network.mean is \(4,\) of .*, but \(3,\) of"),
        (lambda w: w.clear(), "is missing.* and [0-9]+ more$"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, message):
    mlp().save_pretrained(tmp_path)
    changed(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        FlowMap.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("harm", ["truncated", "removed"])
def test_damaged_files_are_refused(tmp_path, name, harm):
    mlp().save_pretrained(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if harm == "truncated":
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{name} must be a readable (safetensors|JSON) file"):
        FlowMap.from_pretrained(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.config.json must be a readable JSON file"):
        FlowMap.from_pretrained(tmp_path / "nowhere")


def test_networks_that_do_not_fit_are_refused(tmp_path):
    FlowMap(Tied(5)).save_pretrained(tmp_path / "tied")
    with pytest.raises(ValueError, match=r"the network 'Tied'; known by name are \['MLP', 'UNet'\].*network=MyNetwork"):
        FlowMap.from_pretrained(tmp_path / "tied")
    mlp().save_pretrained(tmp_path / "mlp")
    with pytest.raises(ValueError, match=r"must be the arguments of MLP: .*unexpected keyword"):
        FlowMap.from_pretrained(tmp_path / "mlp", network=Tied)
    (tmp_path / "mlp" / "config.json").write_text('{"hidden_size": 768}')  # another library's
    with pytest.raises(ValueError, match="must have the format 'mfm_ref model 1' and a config"):
        FlowMap.from_pretrained(tmp_path / "mlp")


@pytest.mark.parametrize("config", [{"width": torch.zeros(2)}, {"sizes": (1, 2)}, {"scale": float("nan")}])
def test_a_config_that_json_changes_is_refused(tmp_path, config):
    network = Tied(5)
    network.config = config
    with pytest.raises(ValueError, match="the config of a network must be"):
        FlowMap(network).save_pretrained(tmp_path / "map")
    assert os.listdir(tmp_path) == []


def test_a_network_without_a_config_is_refused(tmp_path):
    network = Tied(5)
    del network.config
    with pytest.raises(ValueError, match="needs a config, a dict; Tied has none"):
        FlowMap(network).save_pretrained(tmp_path / "map")
    assert os.listdir(tmp_path) == []


def test_shared_tensors_are_written_each(tmp_path):
    network = Tied(5)
    save_weights(network, tmp_path / "weights.safetensors")
    found = load_file(tmp_path / "weights.safetensors")
    assert set(found) == {"inlet.weight", "outlet.weight", "again.weight"}
    assert torch.equal(found["again.weight"], network.inlet.weight)


def test_weights_are_as_readable_to_others_as_any_new_file(tmp_path):
    mlp().save_pretrained(tmp_path / "map")
    (tmp_path / "new").touch()
    assert (tmp_path / "map" / "model.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode
