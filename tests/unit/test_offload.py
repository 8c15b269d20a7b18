"""Tensors that leave for host memory and come back as they were."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megaopd.engine import offload
from megaopd.engine.offload import HostOffload

CPU = torch.device("cpu")


def _size(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def test_tensors_and_their_views_come_back_to_the_bit() -> None:
    buffer = torch.randn(100)
    weight = torch.nn.Parameter(buffer[20:80].view(6, 10))
    other = torch.randn(3, 5).to(torch.bfloat16)
    wanted = [t.detach().clone() for t in (buffer, weight, other)]
    host = HostOffload(CPU, moved=lambda: (weight, buffer, other, weight.T))
    host.to_host()
    assert host.away
    assert [_size(t) for t in (buffer, weight, other)] == [0, 0, 0]
    assert [b.numel() for b in host.host_buffers] == [400, 30]  # a shared storage once
    host.to_device()
    assert not host.away
    for tensor, value in zip((buffer, weight, other), wanted, strict=True):
        assert tensor.detach().equal(value)
    buffer[20] = 7.0
    assert weight[0, 0] == 7.0  # still one storage


def test_host_memory_is_allotted_once_and_holds_the_latest_contents() -> None:
    tensor = torch.zeros(10)
    host = HostOffload(CPU, moved=lambda: (tensor,))
    places = set()
    for value in (1.0, 2.0):
        tensor.fill_(value)
        host.to_host()
        places.add(host.host_buffers[0].data_ptr())
        host.to_device()
        assert tensor.tolist() == [value] * 10
    assert len(places) == 1


def test_constants_are_copied_once() -> None:
    tensor = torch.ones(10)
    host = HostOffload(CPU, constant=lambda: (tensor,))
    with host.off_device():
        pass
    tensor.fill_(2.0)  # which one must not do
    with host.off_device():
        pass
    assert tensor.tolist() == [1.0] * 10


def test_what_is_dropped_comes_back_as_zeros() -> None:
    tensor = torch.ones(10)
    host = HostOffload(CPU, dropped=lambda: (tensor,))
    with host.off_device():
        assert _size(tensor) == 0
        assert host.host_buffers == []
    assert tensor.tolist() == [0.0] * 10


def test_tensors_may_appear_late_and_be_replaced() -> None:
    state: list[Tensor] = []
    host = HostOffload(CPU, moved=lambda: state)
    with host.off_device():
        assert host.host_buffers == []
    state.append(torch.arange(4.0))
    with host.off_device():
        assert [b.numel() for b in host.host_buffers] == [16]
    state[0] = torch.arange(6.0)
    with host.off_device():
        assert [b.numel() for b in host.host_buffers] == [24]
    assert state[0].tolist() == [0, 1, 2, 3, 4, 5]


def test_large_storages_travel_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "PIECE_BYTES", 64)
    tensor, wanted = torch.arange(50.0), torch.arange(50.0)
    host = HostOffload(CPU, moved=lambda: (tensor,))
    with host.off_device():
        assert [b.numel() for b in host.host_buffers] == [64, 64, 64, 8]
    assert tensor.equal(wanted)


def test_tensors_of_another_device_stay() -> None:
    tensor, elsewhere = torch.ones(4), torch.ones(4, device="meta")
    host = HostOffload(CPU, moved=lambda: (tensor, elsewhere))
    with host.off_device():
        assert (_size(tensor), _size(elsewhere)) == (0, 16)


def test_blocks_leave_things_as_they_were() -> None:
    tensor = torch.ones(4)
    host = HostOffload(CPU, moved=lambda: (tensor,))
    with host.off_device():
        with host.on_device():
            with host.on_device():
                assert not host.away
            assert not host.away
        assert host.away
    with pytest.raises(KeyError), host.off_device():
        raise KeyError
    assert not host.away
    host.to_host()
    with pytest.raises(KeyError), host.on_device():
        raise KeyError
    assert host.away


def test_disabled_it_moves_nothing() -> None:
    linear = torch.nn.Linear(4, 4)
    host = HostOffload(CPU, moved=linear.parameters, enabled=False)
    host.guard([linear])
    host.to_host()
    with host.off_device(), host.on_device():
        linear(torch.ones(1, 4))
    assert not host.away
    assert host.host_buffers == []


USES: dict[str, Callable[[Tensor], object]] = {
    "product": lambda t: t @ t,
    "linear": lambda t: torch.nn.functional.linear(torch.ones(1, 4), t),
    "embedding": lambda t: torch.nn.functional.embedding(torch.tensor([1]), t),
    "index": lambda t: t[1],
    "slice": lambda t: t[:, :2],
    "cast": lambda t: t.to(torch.bfloat16),
    "item": lambda t: t[0, 0].item(),
}


@pytest.mark.parametrize("use", USES)
def test_use_of_an_absent_tensor_raises(use: str) -> None:
    tensor = torch.ones(4, 4)
    host = HostOffload(CPU, moved=lambda: (tensor,))
    with host.off_device(), pytest.raises(RuntimeError, match="not allocated|setStorage"):
        USES[use](tensor)
    USES[use](tensor)


def test_an_elementwise_kernel_on_an_absent_tensor_ends_the_process() -> None:
    code = "import torch; t = torch.ones(4); t.untyped_storage().resize_(0); print((t + 1).sum())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode != 0
    assert done.stdout == b""


def test_a_guarded_module_says_what_is_wrong() -> None:
    linear = torch.nn.Linear(4, 4)
    host = HostOffload(CPU, moved=linear.parameters)
    host.guard([linear])
    wanted = linear(torch.ones(1, 4))
    with host.off_device(), pytest.raises(RuntimeError, match="Linear: its weights are in host"):
        linear(torch.ones(1, 4))
    assert linear(torch.ones(1, 4)).equal(wanted)
