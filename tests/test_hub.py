"""The kernel for the Hugging Face hub: relative imports, names of its own, and a loss in a process without the package."""

import ast
import importlib.util
import pathlib
import subprocess
import sys

import pytest

BUILD = pathlib.Path(__file__).parent.parent / "hub" / "build.py"


def test_it_loads_where_the_package_is_not(tmp_path):
    if not hasattr(pytest.importorskip("kernels"), "get_local_kernel"):  # the folder of this repository
        pytest.skip("the package kernels of the Hugging Face hub is not installed")
    finished = subprocess.run([sys.executable, BUILD, tmp_path], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "loaded without the package" in finished.stdout


@pytest.fixture(scope="module")
def files():
    spec = importlib.util.spec_from_file_location("hub_build", BUILD)
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return build.sources()


def test_every_module_that_it_imports_is_in_it(files):
    seen = 0
    for name, text in files.items():
        folder = pathlib.PurePosixPath(name).parent
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                place = folder if node.level == 1 else folder.parent
                stem = str(place.joinpath(*(node.module or "").split(".")))
                assert {f"{stem}.py", f"{stem}/__init__.py"} & files.keys(), (name, node.module)
                seen += 1
    assert seen > 40


def test_nothing_in_it_imports_the_package_by_its_name(files):
    assert {"__init__.py", "loss.py", "backend/fused.py", "kernels/loss.py"} <= files.keys()
    for name, text in files.items():
        code = [line for line in text.splitlines() if line.strip().startswith(("from ", "import "))]
        assert not [line for line in code if "masked_loss_triton" in line], name
