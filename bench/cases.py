"""What is measured: the latents that HunyuanVideo, WAN and Qwen-Image really train on, and the ways a loss is called on them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from masked_loss_triton import FlowTarget, MaskedLossConfig


@dataclasses.dataclass(frozen=True)
class Latents:
    """One shape of latents: what model, from what pictures."""

    model: str
    source: str  # width x height x frames in pixels
    channels: int
    frames: int
    height: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.channels}x{self.frames}x{self.height}x{self.width}"

    @property
    def pixel_size(self) -> tuple[int, int]:
        """(height, width) of the pictures: WAN 2.2 5B has a VAE of 16 x 16 pixels, all others 8 x 8."""
        factor = 16 if self.channels == 48 else 8
        return self.height * factor, self.width * factor


# The usual resolutions of each model, and two small odd buckets whose H * W is divisible by 4 (26 x 38) and by 16 (42 x 24) only.
LATENTS = {
    latents.name: latents
    for latents in (
        Latents("WAN 2.1/2.2", "832x480x81", 16, 21, 60, 104),
        Latents("WAN 2.1/2.2", "1280x720x81", 16, 21, 90, 160),
        Latents("HunyuanVideo", "1280x720x129", 16, 33, 90, 160),
        Latents("HunyuanVideo", "960x544x25", 16, 7, 68, 120),
        Latents("WAN 2.2 5B", "1280x704x121", 48, 31, 44, 80),
        Latents("Qwen-Image", "1328x1328", 16, 1, 166, 166),
        Latents("Qwen-Image", "1664x928", 16, 1, 116, 208),
        Latents("HunyuanVideo", "304x208, one frame", 16, 1, 26, 38),
        Latents("WAN 2.1/2.2", "192x336, one frame", 16, 1, 42, 24),
    )
}
MAIN = "16x21x60x104"
LARGE = "16x33x90x160"
ODD = ("16x1x26x38", "16x1x42x24", MAIN, LARGE)

MASKS = ("latent", "one frame", "pixels", "pixels uint8", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the loss, without its numbers.

    Args:
        latents: a name in LATENTS.
        dtype: of pred; `target_dtype` (that of pred if None) of target, noise, latents and prior.
        mask: "latent": every position its own; "one frame": on the grid of the latents, for all frames; "pixels": one frame at
            the size of the pictures.
        memory: "channels last": channels are the innermost axis of pred and target; "layered": (B, L, C, H, W), as Qwen-Image
            with layers; "packed": tokens of 2x2 patches; "cropped": rows are apart, as in a part of a larger picture.
    """

    latents: str = MAIN
    batch: int = 1
    dtype: torch.dtype = torch.float32
    target_dtype: torch.dtype | None = None
    mask: str = "latent"
    prior: bool = False
    flow: bool = False
    memory: str = "contiguous"
    stats: bool = False
    config: MaskedLossConfig = dataclasses.field(default_factory=MaskedLossConfig)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(B, C, F, H, W)."""
        latents = LATENTS[self.latents]
        return self.batch, latents.channels, latents.frames, latents.height, latents.width

    @property
    def bytes_of_pred(self) -> int:
        """N: the unit of every count of bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def name(self) -> str:
        default = MaskedLossConfig().to_dict()
        changed = [f"{key}={value}" for key, value in self.config.to_dict().items() if value != default[key]]
        dtype = short(self.dtype) + (f"/{short(self.target_dtype)}" if self.target_dtype else "")
        words = [f"{self.batch}x{self.latents}", dtype, "" if self.mask == "latent" else f"mask {self.mask}"]
        words += ["prior" * self.prior, "flow" * self.flow, self.memory * (self.memory != "contiguous")]
        return " ".join(word for word in [*words, "stats" * self.stats, *changed] if word)


def short(dtype: torch.dtype) -> str:
    """float32 -> fp32, bfloat16 -> bf16."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]


@dataclasses.dataclass(frozen=True)
class Call:
    """The tensors of a case: the arguments of `masked_loss`."""

    pred: torch.Tensor
    target: Any
    mask: torch.Tensor | None
    prior: torch.Tensor | None
    config: MaskedLossConfig
    layout: str
    patches: tuple[int, int] | None = None

    @property
    def keywords(self) -> dict[str, Any]:
        found = {"prior": self.prior, "patches": self.patches}
        return {name: value for name, value in found.items() if value is not None}


def build(case: Case, device: torch.device | str = "cpu", seed: int = 0, *, filled: bool = True) -> Call:
    """Tensors for a case. `filled=False` leaves all but the mask uninitialised: for tools that look at shapes and strides only."""
    generator = torch.Generator(device=device).manual_seed(seed) if filled else None

    def latents(dtype: torch.dtype, requires_grad: bool = False) -> torch.Tensor:
        batch, channels, *grid = case.shape
        if case.memory == "contiguous":
            tensor = torch.empty(case.shape, dtype=dtype, device=device)
        elif case.memory == "channels last":
            tensor = torch.empty((batch, *grid, channels), dtype=dtype, device=device).movedim(-1, 1)
        elif case.memory == "packed":
            tensor = torch.empty((batch, grid[1] * grid[2] // 4, 4 * channels), dtype=dtype, device=device)
        elif case.memory == "cropped":
            tensor = torch.empty((*case.shape[:-1], grid[2] + 8), dtype=dtype, device=device)[..., : grid[2]]
        else:
            tensor = torch.empty((batch, grid[0], channels, *grid[1:]), dtype=dtype, device=device)
        if filled:
            tensor.copy_(torch.randn(tensor.shape, generator=generator, device=device))
        return tensor.requires_grad_(requires_grad)

    other = case.target_dtype or case.dtype
    target: Any = latents(other)
    if case.flow:
        target = FlowTarget(target, latents(other))
    return Call(
        pred=latents(case.dtype, requires_grad=True),
        target=target,
        mask=_mask(case, device, generator),
        prior=latents(other) if case.prior else None,
        config=case.config,
        layout=case.memory if case.memory in ("layered", "packed") else "channels_first",
        patches=(case.shape[3] // 2, case.shape[4] // 2) if case.memory == "packed" else None,
    )


def _mask(case: Case, device: Any, generator: torch.Generator | None) -> torch.Tensor | None:
    """A soft mask with areas that are exactly 0 and 1, as drawn and feathered masks have; zeros without a generator."""
    if case.mask == "none":
        return None
    batch, _, frames, *size = case.shape
    if case.mask != "latent":
        frames = 1
    if case.mask.startswith("pixels"):
        size = list(LATENTS[case.latents].pixel_size)
    if generator is None:
        dtype = torch.uint8 if case.mask.endswith("uint8") else torch.float32
        return torch.zeros(
            (batch, frames, *size), dtype=dtype, device=device
        )  # in [0, 1], which is looked at on the CPU
    soft = torch.rand((batch, frames, *size), generator=generator, device=device)
    mask = (2 * soft - 0.5).clamp(0, 1)
    return (mask * 255).round().to(torch.uint8) if case.mask.endswith("uint8") else mask
