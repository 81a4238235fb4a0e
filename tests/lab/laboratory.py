"""Runs of the real trainers for tests: caches with masks, training in a process of its own, and what came out of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.lab.fixture import CORE, FAMILIES, ROOT, ensure_family, write_toml


class Run:
    """One training run: its exit status, what it printed, its losses, the hash, the tensors and the metadata of its LoRA."""

    def __init__(self, process: subprocess.CompletedProcess, lora_file: Path) -> None:
        self.status, self.output = process.returncode, process.stdout + process.stderr
        self.lora_file = lora_file
        record = lora_file.with_suffix(".json")
        self.record = json.loads(record.read_text()) if record.exists() else {}

    @property
    def losses(self) -> list[float]:
        assert "losses" in self.record, self.output[-3000:]
        return self.record["losses"]

    @property
    def lora(self) -> str:
        assert "lora_sha256" in self.record, self.output[-3000:]
        return self.record["lora_sha256"]

    def tensors(self) -> dict[str, torch.Tensor]:
        assert self.lora_file.exists(), self.output[-3000:]
        return load_file(self.lora_file)

    def metadata(self) -> dict[str, str]:
        with safe_open(self.lora_file, "pt") as file:
            return file.metadata()


class Laboratory:
    """Trains on copies of the fixture's caches.

    Args:
        folder: for everything that is written.
        fixture: from `ensure_fixture`.
    """

    def __init__(self, folder: Path, fixture: Path) -> None:
        self.folder, self.fixture = folder, fixture
        self.caches: dict[tuple[str, str, tuple[str, ...]], Path] = {}

    def cache(self, family: str, masks: str, stems: tuple[str, ...] = ()) -> Path:
        """A copy of the family's caches, made once.

        Args:
            masks: "masks" or "masks_white", written into them by `masked-loss cache`; "" for none.
            stems: keeps only these pictures.
        """
        key = (family, masks, stems)
        if key in self.caches:
            return self.caches[key]
        root = self.folder / "-".join((family, masks, *stems))
        names = FAMILIES[family]
        ensure_family(self.fixture, family)
        shutil.copytree(self.fixture / "cache" / family, root)
        images = self.fixture / "images"
        if stems:
            shutil.rmtree(root / "video", ignore_errors=True)
            images = root / "pictures"
            images.mkdir()
            for stem in stems:
                for end in (".png", ".txt"):
                    shutil.copy(self.fixture / "images" / f"{stem}{end}", images)
            for path in (root / "image").iterdir():
                if path.name.split("_")[0] not in stems:
                    path.unlink()
        if masks:
            folders = [masks] if masks == "masks_white" else [masks, "video_masks"]
            folders = folders[-1:] if names.kinds == ("video",) else folders
            toml = root / "masks.toml"
            write_toml(toml, self.fixture, root, self.kinds(root), masks=folders, images=images, keys=names.keys)
            arch = names.arch or family
            command = [sys.executable, "-m", "masked_loss_triton", "cache", "--dataset_config", toml, "--arch", arch]
            subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True)
        self.caches[key] = root
        return root

    @staticmethod
    def kinds(root: Path) -> list[str]:
        return [kind for kind in ("image", "video") if (root / kind).exists()]

    def train(
        self,
        family: str,
        root: Path,
        *flags: str,
        steps: int = 4,
        masks: bool = True,
        hooks: Sequence[str] = (),
        batch_size: int = 2,
        name: str = "lora",
        processes: int = 1,
        precision: str = "bf16",
        **environment: str,
    ) -> Run:
        """Trains on caches of `cache`; by `masked-loss train`, or, without `masks`, by the trainer's own main.

        Args:
            flags: the trainer's and ours.
            name: of the LoRA file; an older one of that name is replaced.
            processes: by torch.distributed.run where it is more than one.
        """
        lora = self.folder / "out" / f"{name}.safetensors"
        for old in (lora, lora.with_suffix(".json")):
            old.unlink(missing_ok=True)
        images = root / "pictures" if (root / "pictures").exists() else None
        toml, keys = root / f"train_{batch_size}.toml", FAMILIES[family].keys
        write_toml(toml, self.fixture, root, self.kinds(root), batch_size, images=images, keys=keys)
        python = [sys.executable, "-m"]
        if processes > 1:
            python += ["torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "29517", "-m"]
            environment["ACCELERATE_USE_CPU"] = "true"
        command = [*python, "tests.lab.train", family, "--steps", str(steps), "--fixture", str(self.fixture)]
        command += ["--toml", str(toml), "--out", str(lora), "--precision", precision, "--hooks", ",".join(hooks)]
        command += (["--masks"] if masks else []) + [*flags]
        given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        process = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=300)
        return Run(process, lora)


def network_module(family: str) -> str:
    """Our network module, for --network_module, that stands for the trainer's LoRA of the family."""
    return f"masked_loss_triton.integration.musubi.lora{f'_{family}' if family in CORE else ''}"
