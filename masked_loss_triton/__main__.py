import sys

from masked_loss_triton.cli import main

sys.exit(main())
