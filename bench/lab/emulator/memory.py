"""The memory of an emulated kernel: its tensors, and what each access asks of them."""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
import torch

SECTOR = 32  # bytes


class OutOfBounds(RuntimeError):
    """An access outside the tensors, before it happens."""


@dataclasses.dataclass
class Traffic:
    """Of one tensor in one launch, in bytes; `sectors` are those that each instruction of a wave touches, summed."""

    loaded: int = 0
    stored: int = 0
    sectors: int = 0
    distinct: int = 0  # asked for at least once

    def __add__(self, other: Traffic) -> Traffic:
        """The traffic of two launches."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Traffic(*(mine + others for mine, others in pairs))

    @property
    def fullness(self) -> float:
        """Bytes asked for over bytes of the sectors that were moved for them."""
        return (self.loaded + self.stored) / max(1, SECTOR * self.sectors)


class Memory:
    """The tensors of one launch by name."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.names = list(tensors)
        storages = [tensor.untyped_storage() for tensor in tensors.values()]
        self.starts = [storage.data_ptr() for storage in storages]
        self.views = [
            np.frombuffer((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()), np.uint8)
            for storage in storages
        ]
        self._touched = [np.zeros(len(view), np.bool_) for view in self.views]
        self._traffic = [Traffic() for _ in self.names]

    def traffic(self) -> dict[str, Traffic]:
        """The traffic of each tensor that was touched."""
        for traffic, touched in zip(self._traffic, self._touched, strict=True):
            traffic.distinct = int(touched.sum())
        named = zip(self.names, self._traffic, strict=True)
        return {name: traffic for name, traffic in named if traffic.distinct}

    def owners(self, addresses: np.ndarray, width: int, place: str) -> np.ndarray:
        """The index of the tensor of each address.

        Raises:
            OutOfBounds: when an access of `width` bytes at one of them leaves all tensors.
        """
        owners = np.full(len(addresses), -1)
        for index, (start, view) in enumerate(zip(self.starts, self.views, strict=True)):
            owners[(addresses >= start) & (addresses + width <= start + len(view))] = index
        if (owners < 0).any():
            address = int(addresses[int(np.argmin(owners))])
            nearest = min(range(len(self.names)), key=lambda index: abs(address - self.starts[index]), default=None)
            where = "there are none"
            if nearest is not None:
                size = len(self.views[nearest])
                where = f"the nearest is {self.names[nearest]}, at byte {address - self.starts[nearest]} of its {size}"
            lanes = f"{int((owners < 0).sum())} of {len(addresses)} active lanes"
            raise OutOfBounds(f"{width} bytes wide, {lanes} outside the tensors ({where}); {place}")
        return owners

    def record(self, addresses: np.ndarray, width: int, is_store: bool, place: str) -> np.ndarray:
        """Counts one access of a wave; returns the owners of its addresses."""
        owners = self.owners(addresses, width, place)
        for index in np.unique(owners):
            at = addresses[owners == index]
            traffic, offsets = self._traffic[index], at - self.starts[index]
            traffic.sectors += len(np.unique(np.concatenate([at // SECTOR, (at + width - 1) // SECTOR])))
            if is_store:
                traffic.stored += width * len(at)
            else:
                traffic.loaded += width * len(at)
            self._touched[index][offsets[:, None] + np.arange(width)] = True
        return owners

    def load(self, addresses: np.ndarray, width: int, owners: np.ndarray) -> np.ndarray:
        """The (lanes, width) bytes at these addresses."""
        values = np.zeros((len(addresses), width), np.uint8)
        for index in np.unique(owners):
            mine = owners == index
            values[mine] = self.views[index][(addresses[mine] - self.starts[index])[:, None] + np.arange(width)]
        return values

    def store(self, addresses: np.ndarray, values: np.ndarray, owners: np.ndarray) -> None:
        """Writes (lanes, width) bytes; a later lane wins where two write the same place."""
        for index in np.unique(owners):
            mine, width = owners == index, values.shape[1]
            self.views[index][(addresses[mine] - self.starts[index])[:, None] + np.arange(width)] = values[mine]
