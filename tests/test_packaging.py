"""What is installed: one import root, every sub-package, from wheel, sdist and editable checkout alike."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Builds from a copy of what git knows, as a release would; without isolation, so without a download."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    archive = subprocess.run(
        ["tar", "-c", "--null", "-T", "-", "-f", "-"], cwd=ROOT, input=listed, capture_output=True, check=True
    )
    subprocess.run(["tar", "-x", "-f", "-"], cwd=source, input=archive.stdout, check=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def packages_on_disk() -> set[str]:
    folders = {
        path.parent for room in ("masked_loss_triton", "kernels", "integration") for path in (ROOT / room).rglob("*.py")
    }
    names = set()
    for folder in folders:
        parts = folder.relative_to(ROOT).parts
        if parts[0] == "masked_loss_triton" and len(parts) > 1 and parts[1] in ("kernels", "integration"):
            continue  # the link; its target is listed by itself
        names.add("/".join(parts if parts[0] == "masked_loss_triton" else ("masked_loss_triton", *parts)))
    return names


def test_the_wheel_has_every_package_and_one_root(built):
    names = zipfile.ZipFile(built[0]).namelist()
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"masked_loss_triton"}
    assert {name.rsplit("/", 1)[0] for name in names if name.endswith(".py")} == packages_on_disk()
    assert "masked_loss_triton/py.typed" in names


def test_the_sdist_builds_the_same_wheel(built, tmp_path):
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    source = next(tmp_path.iterdir())
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path / "out"),
        str(source),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    again = next((tmp_path / "out").glob("*.whl"))
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(built[0]).namelist())


def test_the_wheel_works_from_elsewhere(built, tmp_path):
    """Unpacked into a folder of its own and imported from there, away from the checkout."""
    zipfile.ZipFile(built[0]).extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, 'site'); sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "import masked_loss_triton, masked_loss_triton.backend.layout, masked_loss_triton.backend.closed_form, torch\n"
        "assert 'site' in masked_loss_triton.__file__, masked_loss_triton.__file__\n"
        "from masked_loss_triton.cli import build_parser; build_parser()\n"
        "print(float(masked_loss_triton.masked_loss(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), None)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "1.0"


def test_no_module_called_kernels_can_be_imported_by_accident():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "integration" / "__init__.py").exists()
