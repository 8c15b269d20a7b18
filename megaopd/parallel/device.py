"""The one place that chooses between CUDA with NCCL and CPU with gloo."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from megaopd.errors import EnvironmentFault
from megaopd.parallel.gloo import share_device


def init_distributed(timeout_s: float = 600.0) -> torch.device:
    """Joins the process group that torchrun describes and returns this rank's device.

    Without torchrun's environment the process is a world of one. On CPU the threads of the machine
    are shared out over the ranks of this node unless OMP_NUM_THREADS says otherwise; a value of 1
    counts as unset, because that is what torchrun puts there by itself.

    Raises:
        EnvironmentFault: more ranks on this node than GPUs.
    """
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0" if os.environ["WORLD_SIZE"] == "1" else "29500")
    local_rank = int(os.environ["LOCAL_RANK"])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    timeout = timedelta(seconds=timeout_s)
    share_device()
    # Megatron-Core still calls collectives by names that newer torch versions deprecate.
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*deprecated", FutureWarning)
    if torch.cuda.is_available():
        num_gpus = torch.cuda.device_count()
        if local_size > num_gpus:
            raise EnvironmentFault(
                "--nproc-per-node",
                f"{local_size} ranks on a node with {num_gpus} GPUs",
                f"start at most {num_gpus} ranks a node",
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # gloo beside NCCL carries Python objects and the CPU tensors of checkpoints.
        dist.init_process_group("cuda:nccl,cpu:gloo", timeout=timeout, device_id=device)
        return device
    cores = len(os.sched_getaffinity(0))
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, cores // local_size))
    dist.init_process_group("gloo", timeout=timeout)
    return torch.device("cpu")
