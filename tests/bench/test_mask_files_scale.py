"""What check and cache do for each item does not grow with the number of items: counted, as no time is the same twice."""

from __future__ import annotations

import pytest

from bench.mask_files_scale import STEPS, Cost, counted, make_dataset, measure
from masked_loss_triton.cache.dataset import load_datasets
from masked_loss_triton.cache.families import FAMILIES
from masked_loss_triton.cache.inject import prepare
from masked_loss_triton.cache.problems import check_lists


def grows(sizes: tuple[int, int, int], costs: list[Cost]) -> float:
    """Calls for each item between the second and third size over those between the first and second: 3 if quadratic."""
    few, more, many = (cost.calls for cost in costs)
    return (many - more) / (sizes[2] - sizes[1]) / ((more - few) / (sizes[1] - sizes[0]))


def folders(tmp_path, sizes):
    for size in sizes:
        (tmp_path / str(size)).mkdir()
        yield tmp_path / str(size)


def test_the_commands(tmp_path):
    sizes = (8, 24, 72)
    costs = [measure(folder, size) for folder, size in zip(folders(tmp_path, (2, *sizes)), (2, *sizes), strict=True)][
        1:
    ]
    for step in STEPS:
        assert grows(sizes, [cost[step] for cost in costs]) < 1.15
        opened = [(cost[step].opened, size) for cost, size in zip(costs, sizes, strict=True)]
        assert opened[2][0] - opened[1][0] <= 8 * (opened[2][1] - opened[1][1])


@pytest.mark.parametrize("layers", [1, 3])
def test_listing_pictures_masks_and_caches(tmp_path, layers):
    sizes, costs = (50, 150, 450), []
    for folder, size in zip(folders(tmp_path, (2, *sizes)), (2, *sizes), strict=True):
        config = make_dataset(folder, size, layers)
        with counted() as cost:
            prepared = prepare(load_datasets(config)[0], FAMILIES["wan"])
            assert check_lists(prepared) == []
        assert len(prepared.sources) == len(prepared.items) == size
        costs.append(cost)
    assert grows(sizes, costs[1:]) < 1.05
