"""`accelerate launch -m masked_loss_triton.integration.musubi wan ...`: `masked-loss train`, on several GPUs."""

import sys

from masked_loss_triton.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
