"""Takes tokens out before a run of blocks and puts them back behind it, by hooks on an unmodified model.

Between the first and the last block of a lane only the kept tokens are computed; the others pass by. What a block is told about its
tokens (rotary embeddings, attention masks, lengths) is cut to the kept ones by the model's adapter.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch

from masked_loss_triton.routing.router import Kept


class Cut:
    """The kept tokens of one forward pass through one lane.

    Args:
        kept: of the router.
        x: (B, tokens, channels), what the first block is given; tokens beyond the router's (text, control pictures) are always
            kept.
    """

    def __init__(self, kept: Kept, x: torch.Tensor) -> None:
        total = x.shape[1]
        if total < kept.tokens:
            raise ValueError(
                f"the mask has {kept.tokens} tokens and the model {total}: give a mask, or a shape, of the latents' size"
            )
        index = kept.index.to(x.device)
        rest = torch.arange(kept.tokens, total, device=x.device).expand(len(index), -1)
        self.kept, self.index = kept, torch.cat([index, rest], 1)
        self.dropped = kept.tokens - kept.index.shape[1]
        self._seen: dict[str, tuple[Any, Any]] = {}

    def take(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The kept tokens of x, (B, tokens, ...) or with the tokens in another dimension where a batch shares them."""
        index = self.index
        x = x.to(index.device)
        if len(index) == 1:
            return x.index_select(dim, index[0])
        x = x.expand(len(index), *x.shape[1:]) if x.shape[0] == 1 else x
        return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:]))

    def put(self, full: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`full` with x in place of its kept tokens, in the dtype of x."""
        return full.to(x.dtype).scatter(1, self.index.unsqueeze(-1).expand_as(x), x)

    def once(self, name: str, value: Any, cut: Callable[[Any], Any]) -> Any:
        """cut(value), made for the first of the blocks that are all given the same value."""
        if name not in self._seen or self._seen[name][0] is not value:
            self._seen[name] = value, cut(value)
        return self._seen[name][1]


class Lane(NamedTuple):
    """Blocks of one kind, one after the other.

    Attributes:
        blocks: in the order in which they run.
        names: their parameters, in the order in which they take them.
        hidden: the parameter that holds the tokens of the latents first, (B, tokens, channels).
        output: where these are in what a block returns; None: they are all that it returns.
        shorten: cuts the other parameters, in place.
    """

    blocks: Sequence[Any]
    names: tuple[str, ...]
    hidden: str
    output: int | None
    shorten: Callable[[dict[str, Any], Cut], None]


class Layout(NamedTuple):
    """How the tokens of a model run through it.

    Attributes:
        lanes: in the order in which they run.
        patch: positions of one token, (frames, height, width).
        shared: whether the samples of a batch share their rotary embedding, and so must share the kept tokens.
        width: channels of a token.
    """

    lanes: tuple[Lane, ...]
    patch: tuple[int, int, int]
    shared: bool
    width: int

    def routed_blocks(self, blocks: tuple[int, int] | None) -> tuple[int, int]:
        """The first and the last routed block, counted over all lanes. By default all but two at either end; in small models all
        but one, or all.

        Raises:
            ValueError: where the model has no such blocks.
        """
        count = sum(len(lane.blocks) for lane in self.lanes)
        margin = 2 if count >= 12 else int(count >= 3)
        first, last = (margin, count - 1 - margin) if blocks is None else blocks
        if not 0 <= first <= last < count:
            raise ValueError(f"blocks {first}-{last} cannot be routed: the model has blocks 0 to {count - 1}")
        return first, last

    def saved(self, kept: Kept, blocks: tuple[int, int] | None) -> float:
        """About which share of the model's computation is saved, text left out: a block costs tokens x (6 width + tokens)."""
        first, last = self.routed_blocks(blocks)
        some, every, width = kept.index.shape[1], kept.tokens, self.width
        per_block = 1 - some * (6 * width + some) / (every * (6 * width + every))
        return per_block * (last - first + 1) / sum(len(lane.blocks) for lane in self.lanes)


class _Run:
    """One lane while it is routed: what passes by, between its first and its last block."""

    def __init__(self, lane: Lane, kept: Kept) -> None:
        self.lane, self.kept = lane, kept
        self.full: torch.Tensor | None = None
        self.cut: Cut | None = None
        self.paused = False

    def enter(
        self, opens: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a block, cut to the kept tokens."""
        lane = self.lane
        named = {**dict(zip(lane.names, args, strict=False)), **kwargs}
        if opens:
            self.full = named[lane.hidden]
            self.cut = Cut(self.kept, self.full)
            named[lane.hidden] = self.cut.take(self.full)
        assert self.cut is not None
        lane.shorten(named, self.cut)
        given = tuple(named[name] for name in lane.names[: len(args)]) + args[len(lane.names) :]
        return given, {name: named[name] for name in kwargs}

    def leave(self, output: Any) -> Any:
        """What the last block returns, with all tokens."""
        assert self.cut is not None
        assert self.full is not None
        place, cut, full = self.lane.output, self.cut, self.full
        self.cut = self.full = None
        if place is None:
            return cut.put(full, output)
        return (*output[:place], cut.put(full, output[place]), *output[place + 1 :])

    def before(self, opens: bool, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return None if self.paused else self.enter(opens, args, kwargs)

    def after(self, block: Any, args: tuple[Any, ...], output: Any) -> Any:
        return None if self.paused else self.leave(output)

    def within_checkpoint(self, block: Any) -> Callable[..., Any]:
        """The block for a checkpoint whose arguments are cut already, when it runs and when it runs again in the backward."""

        def run(*args: Any, **kwargs: Any) -> Any:
            before, self.paused = self.paused, True
            try:
                return block(*args, **kwargs)
            finally:
                self.paused = before

        return run


@contextlib.contextmanager
def rerouted(model: Any, layout: Layout, kept: Kept, blocks: tuple[int, int] | None = None) -> Iterator[None]:
    """Makes forward passes of the model compute only the kept tokens in the routed blocks while a `with` block runs.

    A backward pass may come later, also with gradient checkpointing.

    Args:
        blocks: the first and the last routed block, see `Layout.routed_blocks`.

    Raises:
        ValueError: for a model that torch.compile holds as a whole, or blocks compiled in place.
    """
    first, last = layout.routed_blocks(blocks)
    places: dict[int, tuple[_Run, bool, bool]] = {}
    with contextlib.ExitStack() as stack:
        start = 0
        for lane in layout.lanes:
            numbers = range(max(first, start), min(last + 1, start + len(lane.blocks)))
            run = _Run(lane, kept)
            for number in numbers:
                block = lane.blocks[number - start]
                _refuse_compiled(block)
                opens, closes = number == numbers[0], number == numbers[-1]
                places[id(block)] = run, opens, closes
                hook = functools.partial(run.before, opens)
                stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
                if closes:
                    stack.callback(block.register_forward_hook(run.after).remove)
            start += len(lane.blocks)
        if hasattr(model, "_gradient_checkpointing_func"):
            # It would checkpoint a block together with its hooks, and run them again in the backward, when they are gone.
            function = _around_checkpoint(model._gradient_checkpointing_func, places)
            stack.enter_context(mock.patch.object(model, "_gradient_checkpointing_func", function))
        yield


def _around_checkpoint(
    checkpoint: Callable[..., Any], places: dict[int, tuple[_Run, bool, bool]]
) -> Callable[..., Any]:
    def checkpoint_routed(block: Any, *args: Any, **kwargs: Any) -> Any:
        if id(block) not in places:
            return checkpoint(block, *args, **kwargs)
        run, opens, closes = places[id(block)]
        args, kwargs = run.enter(opens, args, kwargs)
        output = checkpoint(run.within_checkpoint(block), *args, **kwargs)
        return run.leave(output) if closes else output

    return checkpoint_routed


def _refuse_compiled(block: Any) -> None:
    if getattr(block, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "a block compiled in place (block.compile(), compile_repeated_blocks()) would be compiled anew at every step: put "
            "torch.compile(block) in its place, or do not route"
        )
