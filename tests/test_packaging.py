"""What is installed: one import root, every sub-package, from wheel, sdist, editable checkout, with and without symbolic links."""

import email
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*command, **options) -> str:
    """What a command prints; PYTHONPATH may name this checkout and is left out."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = list(map(str, command))
    result = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what git knows, as a release would have it."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout made by git")
    folder = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    archive = subprocess.run(
        ["tar", "-c", "--null", "-T", "-", "-f", "-"], cwd=ROOT, input=listed, capture_output=True, check=True
    )
    subprocess.run(["tar", "-x", "-f", "-"], cwd=folder, input=archive.stdout, check=True)
    return folder


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """Wheel and sdist; without isolation, so without a download."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.fixture
def python(tmp_path):
    """The Python of an environment that has every package of this one, but not this project."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    site = next((tmp_path / "venv" / "lib").glob("python3*")) / "site-packages"
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return tmp_path / "venv" / "bin" / "python"


@pytest.fixture
def sdist(built, tmp_path):
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path / "sdist", filter="data")
    return next((tmp_path / "sdist").iterdir())


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
    page = {path.name for path in (ROOT / "masked_loss_triton/edit/static").iterdir()}
    assert {f"masked_loss_triton/edit/static/{name}" for name in page} <= set(names)


def test_no_dependency_replaces_a_trainers_torch(built):
    wheel = zipfile.ZipFile(built[0])
    metadata = email.message_from_bytes(wheel.read(next(n for n in wheel.namelist() if n.endswith("/METADATA"))))
    core = {
        one.name: one for one in map(Requirement, metadata.get_all("Requires-Dist")) if "extra" not in str(one.marker)
    }
    assert sorted(core) == ["numpy", "opencv-python", "pillow", "safetensors", "torch"]
    assert all(core["torch"].specifier.contains(version) for version in ("2.5.1", "2.5.1+cu124", "2.11.0"))
    assert not any(core[name].specifier for name in core if name != "torch")


def test_the_sdist_builds_the_same_wheel(built, sdist, tmp_path):
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "out", sdist)
    again = next((tmp_path / "out").glob("*.whl"))
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(built[0]).namelist())


def test_the_sdist_has_the_tests_and_they_run(sdist, python):
    inside = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    links = {"masked_loss_triton/kernels", "masked_loss_triton/integration"}
    wanted = set(run("git", "ls-files", cwd=ROOT).split()) - links - {".gitignore"}
    assert {name for name in wanted - inside if not name.startswith("bench/results/")} == set()
    assert " passed" in run(python, "-m", "pytest", "tests/test_config.py", "tests/test_bad_input.py", cwd=sdist)


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


@pytest.mark.parametrize("way", ["from its root", "installed", "editable"])
def test_a_checkout_without_symbolic_links_works(source, python, tmp_path, way):
    """As on Windows, or in a zip of a forge: a link is a file that holds its target's name."""
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    run("cp", "-r", source, origin)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com", "-C", origin]
    run(*git, "init", "--quiet")
    run(*git, "add", "--all", "--force")
    run(*git, "commit", "--quiet", "--message", "x")
    run("git", "-c", "core.symlinks=false", "clone", "--quiet", origin, clone)
    assert (clone / "masked_loss_triton" / "kernels").is_file()
    if way != "from its root":
        editable = ["--editable"] if way == "editable" else []
        run(
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "--no-deps",
            "--no-build-isolation",
            *editable,
            clone,
        )
    code = (
        "import masked_loss_triton.integration.musubi.options as options, importlib.util\n"
        "print(options.__file__, importlib.util.find_spec('masked_loss_triton.kernels.loss').origin, sep='\\n')"
    )
    place = clone if way == "from its root" else tmp_path
    files = run(python, "-c", code, cwd=place).split()
    home = tmp_path / "venv" if way == "installed" else clone
    assert [Path(file).is_relative_to(home) for file in files] == [True, True]
    assert "usage: masked-loss" in run(python, "-m", "masked_loss_triton", "train", "--help", cwd=place)


def test_no_module_called_kernels_can_be_imported_by_accident():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "integration" / "__init__.py").exists()
