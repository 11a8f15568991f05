"""The weights of SiT, DMF and MFM: their code's own outputs, mistakes that show, refusals, and the way back.

tests/vectors holds small networks of the three projects with random weights, and what their code made of random inputs.
"""

import argparse
import json
import math
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from imagenet import checkpoints, sit
from imagenet.checkpoints import from_state, kind_of, load, main, mfm_from, read_state, to_state
from imagenet.sit import SiT, build
from mfm_ref import ClassifierFree, FlowMap

VECTORS = Path(__file__).parent / "vectors"
NAMES = sorted(path.stem for path in VECTORS.glob("*.npz") if path.stem.partition("_")[0] in sit.KINDS)
TOLERANCE = 1e-4  # a right network is off by 1.4e-5 at most, a wrong one by 1e-3 or more


# ---- the vectors ---------------------------------------------------------------------------------------


class Vector:
    """One file: a project's weights and, by batch, inputs and outputs; `aux` is by name."""

    def __init__(self, name: str):
        with np.load(VECTORS / f"{name}.npz") as arrays:
            entries = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "config"}
            config = json.loads(str(arrays["config"]))
        self.kind = name.split("_")[0]
        self.state = {key.removeprefix("state/"): a for key, a in entries.items() if key.startswith("state/")}
        self.aux = {key.removeprefix("aux/"): a for key, a in entries.items() if key.startswith("aux/")}
        self.batches = [
            tuple(
                {k.split("/")[2]: a for k, a in entries.items() if k.startswith(f"{way}/{b}/")} for way in ("in", "out")
            )
            for b in range(5)
        ]
        sizes = config["kwargs"]
        self.options = {"num_heads": sizes["num_heads"]}
        if self.kind != "sit":
            self.options["encoder_depth"] = sizes["dmf_depth" if self.kind == "dmf" else "encoder_depth"]
        for option in ("is_zero_data", "preserve_t_cond_0"):
            if option in sizes:
                self.options[option] = sizes[option]

    def network(self) -> SiT:
        return from_state(self.state, self.kind, **self.options)


@cache
def vector(name):
    return Vector(name)


def outputs(kind, X, inputs):
    """Every output that a project's code made of these inputs, by this project's map X."""
    zeros = torch.zeros_like(inputs["x"])
    if kind == "sit":
        made = {"velocity": X.velocity(inputs["t"], inputs["t"], inputs["x"], 0.0, zeros, inputs["y"])}
        if "cfg_x" in inputs:
            half = len(inputs["cfg_x"]) // 2
            z, t, y = (inputs[name][:half] for name in ("cfg_x", "cfg_t", "cfg_y"))
            guided = ClassifierFree(X, float(inputs["cfg_scale"]), channels=3)
            made["cfg_velocity"] = guided.velocity(t, t, z, 0.0, torch.zeros_like(z), y)
        return made
    if kind == "dmf":
        return {"u": -X.velocity(1 - inputs["t"], 1 - inputs["r"], inputs["x"], 0.0, zeros, inputs["y"])}
    call = [inputs[name] for name in ("s", "u", "x", "t_cond", "x_cond")]
    if "cfg_scales" in inputs:
        return {"v_cfg": ClassifierFree(X, inputs["cfg_scales"]).velocity(*call, inputs["y"])}
    call += [inputs.get("y"), inputs.get("cfg_scale")]
    return {"v": X.velocity(*call), "X": X(*call)}


def errors(name, network):
    """Largest error of every output of every batch of a vector."""
    X, found = FlowMap(network), {}
    for number, (inputs, wanted) in enumerate(vector(name).batches):
        if not inputs:
            continue
        with torch.no_grad():
            made = outputs(vector(name).kind, X, inputs)
        assert made.keys() == wanted.keys() - {"logvar"}  # of training
        for key, value in made.items():
            right = wanted[key][: len(value)]  # of the guided SiT, the half with labels
            found[f"{number}/{key}"] = float((value - right).abs().max())
    return found


def test_all_vectors_are_there():
    assert NAMES == ["dmf_qknorm_tiny", "dmf_tiny", "mfm_fromsit_tiny", "mfm_preserve_tiny", "mfm_tiny", "sit_tiny"]
    counts = [len(errors(name, vector(name).network())) for name in NAMES]
    assert counts == [3, 3, 9, 9, 9, 4]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_the_projects_code(name):
    found = errors(name, vector(name).network())
    assert max(found.values()) < TOLERANCE, found


def test_the_half_without_labels_of_the_guided_sit():
    """Its fourth channel is v(∅), which the guided map does not give; the first three are those of the other half."""
    inputs, wanted = vector("sit_tiny").batches[2]
    z, t = inputs["cfg_x"][:2], inputs["cfg_t"][:2]
    v_null = FlowMap(vector("sit_tiny").network()).velocity(t, t, z, 0.0, torch.zeros_like(z))
    assert torch.allclose(wanted["cfg_velocity"][2:, 3], v_null[:, 3], atol=TOLERANCE)
    assert torch.equal(wanted["cfg_velocity"][2:, :3], wanted["cfg_velocity"][:2, :3])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_inside_is_theirs(name):
    """Positions, time features, norms, and the tokens and conditions of batch 0 before every block and the outlet."""
    network, aux, seen = vector(name).network(), vector(name).aux, {}
    side = int(aux["pos_embed_sincos"].shape[1] ** 0.5)
    assert torch.equal(sit.sine_cosine(side, side, aux["pos_embed_sincos"].shape[2]), aux["pos_embed_sincos"][0])
    assert torch.allclose(sit.waves(aux["freq_t"], 256), aux["freq_embedding"], atol=1e-6)
    assert torch.allclose(network.norm(aux["norm_in"]), aux["norm_out"], atol=1e-6)
    for k, block in enumerate(network.blocks):
        block.register_forward_pre_hook(
            lambda _, inputs, k=k: seen.update({f"tokens_in_block{k}": inputs[0], f"cond_in_block{k}": inputs[1]})
        )
    network.norm.register_forward_pre_hook(lambda _, inputs: seen.update({"tokens_in_final": inputs[0]}))
    outputs(vector(name).kind, FlowMap(network), vector(name).batches[0][0])
    for key, value in seen.items():
        assert torch.allclose(value, aux[f"debug0_{key}"], atol=TOLERANCE), key
    assert {key for key in aux if key.startswith("debug0")} == {f"debug0_{key}" for key in seen}
    assert len(seen) == 9


def test_a_norm_with_another_eps_shows():
    aux = vector("sit_tiny").aux
    wrong = F.layer_norm(aux["norm_in"], aux["norm_in"].shape[-1:], eps=1e-5)
    assert (wrong - aux["norm_out"]).abs().max() > 1e-3


def test_the_row_of_a_guidance_scale_is_the_nearest():
    """As their lookup: 0 and 1.7 to the row of 1, 1.8 and 9 to that of 2.5, and 1.75, between them, to the first."""
    network = vector("mfm_tiny").network()
    scales = torch.tensor([0.0, 1.0, 1.7, 1.75, 1.8, 2.5, 9.0])
    assert network.nearest_scale(scales, scales).tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert network.nearest_scale(None, scales).tolist() == [0] * 7


# ---- deliberate mistakes -------------------------------------------------------------------------------


def rows(linear, order):
    """Reorder what a linear layer puts out."""
    linear.weight.data, linear.bias.data = linear.weight.data[order], linear.bias.data[order]


def chunks(linear, order, n):
    rows(linear, torch.arange(len(linear.bias)).unflatten(0, (n, -1))[order].flatten())


def every_block(change):
    return lambda network: [change(block) for block in network.blocks]


def modulation_order(*order):
    return every_block(lambda block: chunks(block.modulation, list(order), 6))


def attention_has(name, value):
    return every_block(lambda block: setattr(block.attention, name, value))


def attention_order(order):
    return every_block(lambda block: chunks(block.attention.qkv, order, 3))


def heads_outermost(block):
    qkv = block.attention.qkv
    rows(qkv, torch.arange(len(qkv.bias)).unflatten(0, (block.attention.heads, 3, -1)).transpose(0, 1).flatten())


def outlet_order(*dims):
    """Take an output for one of channels, rows and columns in another order than they are."""

    def change(network):
        p = network.patch
        rows(network.outlet, torch.arange(len(network.outlet.bias)).reshape(p, p, -1).permute(dims).flatten())

    return change


def last_channels(network):
    rows(network.outlet, torch.arange(32).reshape(4, 2, 4).flip(1).flatten())


def cosines_after_sines(network):
    for module in network.modules():
        if isinstance(module, sit.TimeEmbedding):
            module.mlp[0].weight.data = module.mlp[0].weight.data.roll(128, 1)


def un_negated(network):
    network.outlet.weight.data.neg_()
    network.outlet.bias.data.neg_()


def transposed_patches(network):
    network.patch_z.weight.data = network.patch_z.weight.data.mT.contiguous()


def swapped(first, second):
    def change(network):
        one, other = getattr(network, first), getattr(network, second)
        setattr(network, first, other)
        setattr(network, second, one)

    return change


def setting(name, value):
    return lambda network: setattr(network, name, value(network) if callable(value) else value)


def conditioned(change):
    """Change the conditions of encoder and decoder."""

    def apply(network):
        conditions = network.conditions
        network.conditions = lambda s, u, t, y, guidance: change(network, conditions, s, u, t, y, guidance)

    return apply


def guidance_in_the_decoder(network, conditions, s, u, t, y, guidance):
    encoder, decoder, e = conditions(s, u, t, y, guidance)
    return encoder, decoder + network.scales(network.nearest_scale(guidance, s)), e


def flipped_context_time(network, conditions, s, u, t, y, guidance):
    return conditions(s, u, 1 - t, y, guidance)


def first_label_for_none(network, conditions, s, u, t, y, guidance):
    return conditions(s, u, t, torch.zeros_like(s, dtype=torch.long) if y is None else y, guidance)


def no_guidance(network, conditions, s, u, t, y, guidance):
    return conditions(s, u, t, y, None)


def swapped_times(network, conditions, s, u, t, y, guidance):
    return conditions(u, s, t, y, guidance)


def outlet_in_the_encoder(network):
    """The outlet sees what the last block of the encoder saw."""
    network.outlet_modulation.register_forward_pre_hook(lambda *_: (sit.silu(network.seen),))
    network.blocks[0].register_forward_pre_hook(lambda _, inputs: setattr(network, "seen", inputs[1]))


MISTAKES = {
    "shift and scale of the blocks swapped": ("sit_tiny", modulation_order(1, 0, 2, 4, 3, 5)),
    "gate first in the blocks": ("sit_tiny", modulation_order(2, 0, 1, 5, 3, 4)),
    "MLP before attention in the chunks": ("sit_tiny", modulation_order(3, 4, 5, 0, 1, 2)),
    "shift and scale of the outlet swapped": ("sit_tiny", lambda n: chunks(n.outlet_modulation, [1, 0], 2)),
    "shift and scale of the context swapped": ("mfm_tiny", lambda n: chunks(n.context_modulation, [1, 0], 2)),
    "output of DMF not negated": ("dmf_tiny", un_negated),
    "output of MFM not negated": ("mfm_tiny", un_negated),
    "output of an MFM from SiT negated": ("mfm_fromsit_tiny", un_negated),
    "time of SiT flipped": ("sit_tiny", setting("noise_times", True)),
    "time of DMF not flipped": ("dmf_tiny", setting("noise_times", False)),
    "time of MFM not flipped": ("mfm_tiny", setting("noise_times", False)),
    "times swapped": ("dmf_tiny", conditioned(swapped_times)),
    "context time flipped": ("mfm_tiny", conditioned(flipped_context_time)),
    "sines before cosines": ("sit_tiny", cosines_after_sines),
    "one block fewer in the encoder": ("dmf_tiny", setting("encoder_depth", lambda n: n.encoder_depth - 1)),
    "one block more in the encoder": ("dmf_tiny", setting("encoder_depth", lambda n: n.encoder_depth + 1)),
    "one block fewer in the encoder of MFM": ("mfm_tiny", setting("encoder_depth", lambda n: n.encoder_depth - 1)),
    "outlet of DMF told the start": ("dmf_tiny", outlet_in_the_encoder),
    "embedders of the encoder swapped": ("mfm_tiny", swapped("encoder_s", "encoder_u")),
    "embedders of the decoder swapped": ("mfm_tiny", swapped("decoder_s", "decoder_u")),
    "embedders of the halves swapped": ("mfm_tiny", swapped("encoder_s", "decoder_s")),
    "embedders of s and t swapped": ("mfm_tiny", swapped("encoder_s", "context_t")),
    "patch embeddings swapped": ("mfm_tiny", swapped("patch_z", "patch_x")),
    "guidance in the decoder, too": ("mfm_tiny", conditioned(guidance_in_the_decoder)),
    "guidance left out": ("mfm_tiny", conditioned(no_guidance)),
    "guidance rows swapped": ("mfm_tiny", lambda n: n.scales.weight.data.copy_(n.scales.weight.data.flip(0))),
    "no label taken for the first": ("mfm_tiny", conditioned(first_label_for_none)),
    "context not counted by t": ("mfm_preserve_tiny", setting("blank_start", False)),
    "context counted by t": ("mfm_tiny", setting("blank_start", True)),
    "two heads": ("sit_tiny", attention_has("heads", 2)),
    "six heads": ("mfm_tiny", attention_has("heads", 6)),
    "exact GELU": ("sit_tiny", every_block(lambda b: setattr(b.mlp[1], "approximate", "none"))),
    "k, q, v": ("sit_tiny", attention_order([1, 0, 2])),
    "v, k, q": ("sit_tiny", attention_order([2, 1, 0])),
    "q, k and v within each head": ("sit_tiny", every_block(heads_outermost)),
    "no norms of q and k": ("dmf_qknorm_tiny", attention_has("q_norm", torch.nn.Identity())),
    "the last four of eight channels": ("sit_tiny", last_channels),
    "the last four of eight channels of an MFM": ("mfm_fromsit_tiny", last_channels),
    "columns before rows in a patch": ("sit_tiny", outlet_order(1, 0, 2)),
    "channels before rows in a patch": ("dmf_tiny", outlet_order(2, 0, 1)),
    "patches read by columns": ("sit_tiny", transposed_patches),
    "positions computed, not loaded": (
        "sit_tiny",
        lambda n: n.position.data.copy_(sit.sine_cosine(*n.grid, n.config["width"])),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_network_shows(mistake):
    name, change = MISTAKES[mistake]
    network = vector(name).network()
    change(network)
    assert max(errors(name, network).values()) > 8 * TOLERANCE


def other_waves(divisor=128.0, factor=1.0):
    def waves(time, features):
        angles = factor * time.unsqueeze(-1) * 10000.0 ** (-torch.arange(features // 2) / divisor)
        return torch.cat([angles.cos(), angles.sin()], -1)

    return waves


FUSED = F.scaled_dot_product_attention
FUNCTIONS = {
    "frequencies divided by 127": ("waves", other_waves(divisor=127.0)),
    "times in thousandths": ("waves", other_waves(factor=1000.0)),
    "no SiLU before modulations": ("silu", lambda c: c),
    "scale for 1 + scale": ("modulate", lambda h, shift, scale: h * scale + shift),
    "attention not scaled": ("scaled_dot_product_attention", lambda q, k, v: FUSED(q, k, v, scale=1.0)),
    "attention that is causal": ("scaled_dot_product_attention", lambda q, k, v: FUSED(q, k, v, is_causal=True)),
}


@pytest.mark.parametrize("mistake", FUNCTIONS)
def test_a_mistake_in_a_function_shows(mistake, monkeypatch):
    network = vector("mfm_tiny").network()
    monkeypatch.setattr(sit, *FUNCTIONS[mistake])
    assert max(errors("mfm_tiny", network).values()) > 8 * TOLERANCE


def test_those_functions_are_the_right_ones_but_for_that(monkeypatch):
    monkeypatch.setattr(sit, "waves", other_waves())
    assert max(errors("mfm_tiny", vector("mfm_tiny").network()).values()) < TOLERANCE


def test_guidance_of_the_fourth_channel_shows():
    inputs, wanted = vector("sit_tiny").batches[2]
    z, t, y = (inputs[name][:2] for name in ("cfg_x", "cfg_t", "cfg_y"))
    guided = ClassifierFree(FlowMap(vector("sit_tiny").network()), float(inputs["cfg_scale"]))
    error = guided.velocity(t, t, z, 0.0, torch.zeros_like(z), y) - wanted["cfg_velocity"][:2]
    assert error[:, :3].abs().max() < TOLERANCE
    assert error[:, 3].abs().max() > 8 * TOLERANCE


# ---- there and back ------------------------------------------------------------------------------------


def published(name):
    """A vector's weights as in the file that its project publishes: an MFM's under two more names."""
    under = "model.model." if vector(name).kind == "mfm" else ""
    return {under + key: tensor for key, tensor in vector(name).state.items() if not key.startswith("logvar_linear.")}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) and found[key].dtype == wanted[key].dtype for key in wanted)


def test_the_norms_of_queries_and_keys_keep_their_names():
    """No output tells them apart: attention sees their products."""
    attention, state = vector("dmf_qknorm_tiny").network().blocks[2].attention, vector("dmf_qknorm_tiny").state
    for norm in ("q_norm", "k_norm"):
        assert torch.equal(getattr(attention, norm).weight, state[f"blocks.2.attn.{norm}.scale"])


@pytest.mark.parametrize("name", NAMES)
def test_the_way_back_is_exact(name, tmp_path):
    network = vector(name).network()
    same(to_state(network, vector(name).kind), published(name))
    FlowMap(network).save_pretrained(tmp_path / "map")
    loaded = load(tmp_path / "map")
    assert loaded.config == network.config
    same(to_state(loaded, vector(name).kind), published(name))
    same(loaded.state_dict(), network.state_dict())
    assert {k for k, p in loaded.named_parameters() if not p.requires_grad} == {"position"}
    assert {k for k, p in network.named_parameters() if not p.requires_grad} == {"position"}


def test_the_learnt_spread_of_dmfs_loss_is_left_out():
    """DMF's vector has logvar_linear and outputs of it; both serve its training alone."""
    assert {key for key in vector("dmf_tiny").state if "logvar" in key} == {
        "logvar_linear.weight",
        "logvar_linear.bias",
    }
    assert not any("logvar" in key for key in to_state(vector("dmf_tiny").network(), "dmf"))
    without = {key: tensor for key, tensor in vector("dmf_tiny").state.items() if "logvar" not in key}
    same(
        from_state(without, "dmf", **vector("dmf_tiny").options).state_dict(), vector("dmf_tiny").network().state_dict()
    )


def test_weights_are_copied():
    state = {key: tensor.clone() for key, tensor in vector("sit_tiny").state.items()}
    network = from_state(state, "sit", num_heads=4)
    for tensor in state.values():
        tensor.zero_()
    assert max(errors("sit_tiny", network).values()) < TOLERANCE


def test_a_sit_without_the_channels_that_are_not_used():
    """As its train.py makes it with learn_sigma = False; then the keys do not tell it from a DMF."""
    state = dict(vector("sit_tiny").state)
    for part in ("weight", "bias"):
        rows = state[f"final_layer.linear.{part}"].unflatten(0, (4, 8))
        state[f"final_layer.linear.{part}"] = rows[:, :4].flatten(0, 1)
    network = from_state(state, "sit", num_heads=4)
    assert not network.config["learn_sigma"]
    assert max(errors("sit_tiny", network).values()) < TOLERANCE
    same(to_state(network, "sit"), state)
    with pytest.raises(ValueError, match=r"kind must be given"):
        from_state(state, num_heads=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised(dtype):
    halves = {key: tensor.to(dtype) for key, tensor in vector("dmf_tiny").state.items()}
    network = from_state(halves, "dmf", **vector("dmf_tiny").options)
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}
    back = to_state(network, "dmf")
    assert all(torch.equal(back[key], halves[key].float()) for key in back)


def test_double_precision_stays():
    doubles = {key: tensor.double() for key, tensor in vector("mfm_tiny").state.items()}
    network = from_state(doubles, "mfm", **vector("mfm_tiny").options)
    same(to_state(network, "mfm"), {f"model.model.{key}": tensor for key, tensor in doubles.items()})


def keys_of(kind):
    """The keys of the XL/2 networks and their shapes, as their code makes them."""
    d, shapes = 1152, {"pos_embed": (1, 256, 1152), "y_embedder.embedding_table.weight": (1001, 1152)}

    def layer(name, *shape):
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    embedders = ["t_embedder"]
    layer("x_embedder.proj", d, 4, 2, 2)
    if kind == "mfm":
        embedders += ["s_embedder", "t_cond_embedder", "s_embedder_second", "t_embedder_second"]
        shapes["guidance_embedder.embedding_table.weight"] = (2, d)
        layer("x_cond_embedder.proj", d, 4, 2, 2)
        layer("x_cond_adaLN.1", 2 * d, d)
    for embedder in embedders:
        layer(f"{embedder}.mlp.0", d, 256)
        layer(f"{embedder}.mlp.2", d, d)
    for block in range(28):
        layer(f"blocks.{block}.attn.qkv", 3 * d, d)
        layer(f"blocks.{block}.attn.proj", d, d)
        layer(f"blocks.{block}.mlp.fc1", 4 * d, d)
        layer(f"blocks.{block}.mlp.fc2", d, 4 * d)
        layer(f"blocks.{block}.adaLN_modulation.1", 6 * d, d)
    layer("final_layer.linear", 32 if kind == "sit" else 16, d)
    layer("final_layer.adaLN_modulation.1", 2 * d, d)
    return {("model.model.dit." if kind == "mfm" else "") + key: shape for key, shape in shapes.items()}


XL = {
    "sit": ({"learn_sigma": True}, 292, 675_129_632, 674_834_720),
    "dmf": ({"noise_times": True}, 292, 675_111_184, 674_816_272),
    "mfm": ({"noise_times": True, "guidance": [1.0, 2.5]}, 313, 684_286_864, 683_991_952),
}


@pytest.mark.parametrize("kind", XL)
def test_the_published_networks_have_their_keys_and_parameters(kind):
    options, tensors, parameters, trainable = XL[kind]
    with torch.device("meta"):
        network = build("XL/2", kind, **options)
    state = to_state(network, kind)
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == keys_of(kind)
    assert len(state) == tensors
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == trainable


# ---- files ---------------------------------------------------------------------------------------------


def write(path, content):
    torch.save(content, path)
    return path


def prefixed(prefix):
    return {prefix + key: tensor for key, tensor in published("sit_tiny").items()}


WRAPPED = {
    "flat": lambda state: state,
    "module.": lambda state: prefixed("module."),
    "_orig_mod.module.": lambda state: prefixed("_orig_mod.module."),
    "model.model.dit.": lambda state: prefixed("model.model.dit."),
    "module._orig_mod.model.": lambda state: prefixed("module._orig_mod.model."),
    "model": lambda state: {"model": prefixed("module."), "opt": {"step": 3}, "steps": 7},
    "state_dict": lambda state: {"state_dict": prefixed("model."), "current_model_state": zeros(state)},
    "ema in model": lambda state: {"model": {"ema": state, "model": zeros(state)}},
    "ema first": lambda state: {"model": zeros(state), "state_dict": zeros(state), "ema": state},
    "state_dict second": lambda state: {"model": zeros(state), "state_dict": state, "ema": None},
    "SiT's train.py": lambda state: {
        "model": zeros(state), "ema": state, "opt": {"state": {0: {"exp_avg": torch.ones(3)}}},
        "args": argparse.Namespace(model="SiT-XL/2", lr=1e-4, sizes=[1, 2]),
    },
}  # fmt: skip


def zeros(state):
    return {key: torch.zeros_like(tensor) for key, tensor in state.items()}


@pytest.mark.parametrize("form", WRAPPED)
def test_weights_are_found_in_whatever_holds_them(form, tmp_path):
    path = write(tmp_path / "weights.pt", WRAPPED[form](published("sit_tiny")))
    same(read_state(path), published("sit_tiny"))
    assert max(errors("sit_tiny", load(str(path), "sit", num_heads=4)).values()) < TOLERANCE


def test_safetensors_and_the_older_format_of_torch(tmp_path):
    save_file(published("mfm_tiny"), tmp_path / "weights.safetensors")
    torch.save(published("mfm_tiny"), tmp_path / "weights.ckpt", _use_new_zipfile_serialization=False)
    for name in ("weights.safetensors", "weights.ckpt"):
        network = load(tmp_path / name, num_heads=4, encoder_depth=3)  # the keys tell the kind
        assert max(errors("mfm_tiny", network).values()) < TOLERANCE


def test_what_trains_a_dmf_or_an_mfm_is_left_out(tmp_path):
    extra = {"projectors.0.2.weight": torch.ones(2), "module.logvar_linear.bias": torch.ones(1)}
    path = write(tmp_path / "dmf.pt", published("dmf_tiny") | extra)
    same(to_state(load(path, **vector("dmf_tiny").options), "dmf"), published("dmf_tiny"))
    teacher = {f"teacher_model.model.dit.{key}": tensor for key, tensor in published("mfm_tiny").items()}
    extra = teacher | {"model.weighting_model.model.bias": torch.ones(1)}
    path = write(tmp_path / "mfm.pt", {"state_dict": published("mfm_tiny") | extra})
    same(to_state(load(path, **vector("mfm_tiny").options), "mfm"), published("mfm_tiny"))


def test_a_network_of_noise_at_one_and_one_time():
    """What DMF is made of: with encoder_depth None its one time is s, and no end matters."""
    state = published("dmf_tiny") | {"projectors.0.0.weight": torch.ones(2)}
    network = from_state(state, "dmf", num_heads=4, encoder_depth=None)
    assert kind_of(network) == "dmf" and not network.two_times
    same(to_state(network, "dmf"), published("dmf_tiny"))
    z, times = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 0.4, 1.0])
    call = (z, 0.0, torch.zeros_like(z), torch.tensor([1, 2, 10]))
    both = FlowMap(vector("dmf_tiny").network()).velocity(times, times, *call)
    assert torch.allclose(FlowMap(network).velocity(times, times, *call), both, atol=1e-5)
    assert torch.equal(network.velocity(times, times, *call), network.velocity(times, 1 + 0 * times, *call))


class Runs:
    """What runs code when it is read."""

    def __reduce__(self):
        return (print, ("this must not be printed",))


@pytest.mark.parametrize(("culprit", "name"), [(Runs(), "print"), (Path("x"), "pathlib")])
def test_a_file_that_would_run_code_is_refused(culprit, name, tmp_path, capsys):
    path = write(tmp_path / "train.pt", {"ema": published("sit_tiny"), "args": argparse.Namespace(out=culprit)})
    with pytest.raises(
        ValueError, match=rf"(?s)train.pt must hold tensors .* would run \S*{name}.*\['ema'\], 'weights.pt'"
    ):
        load(path, "sit", num_heads=4)
    assert capsys.readouterr().out == ""


def test_files_that_cannot_be_read_are_refused(tmp_path):
    path = write(tmp_path / "weights.pt", published("sit_tiny"))
    (tmp_path / "half.pt").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "text.pt").write_text("<!DOCTYPE html>")
    (tmp_path / "empty.pt").touch()
    for name in ("half.pt", "text.pt", "empty.pt"):
        with pytest.raises(ValueError, match=rf"{name} must be a file that torch.load reads"):
            load(tmp_path / name, "sit")
    (tmp_path / "half.safetensors").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"half.safetensors must be a readable safetensors file"):
        load(tmp_path / "half.safetensors", "sit")
    with pytest.raises(ValueError, match=r"must be a file$"):
        read_state(tmp_path / "none.pt")
    for content, got in (
        (torch.ones(3), "Tensor"),
        ({}, "dict of no tensors"),
        ({"model": {}}, "also model"),
        (published("sit_tiny") | {"epoch": 3}, "got also epoch"),
        (published("sit_tiny") | {3: torch.ones(1)}, "got also 3"),
        ({"ema": {"shadow": [1, 2]}}, "got also shadow"),
    ):
        with pytest.raises(ValueError, match=rf"(?s)other.pt must hold .*{got}"):
            read_state(write(tmp_path / "other.pt", content))


def test_a_name_that_is_nowhere_is_refused_before_any_network(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for name in (
        "weights.pt",
        "/no/such/weights.pt",
        "./no/such/weights.pt",
        "../a/b.pt",
        "owner/repository",
        "a/b/c.txt",
    ):
        with pytest.raises(
            ValueError, match=r"must be a file or folder that is there, one of .* github.com/willisma/SiT"
        ):
            load(name, "sit")


@pytest.mark.parametrize(
    ("name", "repository", "file"),
    [
        ("kyungmnlee/DMF", "kyungmnlee/DMF", "dmf_xl_2_256.pt"),
        ("adh1s/mfm", "adh1s/mfm", "mfm-xl2.pt"),
        ("someone/maps/runs/a.safetensors", "someone/maps", "runs/a.safetensors"),
    ],
)
def test_a_file_of_the_hub_that_cannot_be_had(name, repository, file, monkeypatch):
    def offline(*call):
        assert call == (repository, file)
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=offline))
    address = f"huggingface.co/{repository}/resolve/main/{file}"
    with pytest.raises(ValueError, match=rf"{file} could not be had .*\(ConnectionError\).*{address}"):
        load(name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # not installed
    with pytest.raises(ValueError, match=rf"{file} could not be had .*\(ModuleNotFoundError\).*{address}"):
        load(name)


def test_a_file_of_the_hub(tmp_path, monkeypatch):
    """The kind of the known ones is known, although DMF's keys do not tell it."""
    path = write(tmp_path / "dmf_xl_2_256.pt", published("dmf_tiny"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=lambda *_: str(path)))
    network = load("kyungmnlee/DMF", **vector("dmf_tiny").options)
    assert max(errors("dmf_tiny", network).values()) < TOLERANCE
    with pytest.raises(ValueError, match=r"dmf_xl_2_256.pt: kind must be given, 'sit' or 'dmf'"):
        load("someone/else/dmf_xl_2_256.pt", **vector("dmf_tiny").options)
    with pytest.raises(ValueError, match=r"kyungmnlee/DMF holds weights of the kind 'dmf', got kind='sit'"):
        load("kyungmnlee/DMF", "sit")


def test_folders_say_what_they_are(tmp_path):
    network = vector("mfm_preserve_tiny").network()
    FlowMap(network).save_pretrained(tmp_path / "step" / "ema")
    loaded = load(str(tmp_path / "step" / "ema"), "mfm")
    assert max(errors("mfm_preserve_tiny", loaded).values()) < TOLERANCE
    with pytest.raises(ValueError, match=r"ema holds a network of the kind 'mfm', got kind='dmf'"):
        load(tmp_path / "step" / "ema", "dmf")
    with pytest.raises(ValueError, match=r"step is a checkpoint: its folder ema holds a model"):
        load(tmp_path / "step")
    with pytest.raises(ValueError, match=r"config.json must be a readable JSON file"):
        load(tmp_path)


# ---- refusals ------------------------------------------------------------------------------------------


def options_of(name, **options):
    return {"kind": vector(name).kind} | vector(name).options | options


@pytest.mark.parametrize(
    ("name", "kind", "match"),
    [
        ("dmf_qknorm_tiny", None, r"kind must be given, 'sit' or 'dmf': their files have the same keys"),
        ("sit_tiny", "dit", r"kind must be one of \['sit', 'dmf', 'mfm'\], got 'dit'"),
        ("mfm_tiny", "sit", r"these are keys of an MFM \(t_cond_embedder\): kind='mfm', got kind='sit'"),
        ("mfm_fromsit_tiny", "dmf", r"these are keys of an MFM \(t_cond_embedder\): kind='mfm', got kind='dmf'"),
        ("sit_tiny", "dmf", r"32 rows in final_layer.linear: learn_sigma, willisma's SiT: kind='sit', got kind='dmf'"),
        ("sit_tiny", "mfm", r"32 rows in final_layer.linear: learn_sigma, willisma's SiT: kind='sit', got kind='mfm'"),
        ("dmf_tiny", "sit", r"noise at 1, DMF or the base of it \(logvar_linear.weight\): kind='dmf', got kind='sit'"),
        (
            "dmf_qknorm_tiny",
            "mfm",
            r"an MFM has keys t_cond_embedder, and here there are none: kind='sit' or kind='dmf'",
        ),
    ],
)
def test_a_kind_that_the_keys_contradict_is_refused(name, kind, match):
    with pytest.raises(ValueError, match=match):
        from_state(vector(name).state, **options_of(name, kind=kind))


ONE = torch.ones(1)
POSITIONS = torch.ones(1, 16, 48)
KEYS = [
    (
        "mfm_tiny",
        {"blocks.0.joint_attn.qkv.weight": ONE},
        r"use_joint_attention \(joint_attn in .*\) are not supported",
    ),
    ("sit_tiny", {"blocks.0.attn.rope": ONE}, r"kind='sit': unknown blocks.0.attn.rope$"),
    ("mfm_tiny", {"n_averaged": ONE}, r"kind='mfm': unknown n_averaged$"),
    ("mfm_tiny", {"logvar_linear.bias": ONE}, r"kind='mfm': unknown logvar_linear.bias$"),
    ("dmf_tiny", {"teacher_model.dit.pos_embed": ONE}, r"kind='dmf': unknown teacher_model.dit.pos_embed$"),
    ("sit_tiny", {"x_cond_adaLN.1.bias": ONE}, r"unknown x_cond_adaLN.1.bias$"),
    (
        "sit_tiny",
        {"projectors.0.0.bias": ONE},
        r"noise at 1, DMF or the base of it \(projectors.0.0.bias\): kind='dmf'",
    ),
    ("dmf_tiny", {"blocks.2.mlp.fc1.bias": None}, r"kind='dmf': missing blocks.2.mlp.fc1.bias$"),
    ("mfm_tiny", {"dit.s_embedder_second.mlp.2.bias": None}, r"missing s_embedder_second.mlp.2.bias$"),
    ("sit_tiny", {"t_embedder.mlp.0.bias": None, "a": ONE}, r"missing t_embedder.mlp.0.bias; unknown a$"),
    ("sit_tiny", {"pos_embed": None}, r"these keys are missing: pos_embed; there are x_embedder.proj.weight"),
    ("sit_tiny", {"x_embedder.proj.weight": torch.ones(48, 16)}, r"as many dimensions .* x_embedder.* \(48, 16\)$"),
    ("sit_tiny", {"blocks.123456789.mlp.fc1.bias": ONE}, r"without a gap: the keys blocks.4.\* are missing"),
    ("sit_tiny", {"pos_embed": torch.ones(1, 15, 48)}, r"images must be square, got 15 patches in pos_embed"),
    ("sit_tiny", {"blocks.3.mlp.fc1.bias": torch.ones(96)}, r"shape blocks.3.mlp.fc1.bias \(96,\) and not \(192,\)"),
    ("sit_tiny", {"final_layer.linear.bias": torch.ones(16)}, r"final_layer.linear.bias \(16,\) and not \(32,\)"),
    ("dmf_tiny", {"final_layer.linear.weight": torch.ones(24, 48)}, r"final_layer.linear.weight \(24, 48\) and not"),
    (
        "sit_tiny",
        {"module.pos_embed": POSITIONS},
        r"every weight must be there once, got pos_embed and module.pos_embed$",
    ),
    ("mfm_tiny", {"dit.pos_embed": math.nan * POSITIONS}, r"weights must be finite, got NaN or infinity in pos_embed$"),
    ("sit_tiny", {"pos_embed": math.inf * POSITIONS.half()}, r"weights must be finite, .* in pos_embed$"),
    ("sit_tiny", {"pos_embed": POSITIONS.long()}, r"must be floating-point, .*, got pos_embed of torch.int64$"),
    (
        "sit_tiny",
        {"pos_embed": POSITIONS.to(torch.float8_e4m3fn)},
        r"of 16 bits or more, got pos_embed of torch.float8",
    ),
    ("sit_tiny", {"pos_embed": POSITIONS.double()}, r"weights must be all or none float64, got some"),
]


@pytest.mark.parametrize(("name", "tensors", "match"), KEYS)
def test_weights_that_do_not_fit_are_refused(name, tensors, match):
    """Tensors that come in the place of a vector's, or beside them; None leaves one out."""
    state = {key: tensor for key, tensor in (vector(name).state | tensors).items() if tensor is not None}
    with pytest.raises(ValueError, match=match):
        from_state(state, **options_of(name))


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("sit_tiny", {"num_heads": 16}, r"num_heads must be 4, as the weights are of the size tiny, .* got 16"),
        ("dmf_qknorm_tiny", {"num_heads": 6}, r"num_heads must be 4: q_norm is of heads of 12, got 6"),
        ("dmf_tiny", {"encoder_depth": 4}, r"encoder_depth must be below depth = 4, got 4"),
        ("mfm_tiny", {"encoder_depth": 20}, r"encoder_depth must be below depth = 4, got 20"),
        ("dmf_tiny", {"encoder_depth": 0}, r"encoder_depth must be an integer >= 1, got 0"),
        ("mfm_tiny", {"encoder_depth": None}, r"context branch needs an encoder_depth"),
        ("mfm_tiny", {"guidance": (1.0,)}, r"\(2, 48\) and not \(1, 48\); guidance must name one scale for each row"),
        ("mfm_tiny", {"guidance": (1.0, 2.5, 4.0)}, r"guidance must name one scale for each row of guidance_embedder"),
        ("mfm_tiny", {"guidance": ()}, r"unknown guidance_embedder.embedding_table.weight"),
        ("mfm_tiny", {"guidance": (2.5, 4.0)}, r"scales that rise from 1, got \[2.5, 4.0\]"),
    ],
)
def test_options_that_cannot_be_right_are_refused(name, options, match):
    with pytest.raises(ValueError, match=match):
        from_state(vector(name).state, **options_of(name, **options))


def test_heads_that_do_not_divide_a_width_of_no_published_size():
    state = {key: tensor for key, tensor in vector("sit_tiny").state.items() if not key.startswith("blocks.3.")}
    with pytest.raises(ValueError, match=r"width must be a multiple of heads = 5"):
        from_state(state, "sit", num_heads=5)
    assert from_state(state, "sit", num_heads=6).config["heads"] == 6


def test_a_missing_block_is_named():
    state = {key: tensor for key, tensor in vector("sit_tiny").state.items() if not key.startswith("blocks.1.")}
    with pytest.raises(ValueError, match=r"numbered from 0 without a gap: the keys blocks.1.\* are missing"):
        from_state(state, "sit", num_heads=4)


def test_only_a_few_of_many_keys_are_named():
    state = vector("dmf_tiny").state | {f"extra.{k}": ONE for k in range(50)}
    with pytest.raises(ValueError, match=r"unknown extra.0, extra.1, extra.2, extra.3 and 46 more$"):
        from_state(state, "dmf", **vector("dmf_tiny").options)


@pytest.mark.parametrize("key", [key for name in ("sit_tiny", "mfm_tiny") for key in vector(name).state][::7])
def test_every_key_is_needed(key):
    name = "mfm_tiny" if key.startswith("dit.") else "sit_tiny"
    state = {other: tensor for other, tensor in vector(name).state.items() if other != key}
    with pytest.raises(ValueError, match=key.removeprefix("dit.")):
        from_state(state, vector(name).kind, **vector(name).options)


def test_networks_that_no_other_project_has_are_not_written():
    network = vector("sit_tiny").network()
    with pytest.raises(ValueError, match=r"the network is of the kind 'sit', got 'mfm'"):
        to_state(network, "mfm")
    for options in ({"reads_tx": True}, {"guidance": ()}):
        with pytest.raises(ValueError, match=r"must have reads_tx = False and guidance"):
            to_state(mfm_from(network, **options), "mfm")
    with pytest.raises(ValueError, match=r"noise at 1: a network of its kind has noise_times = True"):
        to_state(build("tiny", "dmf", shape=[4, 8, 8]), "dmf")


# ---- initialisation ------------------------------------------------------------------------------------

BASES = ["sit_tiny", "dmf_tiny", "dmf_qknorm_tiny"]
SILENT = {"sit_tiny": "decoder_u", "dmf_tiny": "decoder_s", "dmf_qknorm_tiny": "decoder_s"}  # beside encoder_u and t's


@cache
def pair(name, reads_tx=False):
    base = vector(name).network()
    return FlowMap(base), FlowMap(mfm_from(base, reads_tx=reads_tx))


def draws(seed, n=5):
    """Times s <= u with ends and the diagonal among them, states, a context, labels with the null one, scales."""
    rng = torch.Generator().manual_seed(seed)
    s, u = torch.rand(2, n, generator=rng).sort(0).values
    s[0], u[1], s[2] = 0.0, 1.0, u[2]
    z, x = torch.randn(2, n, 4, 8, 8, generator=rng)
    t = torch.rand(n, generator=rng).round(decimals=1)
    return s, u, z, t, x, torch.randint(11, (n,), generator=rng), 1 + 3 * torch.rand(n, generator=rng)


@pytest.mark.parametrize("name", BASES)
@given(seed=st.integers(0, 2**31), reads_tx=st.booleans(), labels=st.booleans(), guided=st.booleans())
def test_a_map_begins_as_its_base(name, seed, reads_tx, labels, guided):
    """Difference 0, whatever the context, the labels and the guidance; of SiT, v_{s,u} = b_s whatever u."""
    base, X = pair(name, reads_tx)
    s, u, z, t, x, y, w = draws(seed)
    y = y if labels else None
    with torch.no_grad():
        v = X.velocity(s, u, z, t, x, y, w if guided else None)
        assert torch.equal(v, base.velocity(s, s if name == "sit_tiny" else u, z, 0.0, torch.zeros_like(x), y))


def test_a_map_begins_as_the_published_outputs():
    """DMF's own numbers, by a Meta Flow Map in a context."""
    inputs, wanted = vector("dmf_tiny").batches[1]
    x = torch.full_like(inputs["x"], 3.0)
    v = pair("dmf_tiny")[1].velocity(1 - inputs["t"], 1 - inputs["r"], inputs["x"], 0.7, x, inputs["y"], 2.5)
    assert torch.allclose(-v, wanted["u"], atol=TOLERANCE)


def filled(name, value):
    return lambda network: network.get_parameter(name).data.copy_(value(network.get_parameter(name).data))


BEGINNINGS = {
    "the context counts once": (BASES, filled("context_modulation.bias", torch.zeros_like)),
    "-1 in the half of the shift": (BASES, filled("context_modulation.bias", lambda bias: bias.roll(48))),
    "an embedder of t that speaks": (BASES, filled("context_t.mlp.2.bias", lambda bias: bias + 0.1)),
    "an encoder that sees u": (BASES, filled("encoder_u.mlp.2.bias", lambda bias: bias + 0.1)),
    "guidance rows that count": (BASES, filled("scales.weight", lambda rows: rows + 0.1)),
    "a decoder that sees s twice": (["sit_tiny"], swapped("decoder_u", "encoder_s")),
    "a decoder that sees s": (["dmf_tiny"], swapped("decoder_u", "decoder_s")),
    "another depth": (["dmf_tiny"], setting("encoder_depth", 1)),
}


@pytest.mark.parametrize(
    ("mistake", "name"), [(mistake, name) for mistake, (names, _) in BEGINNINGS.items() for name in names]
)
def test_a_mistake_in_the_beginning_shows(mistake, name):
    base = pair(name)[0]
    X = FlowMap(mfm_from(base.network))
    BEGINNINGS[mistake][1](X.network)
    s, u, z, t, x, y, w = draws(0)
    with torch.no_grad():
        v = X.velocity(s, u, z, t, x, y, w)
        right = base.velocity(s, s if name == "sit_tiny" else u, z, 0.0, torch.zeros_like(x), y)
    assert (v - right).abs().max() > TOLERANCE


@pytest.mark.parametrize("name", BASES)
def test_gradients_reach_what_they_should_at_the_beginning(name):
    """Not the context's patches, whose factor is zero, nor what stands before layers of zeros; everything else."""
    X = FlowMap(mfm_from(pair(name)[0].network))
    s, u, z, t, x, y, w = draws(1, 12)
    (
        X.velocity(s, u, z, t, x, y, w) * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    ).sum().backward()
    found = {key: p.grad is not None and bool(p.grad.abs().max() > 0) for key, p in X.network.named_parameters()}
    still = {f"{e}.mlp.0.{part}" for e in ("encoder_u", "context_t", SILENT[name]) for part in ("weight", "bias")}
    still |= {"patch_x.weight", "patch_x.bias", "context_modulation.weight", "position"}
    assert {key for key, reached in found.items() if not reached} == still


@pytest.mark.parametrize("name", BASES)
def test_the_weights_at_the_beginning(name):
    base, network = vector(name).network(), mfm_from(vector(name).network())
    one, silent = base.encoder_s, ["encoder_u", SILENT[name]]
    same({k: p for k, p in network.state_dict().items() if k in base.state_dict()}, base.state_dict())
    same(getattr(network, "decoder_s" if name == "sit_tiny" else "decoder_u").state_dict(), one.state_dict())
    for embedder in (*silent, "context_t"):
        mlp = getattr(network, embedder).mlp
        assert not mlp[2].weight.any() and not mlp[2].bias.any()
        if embedder == "encoder_u" or (embedder, name) == ("decoder_u", "sit_tiny"):
            assert torch.equal(mlp[0].weight, one.mlp[0].weight)
        else:  # Xavier: uniform within √(6/(256 + 48))
            assert not mlp[0].bias.any()
            assert 0.95 < mlp[0].weight.abs().max() / (6 / 304) ** 0.5 < 1
    assert torch.equal(network.patch_x.weight, base.patch_z.weight)
    shift, scale = network.context_modulation.bias.chunk(2)
    assert not shift.any() and bool((scale == -1).all()) and not network.context_modulation.weight.any()
    assert not network.scales.weight.any()
    assert network.config["learn_sigma"] == (name == "sit_tiny")
    assert len({p.data_ptr() for p in network.parameters()} & {p.data_ptr() for p in base.parameters()}) == 0


def test_a_map_has_its_bases_dtype_and_can_be_written_back():
    network = mfm_from(vector("dmf_tiny").network().double())
    assert {p.dtype for p in network.parameters()} == {torch.float64}
    state = to_state(network.float(), "mfm")
    again = from_state(state, "mfm", num_heads=4, encoder_depth=3)
    assert again.config == network.config
    same(again.state_dict(), network.state_dict())


def test_bases_that_make_no_map_are_refused():
    dmf, sit_ = vector("dmf_tiny").network(), vector("sit_tiny").network()
    with pytest.raises(ValueError, match=r"got a network that has a context already"):
        mfm_from(vector("mfm_tiny").network())
    with pytest.raises(ValueError, match=r"encoder_depth must be that of base, 3, .* got 2"):
        mfm_from(dmf, encoder_depth=2)
    with pytest.raises(ValueError, match=r"encoder_depth must be below depth = 4, got 4"):
        mfm_from(sit_, encoder_depth=4)
    with pytest.raises(ValueError, match=r"encoder_depth must be an integer >= 1, got 0"):
        mfm_from(sit_, encoder_depth=0)
    assert mfm_from(sit_).encoder_depth == mfm_from(dmf).encoder_depth == 3
    assert mfm_from(sit_, encoder_depth=2).encoder_depth == 2
    with pytest.raises(
        ValueError, match=r"encoder_depth must be given for a base of one time whose size is none in SIZES"
    ):
        mfm_from(SiT(shape=[4, 8, 8], width=8, depth=2, heads=2, n_classes=3))


# ---- the command line ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_to_a_folder_and_back(name, suffix, tmp_path, capsys):
    v = vector(name)
    path, out = write(tmp_path / "theirs.pt", v.state), tmp_path / f"again.{suffix}"
    options = [f"--{key.replace('_', '-')}={value}" for key, value in v.options.items() if not isinstance(value, bool)]
    options += [
        f"--{'' if v.options[key] else 'no-'}{key.replace('_', '-')}"
        for key in v.options
        if key.startswith(("is", "pr"))
    ]
    main(["convert", str(path), str(tmp_path / "ours"), "--kind", v.kind, *options])
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path / 'ours'}: {v.kind}, 0.")
    assert ("left out, as training alone needs it: logvar_linear.weight, logvar_linear.bias" in said) == (
        name == "dmf_tiny"
    )
    main(["back", str(tmp_path / "ours"), str(out)])
    said = capsys.readouterr().out
    assert f"read it with num_heads=4{', ' if v.kind != 'sit' else ''}" in said
    assert ("is_zero_data=False" in said) == (name == "mfm_fromsit_tiny")
    same(load_file(out) if suffix == "safetensors" else torch.load(out, weights_only=True), published(name))
    assert {entry.name for entry in tmp_path.iterdir()} == {"theirs.pt", "ours", out.name}


def test_a_map_to_begin_with_from_the_command_line(tmp_path, capsys):
    FlowMap(vector("sit_tiny").network()).save_pretrained(tmp_path / "base")
    arguments = ["init", str(tmp_path / "base"), str(tmp_path / "map"), "--encoder-depth", "2", "--guidance", "1,4"]
    main([*arguments, "--reads-tx"])
    assert capsys.readouterr().out.endswith("map: mfm, 0.3 M parameters, encoder_depth=2\n")
    network = load(tmp_path / "map")
    assert (network.reads_tx, network.encoder_depth, network.guidance) == (True, 2, (1.0, 4.0))
    s, u, z, t, x, y, w = draws(3)
    v = FlowMap(network).velocity(s, u, z, t, x, y, w)
    assert torch.equal(v, FlowMap(vector("sit_tiny").network()).velocity(s, s, z, 0.0, 0 * x, y))
    arguments[2] = str(tmp_path / "again")
    main([*arguments, "--reads-tx"])
    same(load(tmp_path / "again").state_dict(), network.state_dict())  # drawn from the seed
    arguments[2] = str(tmp_path / "other")
    main([*arguments, "--no-reads-tx", "--seed=1"])
    assert not torch.equal(load(tmp_path / "other").context_t.mlp[0].weight, network.context_t.mlp[0].weight)


def test_a_drift_alone_is_known_by_its_mark(tmp_path):
    FlowMap(mfm_from(vector("sit_tiny").network())).save_pretrained(tmp_path)
    assert load(tmp_path).drift_only is False
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"drift_only": True}))
    assert load(tmp_path).drift_only is True and load(tmp_path).config == config["config"]


def test_half_precision_is_reported(tmp_path, capsys):
    path = write(tmp_path / "half.pt", {key: tensor.half() for key, tensor in published("sit_tiny").items()})
    main(["convert", str(path), str(tmp_path / "ours"), "--num-heads", "4"])  # 32 rows tell the kind
    assert "raised to float32: weights of torch.float16" in capsys.readouterr().out


def test_a_wrong_command_ends_with_the_reason(tmp_path):
    FlowMap(vector("sit_tiny").network()).save_pretrained(tmp_path / "ours")
    path = write(tmp_path / "theirs.pt", published("sit_tiny"))
    before = path.read_bytes()
    for arguments, reason in (
        (["convert", str(path), "x", "--kind", "dmf"], r"theirs.pt: 32 rows in final_layer.linear"),
        (["convert", str(tmp_path / "none.pt"), "x"], r"none.pt must be a file or folder that is there"),
        (["convert", str(tmp_path / "ours"), "x"], r"ours is a folder, which needs no converting"),
            (["convert", str(path), str(tmp_path / "ours")], r"OUT must be a new folder, and .*ours is there"),
        (["back", str(tmp_path / "ours"), str(path)], r"OUT must be a new file, named .pt .*, got .*theirs.pt$"),
        (["back", str(tmp_path / "ours"), str(tmp_path / "new.npz")], r"OUT must be a new file"),
        (["back", str(tmp_path / "ours"), str(tmp_path / "new.pt"), "--kind", "mfm"], r"of the kind 'sit', got 'mfm'"),
        (["init", str(tmp_path / "none"), "x"], r"none must be a folder of this project, such as convert makes"),
            (["init", str(path), "x"], r"theirs.pt must be a folder of this project, such as convert makes"),
            (["init", str(tmp_path / "ours"), str(tmp_path)], r"OUT must be a new folder"),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match=rf"^imagenet.checkpoints: .*{reason}"):
            main(arguments)
    with pytest.raises(SystemExit, match=r"2"):
        main(["convert", str(path)])
    assert path.read_bytes() == before and not (tmp_path / "new.pt").exists()
    assert checkpoints.parse(["convert", "a", "b", "--encoder-depth", "0"]).encoder_depth == 0
