"""Where there is no GPU, Triton kernels run in its interpreter; everywhere, memory that nobody wrote is NaN."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so before anything imports it

from hypothesis import HealthCheck, settings

# Tensors are tiny here: several threads would only wait for each other, and crawl on a machine that has other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty gives NaN, and the largest integer: a value that a kernel forgot to write cannot pass for a result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA or ROCm device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
