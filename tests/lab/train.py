"""Runs a real trainer of a musubi-tuner checkout on a CPU, with a tiny random model and a LoRA.

    MUSUBI_REPO=/path/to/musubi-tuner python -m tests.lab.train wan --steps 4 --masks [the trainer's flags and ours]

--masks starts it by `masked-loss train`; without, the trainer's own main runs. --hooks names functions of hooks.py, called before
that. Prints the loss of each step, as the trainer's own recorder gets it, and a hash of the LoRA.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import logging
import sys
from pathlib import Path

from tests.lab import fixture as lab

SAMPLES = ("--optimizer_type", "adamw", "--learning_rate", "1e-3", "--seed", "42", "--sdpa")


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("family", choices=lab.FAMILIES)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--masks", action="store_true", help="start it by `masked-loss train`")
    parser.add_argument("--fixture", type=Path, help="default: the one in the user's cache folder, made where missing")
    parser.add_argument(
        "--toml", type=Path, help="dataset file; default: all of the fixture, without masks in its caches"
    )
    parser.add_argument("--batch_size", type=int, default=1, help="of the default dataset file")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="fp32: WAN only")
    parser.add_argument("--out", type=Path, default=Path("lab_out/lora.safetensors"))
    parser.add_argument("--hooks", default="")
    parser.add_argument("--script", default="", help="a script of the family that trains the whole model")
    return parser.parse_known_args(arguments)


def trainer_flags(args: argparse.Namespace) -> list[str]:
    """Flags of a usual run; those that the user adds come later and win."""
    family = lab.FAMILIES[args.family]
    toml = args.toml
    if toml is None:
        caches = args.fixture / "cache" / args.family
        toml = args.out.parent / f"{args.family}.toml"
        if not caches.exists():
            lab.ensure_family(args.fixture, args.family)
        lab.write_toml(toml, args.fixture, caches, family.kinds, args.batch_size, keys=family.keys)
    flags = ["--dataset_config", toml, "--dit", lab.weights(args.fixture, args.family, "dit", args.precision)]
    flags += ["--max_train_steps", args.steps, "--output_dir", args.out.parent, "--output_name", args.out.stem]
    flags += ["--mixed_precision", "bf16" if args.precision == "bf16" else "no", "--max_data_loader_n_workers", 0]
    network = () if args.script else ("--network_module", family.network, "--network_dim", "4")
    return [*map(str, flags), *network, *SAMPLES, *family.flags]


def record_losses(losses: list[float]) -> None:
    """Keeps what the trainer itself records: code under test may replace the loss and everything around it."""
    from musubi_tuner.utils.train_utils import LossRecorder

    add = LossRecorder.add

    def add_and_keep(self, *, epoch: int, step: int, loss: float) -> None:
        losses.append(loss)
        print(f"step {len(losses)}: loss {loss:.9f}", flush=True)
        add(self, epoch=epoch, step=step, loss=loss)

    LossRecorder.add = add_and_keep


def lora_hash(path: Path) -> str:
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for name, value in sorted(load_file(path).items()):
        digest.update(name.encode() + value.float().numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    args, rest = parse()
    args.fixture = args.fixture or lab.ensure_fixture()
    args.out = args.out.absolute()
    args.out.unlink(missing_ok=True)
    lab.trainer_path()
    logging.basicConfig(level=logging.WARNING)  # before the trainer does
    losses: list[float] = []
    record_losses(losses)
    script = args.script or lab.FAMILIES[args.family].script
    module = importlib.import_module(f"musubi_tuner.{script}")
    hooks = importlib.import_module("tests.lab.hooks")
    for name in filter(None, args.hooks.split(",")):
        getattr(hooks, name)()
    flags = [*trainer_flags(args), *rest]
    if args.masks:
        from masked_loss_triton.cli import main as masked_loss

        word = args.script or lab.FAMILIES[args.family].arch or args.family
        if status := masked_loss(["train", word, *flags]):
            sys.exit(status)
    else:
        sys.argv = [f"{script}.py", *flags]
        module.main()
    record = {"losses": losses}
    if args.out.exists():
        record["lora_sha256"] = lora_hash(args.out)
        print("LoRA", record["lora_sha256"])
    args.out.with_suffix(".json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
