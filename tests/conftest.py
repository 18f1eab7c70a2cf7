"""Seeds and settings that every test shares."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "captum_rlrp",
    deadline=None,
    derandomize=True,
    max_examples=8,  # every example captures a new network
    phases=[Phase.explicit, Phase.generate],  # shrinking would take minutes
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("captum_rlrp")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
