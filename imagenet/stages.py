"""The networks of a training stage: what it begins with, and what it learns from."""

from pathlib import Path

import torch

from imagenet.checkpoints import flow_map_from, load, mfm_from
from imagenet.presets import TrainOptions
from imagenet.sit import SiT, build
from imagenet.teacher import Teacher
from mfm_ref import FlowMap
from mfm_ref.files import load_json
from mfm_ref.paper_recipe import Equivalents, RowLaw, forward_equivalents

NEW = {"flow": "sit", "map": "dmf", "mfm": "mfm"}  # the kind of a new network
TEACHERS_SCALE = 2.5  # the guidance in the weights of the published DMF


def check_stage(config: TrainOptions) -> None:
    """Raise ValueError for options that contradict each other."""
    if not config.stage:
        raise ValueError("--stage must be flow, map or mfm, or --preset name settings that have one")
    if config.stage == "flow" and (config.teacher or config.guidance != 1):
        raise ValueError("--stage flow learns the drift from data: it takes neither --teacher nor --guidance")
    if config.teacher_scale and not config.teacher:
        raise ValueError("--teacher must be given where --teacher-scale is, as by the presets that distil")
    if config.teacher and config.guided_from:
        raise ValueError("--guided-from is for targets from data: a --teacher has guidance at all times")
    if not 0 <= config.guided_from <= 1:
        raise ValueError(f"--guided-from must lie in [0, 1], got {config.guided_from}")
    if config.guided_from and config.guidance == 1:
        raise ValueError("--guided-from is where --guidance begins, which must be above 1, got 1")
    if config.guidance > 1 and not config.teacher and config.drop == 0:
        raise ValueError("--drop must be above 0 with --guidance from data: rows without a label train the null class")
    if config.reads_tx and config.stage != "mfm":
        raise ValueError(f"--reads-tx is for --stage mfm: --stage {config.stage} has no context")
    if config.preset and config.stage != "flow" and not (config.init or config.dry_run):
        raise ValueError(f"--init must name the weights that --preset {config.preset} begins with")
    law_of(config, null_class=0).check()


def law_of(config: TrainOptions, null_class: int) -> RowLaw:
    """The law of the rows."""
    return RowLaw(
        config.stage, config.times, null_class, config.drop, guidance=config.guidance, plain_rate=config.guidance_rate
    )


def weights_of(config: TrainOptions, numbers: int) -> dict[str, float]:
    """p, p_consistency and c of `paper_loss` for states of so many numbers.

    A drift has the plain mean square. A flow map from data has p = 1 and a floor of 0.01 a number in both terms, which
    are the gradients of DMF's log(‖Δ‖²/D + 0.01) and count the terms alike. A Meta Flow Map, and whatever has a
    teacher, has MFM's: p = 0.5 on the diagonal, 1 for jumps, and a floor of 0.01.
    """
    if config.stage == "flow":
        return {"p": 0.0}
    if config.stage == "map" and not config.teacher:
        return {"p": 1.0, "p_consistency": 1.0, "c": 0.01 * numbers}
    return {"p": 0.5, "p_consistency": 1.0, "c": 0.01}


def guided_from(config: TrainOptions) -> float | None:
    """Where model guidance begins; None without it."""
    return config.guided_from if config.guidance > 1 and not config.teacher else None


def equivalents_of(config: TrainOptions, teacher: Teacher | None) -> Equivalents:
    """Forward passes of student and teacher for each image."""
    return forward_equivalents(
        config.stage, guided=guided_from(config) is not None, teacher=teacher.passes if teacher else 0
    )


# ---- the student -----------------------------------------------------------------------------------------


def student_of(config: TrainOptions, shape: tuple[int, ...], n_classes: int) -> SiT:
    """The network that a stage begins with: a new one, or that of --init made into what the stage needs.

    Raises:
        ValueError: weights that cannot be had, that do not fit the latents, or that contradict the options.
    """
    torch.manual_seed(config.seed)
    if not config.init:
        return new(config, shape, n_classes)
    base = load(
        config.init, config.init_kind or None, num_heads=config.num_heads, encoder_depth=config.encoder_depth or None
    )
    network = made_for(base, config)
    check_fit(network, shape, n_classes, "--init")
    check_rate(network, config)
    return network


def new(config: TrainOptions, shape: tuple[int, ...], n_classes: int) -> SiT:
    """A network of --size with random weights."""
    more = {"guidance": scales(config), "reads_tx": config.reads_tx} if config.stage == "mfm" else {}
    network = build(config.size, NEW[config.stage], shape=list(shape), n_classes=n_classes, **more)
    check_rate(network, config)
    return network


def check_rate(network: SiT, config: TrainOptions) -> None:
    """Refuse two scales of guidance for a network that does not read them: it would learn something in between."""
    if config.guidance_rate and config.guidance > 1 and not network.guidance:
        raise ValueError("--guidance-rate must be 0 for a network that does not read its guidance")


def made_for(base: SiT, config: TrainOptions) -> SiT:
    """A network that begins as `base`, with the times and the context that the stage needs.

    Raises:
        ValueError: a Meta Flow Map whose scales or whose way to read its context are not those of the options.
    """
    if config.stage == "mfm" and not base.context:
        return mfm_from(base, guidance=scales(config), reads_tx=config.reads_tx)
    if config.stage == "map" and not base.two_times:
        return flow_map_from(base)
    if config.reads_tx and not base.reads_tx:
        raise ValueError("--reads-tx is for new maps: the weights of --init read their context as x")
    if base.guidance and config.guidance not in base.guidance:
        raise ValueError(
            f"--guidance must be one of the scales that the weights of --init know, {list(base.guidance)}, "
            f"got {config.guidance}"
        )
    return base


def scales(config: TrainOptions) -> list[float]:
    """The guidance table of a new Meta Flow Map."""
    return [1.0, config.guidance] if config.guidance > 1 else []


def check_fit(network: SiT, shape: tuple[int, ...], n_classes: int, name: str) -> None:
    """Raise ValueError for a network of other latents, or of fewer classes."""
    if network.shape != tuple(shape):
        raise ValueError(f"{name} must be weights for latents of the shape {tuple(shape)}, got {network.shape}")
    if network.n_classes < n_classes:
        raise ValueError(f"{name} must know {n_classes} classes, as the latents have, got {network.n_classes}")


# ---- the teacher -----------------------------------------------------------------------------------------


def teacher_of(config: TrainOptions, student: SiT) -> Teacher | None:
    """The teacher of --teacher on the CPU, frozen; None where the stage learns from data.

    Raises:
        ValueError: weights that cannot be had or do not fit, or a scale that they do not know.
    """
    if not config.teacher:
        return None
    network = load(
        config.teacher,
        config.teacher_kind or None,
        num_heads=config.num_heads,
        encoder_depth=config.encoder_depth or None,
    )
    check_fit(network, student.shape, student.n_classes, "--teacher")
    if network.null_class != student.null_class:
        raise ValueError(f"--teacher must have the classes of the map, {student.n_classes}, got {network.n_classes}")
    return taught_by(network.requires_grad_(False).eval(), config)


def taught_by(network: SiT, config: TrainOptions) -> Teacher:
    """A network as the teacher: in one pass where that is enough for all scales of the rows."""
    wanted = {config.guidance} | ({1.0} if config.guidance_rate else set())
    if network.guidance and not {1.0, *wanted} <= set(network.guidance):
        raise ValueError(
            f"--guidance must be one of the scales that --teacher knows, {list(network.guidance)}, "
            f"got {config.guidance}"
        )
    scale = config.teacher_scale
    if not scale and network.two_times and not network.context:
        if (Path(config.teacher) / "config.json").exists():
            raise ValueError(
                "--teacher-scale must say what guidance the weights of --teacher hold: the --guidance that they were "
                f"trained with, {TEACHERS_SCALE} for a published DMF"
            )
        scale = TEACHERS_SCALE
    scale = scale or 1.0
    return Teacher(FlowMap(network), scale, one_scale=wanted == {scale})


# ---- without weights -------------------------------------------------------------------------------------


def outlines(config: TrainOptions, shape: tuple[int, ...], n_classes: int) -> tuple[SiT, Teacher | None]:
    """Student and teacher as `student_of` and `teacher_of` make them, on torch's device meta: no weights are read.

    A network in a folder is as its config.json says; of any other place, and a new one, as --size says.
    """
    with torch.device("meta"):
        base = outline(config.init)
        student = made_for(base, config) if base else new(config, shape, n_classes)
        if not config.teacher:
            return student, None
        network = outline(config.teacher) or build(config.size, config.teacher_kind or "dmf", shape=list(shape))
        return student, taught_by(network, config)


def outline(source: str) -> SiT | None:
    """The network that the config.json of a folder describes; None without one."""
    path = Path(source) / "config.json"
    return SiT(**load_json(path)["config"]) if source and path.exists() else None
