"""Options of the benchmark suite."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption(
        "--all-cases", action="store_true", help="every latent shape, mask and dtype, not only the default few"
    )
    group.addoption(
        "--rounds", type=int, default=0, help="rounds of each measurement (default: 30 on the CPU, 50 on CUDA)"
    )


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest, device: torch.device) -> int:
    return request.config.getoption("--rounds") or (50 if device.type == "cuda" else 30)
