"""One process of a training over several: `python -m torch.distributed.run ... -m tests.integration.musubi.one_rank`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.integration.musubi.small_trainer import MethodTrainer, arguments, by_item, masked_class


def main() -> None:
    family, cache, toml, out, *flags = sys.argv[1:]
    trainer = masked_class(MethodTrainer)(family, Path(cache))
    trainer.train(arguments(Path(toml), *flags, batch_size=1, max_train_steps=2, **by_item()))
    rank = torch.distributed.get_rank()
    torch.save(trainer.gradients, f"{out}.{rank}")
    Path(f"{out}.{rank}.json").write_text(json.dumps([trainer.masked.masked, trainer.masked.step]))
    # On a busy machine the end of the interpreter met threads of a group that was still open, and aborted.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
