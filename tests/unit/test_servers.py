"""Which GPUs the servers that we start take."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megaopd.config import Config, RolloutConfig, SGLangConfig, StudentConfig
from megaopd.errors import ConfigError
from megaopd.train_servers import server_fleet
from tests.helpers.tiny_models import make_tiny_model


def test_servers_take_the_gpus_that_are_left(tmp_path, monkeypatch):
    """In training those behind the ranks' own; in an evaluation, which needs none, all."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    world = SimpleNamespace(rank=0, world_size=4, device=torch.device("cuda"))
    config = Config(
        student=StudentConfig(path=str(make_tiny_model(tmp_path / "model"))),
        rollout=RolloutConfig(
            kind="sglang", launch=True, sglang=SGLangConfig(num_servers=2, tensor=2)
        ),
    )

    def first_gpus(*more: int, **changes: object) -> list[int]:
        rollout = replace(config.rollout, sglang=replace(config.rollout.sglang, **changes))
        fleet = server_fleet(replace(config, rollout=rollout), world, *more)
        return [server.spec.first_gpu for server in fleet.servers]

    assert first_gpus() == [4, 6]
    assert first_gpus(colocated=True) == [0, 2]
    assert first_gpus(0, num_servers=4) == [0, 2, 4, 6]
    with pytest.raises(ConfigError, match="3 x rollout.sglang.tensor 2 GPUs from number 4 on"):
        first_gpus(num_servers=3)
