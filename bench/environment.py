"""What every saved row says about where it came from: device, versions, commit."""

from __future__ import annotations

import datetime
import pathlib
import platform
import re
import subprocess
from importlib import metadata

import torch

ROOT = pathlib.Path(__file__).parent.parent


def environment() -> dict[str, str]:
    return {
        "device": device_name(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    information = pathlib.Path("/proc/cpuinfo")
    if information.exists() and (found := re.search(r"model name\s*:\s*(.+)", information.read_text())):
        model = found[1]
    return f"{re.sub(r'[(](R|TM|C)[)]', '', model).strip()}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The commit that was measured; "+" behind it when the code of the loss or the bench differed from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        return finished.stdout.strip() if finished.returncode == 0 else ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "kernels", "masked_loss_triton", "bench/*.py")
    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + ("+" if changed else "")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
