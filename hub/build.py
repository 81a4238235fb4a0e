"""`make hub`: the loss as a kernel of the Hugging Face hub, and a try of it with `kernels.get_local_kernel`.

    python hub/build.py FOLDER

Writes FOLDER/build/VARIANT for torch on CUDA, ROCm and the CPU: the core and the kernels alone, every import relative, the
operators under a name of their own, so that two versions, or the package beside them, live in one process. Then loads the variant
of this machine in a process in which `import masked_loss_triton` fails, and compares its loss with the formula.
"""

from __future__ import annotations

import base64
import hashlib
import json
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
VARIANTS: dict[str, dict[str, object]] = {
    "torch-cuda": {"type": "cuda", "archs": ["8.0", "9.0", "10.0", "12.0"]},
    "torch-rocm": {"type": "rocm", "archs": ["gfx942"]},
    "torch-cpu": {"type": "cpu"},
}
CORE = ("__init__", "call", "checks", "config", "errors", "layouts", "loss", "stats")
TRY = """
import pathlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "masked_loss_triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import kernels, torch
kernel = kernels.get_local_kernel(pathlib.Path(sys.argv[1]))
pred, target = (torch.randn(2, 4, 3, 5, 6) for _ in range(2))
pred.requires_grad_()
mask = torch.rand(2, 3, 5, 6)
loss = kernel.masked_loss(pred, target, mask)
loss.backward()
weight = mask[:, None].expand_as(pred)
torch.testing.assert_close(loss, (weight * (pred - target) ** 2).sum() / weight.sum())
torch.testing.assert_close(pred.grad, 2 * weight * (pred - target) / weight.sum())
print("loaded without the package: loss", loss.item())
"""


def sources() -> dict[str, str]:
    """The text of each file by its place in the kernel, imports relative."""
    package = ROOT / "masked_loss_triton"
    files = {f"{name}.py": (package / f"{name}.py").read_text() for name in CORE}
    for folder, where in (("backend", package / "backend"), ("kernels", ROOT / "kernels")):
        files |= {f"{folder}/{path.name}": path.read_text() for path in sorted(where.glob("*.py"))}
    files.setdefault("kernels/__init__.py", "")
    relative = {name: _relative(name, text) for name, text in files.items()}
    digest = hashlib.sha256(json.dumps(relative, sort_keys=True).encode()).hexdigest()[:10]
    operators = f"masked_loss_triton_{digest}"
    return {
        name: text.replace("masked_loss_triton::", f"{operators}::").replace(
            "torch.ops.masked_loss_triton", f"torch.ops.{operators}"
        )
        for name, text in relative.items()
    }


def _relative(name: str, text: str) -> str:
    dots = "." * (name.count("/") + 1)
    text = re.sub(r"from masked_loss_triton\.", f"from {dots}", text)
    return re.sub(r"from masked_loss_triton import", f"from {dots} import", text)


def write(folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes every variant, in place of an earlier one, and returns their folders."""
    files = sources()
    digest = {name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in files.items()}
    version = re.search(r'^version = "(\d+)', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    written = []
    for variant, backend in VARIANTS.items():
        place = folder / "build" / variant
        shutil.rmtree(place, ignore_errors=True)
        for name, text in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text)
        unique = hashlib.sha256(json.dumps(digest).encode()).hexdigest()[:10]
        about = {
            "name": "masked-loss-triton",
            "id": f"_masked_loss_triton_{backend['type']}_{unique}",
            "version": int(version[1]),
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": backend,
            "digest": {"algorithm": "sha256", "files": digest},
        }
        (place / "metadata.json").write_text(json.dumps(about, indent=1) + "\n")
        written.append(place)
    return written


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    folder = pathlib.Path(sys.argv[1]).resolve()
    for place in write(folder):
        print(f"written: {place}")
    return subprocess.run([sys.executable, "-c", TRY, str(folder)], cwd=folder, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
