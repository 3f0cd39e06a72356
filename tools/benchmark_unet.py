"""What `tools/benchmark.py unet` measures: training steps of a U-Net with one optimisation after another switched on.

A *contender* is a network that is trained; one call is one step. A *setting* names what is switched on. Every contender
takes turns with the *reference*, diffusers' network of the same shape as its users get it.
"""

import argparse
import ctypes
import gc
import platform
import re
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ldm_train.batch import Conditioning
from ldm_train.config import conf_dir, unknown_keys
from ldm_train.nn import UNet

OPTIMISATIONS = ("SDPA", "channels_last", "bfloat16", "compile", "checkpointing")
# Dense bfloat16 TFLOP/s of the makers' data sheets, by a part of the device's name; the first that fits.
PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
PEAK_FILE, RESET_FILE = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Setting:
    """What is switched on: the names of `OPTIMISATIONS`, and whose network it is."""

    name: str
    on: frozenset[str]
    theirs: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the table; times in seconds, memory in bytes."""

    name: str
    step: float
    images_per_second: float
    of_diffusers: float | None
    of_row_above: float | None
    tflops: float
    mfu: float | None
    memory: int | None


@dataclass(frozen=True)
class Inputs:
    """What a network is fed: latents and target (B, C, h, w), times (B,), tokens (B, M, D), vector (B, V), concat."""

    x_t: Tensor
    t: Tensor
    target: Tensor
    conditioning: Conditioning

    @classmethod
    def of(cls, network: UNet, arguments: argparse.Namespace, device: str) -> "Inputs":
        """Random inputs of the shapes that a network takes."""
        batch, side = arguments.batch, arguments.latents

        def draw(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, device=device)

        return cls(
            x_t=draw(network.in_channels, side, side),
            t=torch.arange(batch, device=device) * 1000 // batch,
            target=draw(network.out_channels, side, side),
            conditioning=Conditioning(
                context=None if network.context_dim is None else draw(arguments.context, network.context_dim),
                vector=None if network.vector_dim is None else draw(network.vector_dim),
                concat=draw(network.concat_channels, side, side) if network.concat_channels else None,
            ),
        )


class Contender:
    """A network that is trained: one call is one step.

    Args:
        network: ours or theirs, on its device.
        setting: what is switched on; the memory format and checkpointing were, when the network was built.
        inputs: of every step.
        optimize: end the step with AdamW.
    """

    def __init__(self, network: nn.Module, setting: Setting, inputs: Inputs, optimize: bool) -> None:
        self.network, self.inputs, self.device = network.train(), inputs, inputs.x_t.device.type
        self.half, self.fused, self.theirs = "bfloat16" in setting.on, "SDPA" in setting.on, setting.theirs
        parameters = list(network.parameters())
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True) if optimize else None
        # Between steps: the weights, and with AdamW two moments of each.
        self.held = sum(parameter.nbytes for parameter in parameters) * (3 if optimize else 1)
        if "compile" in setting.on:
            network.compile()

    def __call__(self) -> None:
        """Forward, backward, and the optimizer's step if there is one."""
        with nullcontext() if self.fused else sdpa_kernel(SDPBackend.MATH):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
                prediction = self._predict()
            (prediction.float() - self.inputs.target).square().mean().backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self.network.zero_grad(set_to_none=True)

    def _predict(self) -> Tensor:
        x_t, t, (context, vector, concat) = self.inputs.x_t, self.inputs.t, self.inputs.conditioning
        if not self.theirs:
            return self.network(x_t, t, self.inputs.conditioning)
        x_t = x_t if concat is None else torch.cat([x_t, concat], dim=1)
        return self.network(x_t, t, context, class_labels=vector, return_dict=False)[0]


def our_network(node: DictConfig, setting: Setting) -> UNet:
    """The U-Net of a config node."""
    arguments = {key: value for key, value in OmegaConf.to_container(node, resolve=True).items() if key != "_target_"}
    factors = [2**i for i in range(len(arguments["channel_multipliers"]))]
    arguments["memory_format"] = "channels_last" if "channels_last" in setting.on else "contiguous"
    arguments["checkpoint_factors"] = factors if "checkpointing" in setting.on else []
    return UNet(**arguments)


def their_network(ours: UNet, setting: Setting) -> nn.Module:
    """Diffusers' U-Net of the same shape and number of parameters.

    Raises:
        ValueError: if diffusers has none.
    """
    from diffusers import UNet2DConditionModel  # an extra of developers, and slow to import

    shape = ours.shape
    if shape.attention == "plain" or shape.resample == "residual":
        raise ValueError("its conditional U-Net has neither plain attention nor residual blocks that resample")
    widths = [level.width for level in shape.levels]
    attends = [level.attend for level in shape.levels]
    theirs = UNet2DConditionModel(
        in_channels=ours.in_channels + ours.concat_channels,
        out_channels=ours.out_channels,
        layers_per_block=shape.num_res_blocks,
        block_out_channels=widths,
        down_block_types=["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        up_block_types=["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        cross_attention_dim=shape.context_dim or widths[-1],
        # By its name the channels of a head; by what it does the number of heads.
        attention_head_dim=[shape.num_heads or width // (shape.head_channels or width) for width in widths],
        transformer_layers_per_block=[level.depth for level in shape.levels],
        use_linear_projection=shape.linear_projection,
        norm_num_groups=shape.norm_groups,
        dropout=shape.dropout,
        resnet_time_scale_shift="scale_shift" if shape.time_modulation == "scale_shift" else "default",
        class_embed_type=None if ours.vector_dim is None else "projection",
        projection_class_embeddings_input_dim=ours.vector_dim,
    )
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in (theirs, ours)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"its U-Net has {sizes[0]:,} parameters, this one {sizes[1]:,}")
    return theirs.to(memory_format=torch.channels_last) if "channels_last" in setting.on else theirs


def ladder(without: list[str], compare: bool) -> list[Setting]:
    """The rows: optimisations one by one, then diffusers with those that it has as well."""
    rows = [Setting("plain", frozenset())]
    for name in OPTIMISATIONS:
        if name not in without:
            rows.append(Setting(f"+ {name}", rows[-1].on | {name}))
    everything = rows[-1].on - {"checkpointing"}
    return [*rows, Setting("diffusers, as tuned", everything | {"SDPA"}, theirs=True)] if compare else rows


def counted_flops(node: DictConfig, arguments: argparse.Namespace) -> float:
    """The arithmetic of one forward and backward pass, counted on shapes alone."""
    with torch.device("meta"):
        network = our_network(node, Setting("", frozenset()))
        inputs = Inputs.of(network, arguments, "meta")
        with FlopCounterMode(display=False) as counter:
            network(inputs.x_t, inputs.t, inputs.conditioning).sum().backward()
    return float(counter.get_total_flops())


class Watch:
    """The clock of a device, and its memory."""

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"
        self.now = time.process_time if not self.gpu and torch.get_num_threads() == 1 else time.perf_counter

    def seconds(self, step: Callable[[], None]) -> float:
        """The time of one step."""
        self._wait()
        begin = self.now()
        step()
        self._wait()
        return self.now() - begin

    def memory(self, contender: Contender) -> int | None:
        """The most bytes that a contender holds in a step, once it has made some; `None` where it cannot be known.

        What is held before the step is others' and the contender's own, which is known. So a row's figure depends
        neither on the rows before it nor on the other network.
        """
        gc.collect()
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.seconds(contender)
            return torch.cuda.max_memory_allocated() - before + contender.held
        if not RESET_FILE.exists():
            return None
        release_free_memory()  # of which a step may take as much as it needs, and nothing would be seen
        RESET_FILE.write_text("5")  # resets the peak of this process, see `man 5 proc`
        before = process_memory("VmRSS")
        self.seconds(contender)
        return process_memory("VmHWM") - before + contender.held

    def _wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Measured:
    """A row in the making: median seconds of its steps and of diffusers' between them, and the peak of memory."""

    setting: Setting
    step: float
    reference: float | None
    memory: int | None


def in_turns(setting: Setting, contender: Contender, reference: Contender | None, watch: Watch, steps: int) -> Measured:
    """Time a contender and the reference step by step."""
    times: list[float] = []
    references: list[float] = []
    for _ in range(2):  # compiles, chooses kernels, fills the allocator
        watch.seconds(contender)
    memory = watch.memory(contender)
    for _ in range(steps):
        if reference is not None:
            references.append(watch.seconds(reference))
        times.append(watch.seconds(contender))
    return Measured(setting, statistics.median(times), statistics.median(references) if references else None, memory)


def warm_up(step: Callable[[], None], seconds: float) -> None:
    """Run steps until the device's clocks and temperature are those of a long run."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        step()


def rows_of(measurements: list[Measured], flops: float, batch: int, peak_tflops: float | None) -> list[Row]:
    """The table: each row beside diffusers, and ours each beside the one above."""
    rows: list[Row] = []
    for i, found in enumerate(measurements):
        share = None if found.reference is None else found.step / found.reference
        above = rows[-1] if i and not found.setting.theirs else None
        of_above = None
        if above is not None:
            both = share is not None and above.of_diffusers is not None
            of_above = share / above.of_diffusers if both else found.step / above.step  # type: ignore[operator]
        tflops = flops / found.step / 1e12
        rows.append(
            Row(
                name=found.setting.name,
                step=found.step,
                images_per_second=batch / found.step,
                of_diffusers=share,
                of_row_above=of_above,
                tflops=tflops,
                mfu=None if peak_tflops is None else tflops / peak_tflops,
                memory=found.memory,
            )
        )
    return rows


def benchmark_unet(arguments: argparse.Namespace, console: Console) -> tuple[list[Row], dict[str, object]]:
    """Measure the U-Net of an option.

    Returns:
        The rows, and what they were measured of and on.

    Raises:
        ValueError: if the network cannot be built.
    """
    node, watch = unet_node(arguments), Watch(arguments.device)
    flops = counted_flops(node, arguments)
    inputs = Inputs.of(meta_network(node), arguments, arguments.device)

    def contender(setting: Setting) -> Contender:
        ours = meta_network(node) if setting.theirs else our_network(node, setting)
        network = their_network(ours, setting) if setting.theirs else ours
        return Contender(network.to(arguments.device), setting, inputs, arguments.optimizer)

    reference, compare = None, not arguments.alone
    try:
        reference = contender(Setting("diffusers", frozenset({"SDPA"}), theirs=True)) if compare else None
    except (ValueError, ImportError) as error:
        console.print(f"without diffusers: {error}", style="yellow", markup=False, soft_wrap=True)
    settings = ladder(arguments.without, reference is not None)
    warm_up(reference or contender(settings[0]), arguments.warmup_s)
    measurements = []
    for setting in track(settings, "rows", console=console):
        torch.compiler.reset()
        measurements.append(in_turns(setting, contender(setting), reference, watch, arguments.steps))
    device = device_name(arguments.device)
    peak = arguments.peak_tflops or known_peak(device)
    facts = {
        "unet": arguments.unet,
        "overrides": arguments.set,
        "parameters": sum(parameter.numel() for parameter in meta_network(node).parameters()),
        "batch": arguments.batch,
        "latents": arguments.latents,
        "tokens": arguments.context,
        "optimizer": arguments.optimizer,
        "tflop_a_step": flops / 1e12,
        "device": device,
        "peak_tflops": peak,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers_step": statistics.median(m.reference for m in measurements if m.reference) if reference else None,
    }
    return rows_of(measurements, flops, arguments.batch, peak), facts


def unet_node(arguments: argparse.Namespace) -> DictConfig:
    """The config node of an option, its references to other parts filled in.

    Raises:
        ValueError: if there is no such option, or an override has no place in it.
    """
    path = conf_dir() / "unet" / f"{arguments.unet}.yaml"
    if not path.is_file():
        options = ", ".join(sorted(option.stem for option in path.parent.glob("*.yaml")))
        raise ValueError(f"there is no U-Net {arguments.unet!r}; allowed are {options}; change --unet")
    conditioner = {"context_dim": arguments.context_dim, "vector_dim": arguments.vector_dim}
    root = OmegaConf.create({"autoencoder": {"latent_channels": arguments.latent_channels}, "conditioner": conditioner})
    try:
        root.unet = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(arguments.set))
        mistakes = unknown_keys(root)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error}; allowed are overrides as `channels=64`; change --set") from error
    if mistakes:
        raise ValueError("; ".join([*mistakes, "change --set"]))
    return root.unet


def meta_network(node: DictConfig) -> UNet:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return our_network(node, Setting("", frozenset()))


def process_memory(kind: str) -> int:
    """A figure of this process's memory in bytes: VmRSS, held now, or VmHWM, the most held."""
    return int(re.search(rf"{kind}:\s+(\d+) kB", PEAK_FILE.read_text())[1]) * 1024  # type: ignore[index]


def release_free_memory() -> None:
    """Give what the allocator keeps for later back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def device_name(device: str) -> str:
    """What the device is called."""
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()


def known_peak(device: str) -> float | None:
    """The peak of a device by its name, in TFLOP/s."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", device)), None)
