"""What a training run would cost: parameters, memory, operations and days, without making it."""

from typing import NamedTuple

from imagenet.sit import SiT
from mfm_ref.paper_recipe import Equivalents

# Peak rates of dense bfloat16 products, operations a second, as NVIDIA's data sheets have them.
HARDWARE = {"h100": 989e12, "h200": 989e12, "a100": 312e12}
SUSTAINED = 0.4  # of the peak: what a run is taken to reach where --tflops does not say
# Bytes that a block keeps for the backward pass, for each token and unit of width: under bfloat16 autocast the residual
# stream and the outputs of norms are float32. Twice the halves in float32.
KEPT = {"bfloat16": 50, "float32": 72}
OUTSIDE = 12  # of the same units, for what comes after the blocks
STATES = 4 * 5  # bytes of a weight with its gradient, two moments and its average, in float32
ROUNDED = {"bfloat16": 2, "float32": 0}  # and of what autocast makes of a weight, kept from forward to backward pass


class Cost(NamedTuple):
    """Of one run; memory in bytes in each process."""

    parameters: int
    states: float  # weights, gradients, moments, average, and the teacher
    activations: float  # of a micro-batch
    flops: float  # of an update, in all processes
    days: float

    def table(self) -> str:
        """In words, a line each."""
        lines = {
            "parameters": f"{self.parameters / 1e6:.1f} M",
            "memory in each process": f"{(self.states + self.activations) / 2**30:.1f} GiB, about: "
            f"{self.states / 2**30:.1f} of weights, optimiser, average and teacher, "
            f"{self.activations / 2**30:.1f} of activations (less if compiled)",
            "operations of an update": f"{self.flops / 1e12:.4g} TFLOP",
            "days": f"{self.days:.3g}",
        }
        return "\n".join(f"{name:24} {text}" for name, text in lines.items())


def cost_of(
    student: SiT,
    teacher: SiT | None,
    equivalents: Equivalents,
    *,
    batch: int,
    micro: int,
    rows: int,
    steps: int,
    gpus: int,
    rate: float,
    sharded: bool = False,
    checkpointing: bool = False,
    precision: str = "bfloat16",
) -> Cost:
    """The cost of a run.

    Args:
        student, teacher: the networks; those on torch's device meta do.
        equivalents: forward passes of them for each image (`forward_equivalents`).
        batch: images of an update; micro: images that pass at once in a process; rows: that each image gives.
        steps: updates.
        gpus: how many; rate: operations a second of each, sustained.
        sharded: whether gradients, moments, weights and average are in shards; the teacher is whole in each process.
        checkpointing: whether blocks keep their inputs alone; adds a forward pass of the rows to each update.
        precision: in `KEPT`.
    """
    parameters = sum(p.numel() for p in student.parameters())
    states = STATES * parameters / (gpus if sharded else 1) + ROUNDED[precision] * parameters
    if teacher is not None:
        states += 4 * sum(p.numel() for p in teacher.parameters())
    depth, again = student.config["depth"], rows if checkpointing else 0
    unit = student.position.shape[1] * student.config["width"]
    blocks = OUTSIDE + (4 * depth + KEPT[precision] if checkpointing else KEPT[precision] * depth)
    flops = batch * (equivalents.student + again) * flops_of(student)
    if teacher is not None:
        flops += batch * equivalents.teacher * flops_of(teacher)
    days = steps * flops / (gpus * rate) / 86400
    return Cost(parameters, states, float(micro * rows * unit * blocks), float(flops), days)


def flops_of(network: SiT) -> int:
    """Floating-point operations of one forward pass for one sample: two for each weight that meets each token or state.

    And 4 N² d for the attention among N tokens in each block. Sums and functions of single numbers are not counted.
    """
    tokens, depth, width = network.position.shape[1], network.config["depth"], network.config["width"]
    weights = {name: weight.numel() for name, weight in network.named_parameters() if name.endswith("weight")}
    once = ("labels", "scales", "encoder_", "decoder_", "context_", "outlet_modulation")
    per_state = sum(n for name, n in weights.items() if name.startswith(once[2:]) or ".modulation." in name)
    per_token = sum(n for name, n in weights.items() if not name.startswith(once) and ".modulation." not in name)
    return 2 * (per_state + tokens * per_token) + 4 * tokens**2 * width * depth
