"""Commands in processes of their own, started at once: one parent imports everything and forks a child for each.

`python -m tests.cache.nursery` reads JSON lines: {"run": argv, "log": file} answers with a process number, {"kill": number}
ends one with SIGKILL, {"wait": number} answers with its exit status, None where it was killed.

The trainer is a stand-in with the trainer's names: a module `musubi_tuner.wan_cache_latents` that writes the latents of
every picture, in the trainer's format, as version N (`--version N`), so that a test can see whose file is there. `--in_place`
writes as older versions of safetensors did, into the file itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from masked_loss_triton.cli import main
from tests.cache.support import Lab, disc

SIZE = (160, 120)


def latents_of(stem: str, version: int) -> torch.Tensor:
    """The (16, 1, 14, 18) latents of a picture of SIZE, bfloat16: others for each stem and version."""
    generator = torch.Generator().manual_seed(1000 * version + sum(stem.encode()))
    return torch.randn(16, 1, 14, 18, generator=generator).bfloat16()


def write_latents(item: Any, version: int, in_place: bool) -> None:
    """One cache, in place of an older one."""
    path = Path(item.latent_cache_path)
    tensors = {"latents_1x14x18_bfloat16": latents_of(item.stem, version), "filler_float32": torch.zeros(9999)}
    metadata = {"architecture": "wan", "width": str(SIZE[0]), "height": str(SIZE[1]), "format_version": "1.0.1"}
    data = save(tensors, metadata)
    if in_place:
        path.write_bytes(data)
        return
    temporary = path.with_name(f".tmp{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def cache_latents() -> None:
    """The main function of the trainer's script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset_config")
    parser.add_argument("--version", type=int)
    parser.add_argument("--in_place", action="store_true")
    args = parser.parse_args()
    entry = json.loads(Path(args.dataset_config).read_text())["datasets"][0]
    for picture in sorted(Path(entry["image_directory"]).glob("*.png")):
        name = f"{picture.stem}_{SIZE[0]:04d}x{SIZE[1]:04d}_wan.safetensors"
        item = types.SimpleNamespace(stem=picture.stem, latent_cache_path=Path(entry["cache_directory"]) / name)
        sys.modules["musubi_tuner.dataset.cache_io"].save_latent_cache_common(item, args.version, args.in_place)


def install_trainer() -> None:
    for name in (
        "musubi_tuner",
        "musubi_tuner.dataset",
        "musubi_tuner.dataset.cache_io",
        "musubi_tuner.wan_cache_latents",
    ):
        sys.modules[name] = types.ModuleType(name)
    vars(sys.modules["musubi_tuner.dataset.cache_io"])["save_latent_cache_common"] = write_latents
    vars(sys.modules["musubi_tuner.wan_cache_latents"])["main"] = cache_latents


def child(argv: list[str], log: str) -> int:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if argv[0] == "trainer":
        sys.argv = argv
        cache_latents()
        return 0
    return main(argv)


class Nursery:
    """The parent, started in front of which `before` may stand: a command that puts it into another namespace."""

    def __init__(self, before: list[str]) -> None:
        command = [*before, sys.executable, "-m", "tests.cache.nursery"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def ask(self, **message: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        return json.loads(self.process.stdout.readline())

    def close(self) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait()


def warm_up(folder: Path) -> None:
    """Runs each command once, so that what it imports is there for all children."""
    lab = Lab(folder)
    lab.picture("a", SIZE, disc(SIZE))
    lab.add_cache("a", SIZE)
    main(["generate", "--images", str(lab.images), "--masks", str(folder / "out"), "--backend", "grabcut"])
    lab.run("cache", "--masks", lab.masks)


def serve() -> None:
    install_trainer()
    # What a first command imports, its children have already.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        warm_up(Path(folder))
    statuses: dict[int, int] = {}
    for line in sys.stdin:
        message = json.loads(line)
        answer: Any = None
        if "run" in message:
            answer = os.fork()
            if answer == 0:
                status = 99
                try:
                    status = child(message["run"], message["log"])
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    os._exit(status)
        elif "kill" in message:
            os.kill(message["kill"], signal.SIGKILL)
        else:
            _, statuses[message["wait"]] = os.waitpid(message["wait"], 0)
            status = statuses[message["wait"]]
            answer = None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
