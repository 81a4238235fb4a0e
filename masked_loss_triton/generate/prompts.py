"""What is asked for: the words with their weights, which instances count, and what is done to the mask."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from masked_loss_triton.errors import UserError
from masked_loss_triton.masks.operations import MAX_BLUR

SELECTIONS = ("all", "largest", "nearest")
MAX_PADDING = 1024  # pixels
NUMBERS = {
    "min_score": (0, 1),
    "min_mask_score": (0, 1),
    "min_size": (0, 1),
    "mask_dilate": (-MAX_PADDING, MAX_PADDING),
    "mask_blur": (0, MAX_BLUR),
}
TIME = r"(?:\d+:)?\d+(?:\.\d*)?"
INTERVAL = re.compile(rf"(?P<start>{TIME})-(?P<end>(?:{TIME})?)")
WEIGHTED = re.compile(r"(?P<words>.*)=(?P<weight>[^=]*)", re.DOTALL)
# The box of a detector that sees nothing: the whole picture but a margin, since what touches all edges is background.
CENTRAL_BOX = (0.08, 0.08, 0.92, 0.92)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Words for something in the picture, and its grey value: weight 1 is white."""

    words: str
    weight: float = 1.0

    @property
    def grey(self) -> int:
        """The weight as a byte, 1 to 255."""
        return max(1, round(self.weight * 255))

    def __str__(self) -> str:
        return self.words if self.weight == 1 else f"{self.words}={self.weight:g}"


def parse_interval(text: str) -> tuple[float, float]:
    """Reads seconds of a clip: `"1.5-4"`, `"0:30-1:10"`, or `"6-"` to the end. The end is excluded.

    Raises:
        UserError: for anything else, or an end that is not after the beginning.
    """
    match = INTERVAL.fullmatch(text.strip())
    start, end = (_seconds(match[name]) for name in ("start", "end")) if match else (1.0, 0.0)
    if start >= end:
        raise UserError(
            f"--intervals {text!r}: write START-END in seconds or minutes:seconds, for example 1.5-4 or 0:30-", 2
        )
    return start, end


def _seconds(text: str) -> float:
    minutes, _, seconds = text.rpartition(":")
    return float(seconds) + 60 * int(minutes or 0) if text else math.inf


def parse_prompt(text: str) -> Prompt:
    """Reads `"face"` or `"face=0.5"`.

    Raises:
        UserError: for no words, characters that the detector reads as its own marks, or a weight outside (0, 1].
    """
    match = WEIGHTED.fullmatch(text)
    words, weight = (match["words"], match["weight"]) if match else (text, "1")
    words = " ".join(words.split())
    if not words:
        raise UserError(f"prompt {text!r} has no words: write for example person or face=0.5", 2)
    if set(words) & set("<>"):
        raise UserError(f"prompt {text!r}: < and > are marks of the detector's own language: leave them out", 2)
    try:
        value = float(weight)
    except ValueError:
        raise UserError(f"prompt {text!r}: {weight!r} is not a weight: write for example face=0.5", 2) from None
    if not 0 < value <= 1:
        raise UserError(f"prompt {text!r}: its weight must be above 0 and at most 1; exclude with --exclude_prompt", 2)
    return Prompt(words, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskRequest:
    """What is looked for in each picture, and how the instances that are found become one mask.

    In this order: score and size, selection, union, dilation, layers, exclusion, blur, inversion, intervals.

    Args:
        prompts: the layers; where they overlap the highest weight wins.
        exclude: words for what is 0 in the mask whatever the prompts say. Not padded.
        select: "all" instances of a prompt, the "largest", or the "nearest" to the centre of `reference_box`.
        reference_box: left, top, right, bottom as fractions of the picture; also the box of a detector without words.
        min_score: instances below this score of the detector, 0 to 1, do not count.
        min_mask_score: the same for the segmenter's own estimate of its mask.
        min_size: instances below this share of the picture's area do not count.
        mask_dilate: grow each prompt's mask by so many pixels; negative shrinks it.
        mask_blur: Gaussian; its standard deviation as a fraction, 0 to 0.05, of the picture's smaller side.
        invert: white where nothing was found.
        intervals: start and end in seconds; frames of a clip outside of all of them are black. None given leaves all as they are.

    Raises:
        UserError: naming the flag, the value and what is accepted.
    """

    prompts: tuple[Prompt, ...]
    exclude: tuple[str, ...] = ()
    select: str = "all"
    reference_box: tuple[float, float, float, float] = CENTRAL_BOX
    min_score: float = 0.0
    min_mask_score: float = 0.0
    min_size: float = 0.0
    mask_dilate: int = 0
    mask_blur: float = 0.0
    invert: bool = False
    intervals: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        words = [*(prompt.words for prompt in self.prompts), *self.exclude]
        twice = {one for one in words if words.count(one) > 1}
        if twice:
            raise UserError(f"prompt {min(twice)!r} is given twice: leave one out", 2)
        if not self.prompts:
            raise UserError("there is no prompt: give --text_prompt", 2)
        if self.select not in SELECTIONS:
            raise UserError(f"--select must be one of {', '.join(SELECTIONS)}, got {self.select!r}", 2)
        for field, (low, high) in NUMBERS.items():
            if not low <= getattr(self, field) <= high:
                raise UserError(f"--{field} must be between {low:g} and {high:g}, got {getattr(self, field):g}", 2)
        left, top, right, bottom = self.reference_box
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise UserError(
                f"--reference_box must be left top right bottom, fractions of the picture from 0 to 1, got "
                f"{' '.join(f'{edge:g}' for edge in self.reference_box)}",
                2,
            )

    @property
    def words(self) -> tuple[str, ...]:
        """Everything that is to be found, the prompts first."""
        return (*(prompt.words for prompt in self.prompts), *self.exclude)

    def counts_at(self, second: float) -> bool:
        """Whether a frame at this time of its clip is in one of the intervals."""
        return not self.intervals or any(start <= second < end for start, end in self.intervals)

    def note(self) -> dict[str, Any]:
        """The request by the names of its flags, for the note in each mask."""
        return {
            "text_prompt": [str(prompt) for prompt in self.prompts],
            "exclude_prompt": list(self.exclude),
            **{field: getattr(self, field) for field in ("select", *NUMBERS, "invert")},
            "reference_box": list(self.reference_box),
            "intervals": [f"{start:g}-{'' if end == math.inf else f'{end:g}'}" for start, end in self.intervals],
        }


def parse_prompts(texts: Sequence[str], excluded: Sequence[str]) -> tuple[tuple[Prompt, ...], tuple[str, ...]]:
    """Returns the prompts and the excluded words of a command line.

    Raises:
        UserError: for a bad prompt, or a weight of an excluded one.
    """
    exclude = []
    for text in excluded:
        prompt = parse_prompt(text)
        if prompt.weight != 1:
            raise UserError(f"--exclude_prompt {text!r}: what is excluded is 0 and has no weight", 2)
        exclude.append(prompt.words)
    return tuple(parse_prompt(text) for text in texts), tuple(exclude)
