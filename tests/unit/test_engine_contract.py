"""The engines that need no server, held to what every rollout engine does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megaopd.rollout.embedded import EmbeddedEngine
from tests.helpers.engine_contract import CONTRACT, Case
from tests.helpers.tiny_models import make_tiny_model


def embedded(path: Path) -> Case:
    engine = EmbeddedEngine.from_pretrained(
        str(path), device="cpu", dtype=torch.float32, batch_size=8
    )
    return Case(engine, path)


ENGINES: dict[str, Callable[[Path], Case]] = {"embedded": embedded}


@pytest.fixture(scope="module", params=ENGINES)
def case(request, tmp_path_factory) -> Iterator[Case]:
    case = ENGINES[request.param](make_tiny_model(tmp_path_factory.mktemp("model")))
    yield case
    case.engine.close()


@pytest.mark.parametrize("check", CONTRACT.values(), ids=CONTRACT)
def test_contract(case, check):
    check(case)
