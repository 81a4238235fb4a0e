"""Importing is light, and nothing but the kernels needs Triton: shown in fresh processes."""

import subprocess
import sys

import pytest

OPTIONAL = ("triton", "cv2", "PIL", "diffusers", "transformers", "peft", "sklearn", "skimage", "matplotlib", "av")


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_pulls_in_nothing_optional():
    """torch itself may bring modules: only what we add counts."""
    new = python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import masked_loss_triton, masked_loss_triton.cli\n"
        f"print(*(sorted(set({OPTIONAL!r}) & (set(sys.modules) - before))))"
    )
    assert new.split() == []


def test_every_public_name_is_there_and_a_wrong_one_is_not():
    import masked_loss_triton

    for name in masked_loss_triton.__all__:
        assert getattr(masked_loss_triton, name).__name__ == name
        assert name in dir(masked_loss_triton)
    with pytest.raises(AttributeError, match="no attribute 'mask_loss'"):
        _ = masked_loss_triton.mask_loss


def test_help_imports_nothing_heavy():
    new = python(
        "import sys\n"
        "from masked_loss_triton.cli import build_parser\n"
        "build_parser().format_help()\n"
        f"print(*(sorted({{'torch', *{OPTIONAL!r}}} & set(sys.modules))))"
    )
    assert new.split() == []


def test_the_loss_works_where_triton_does_not_exist():
    out = python(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'triton':\n"
        "            raise ModuleNotFoundError(name='triton')\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import importlib.util\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'triton' else real(name, *a)\n"
        "import torch\n"
        "from masked_loss_triton import masked_loss\n"
        "pred = torch.ones(1, 4, 1, 8, 8, requires_grad=True)\n"
        "masked_loss(pred, torch.zeros(1, 4, 1, 8, 8), torch.ones(1, 64, 64)).backward()\n"
        "try:\n"
        "    masked_loss(pred, pred.detach(), None, backend='triton')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "assert 'triton' not in sys.modules\n"
    )
    assert "the package triton is not installed; use backend='torch'" in out
