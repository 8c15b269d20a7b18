"""Checksums of weights: ours against those that servers compute of what they hold.

A server names its tensors in its own way, some made of several of ours, and hashes those on a CPU
with SHA-256. There, and without tensor parallelism, a tensor is compared with what was sent. Other
tensors (on GPUs, where the hash is SGLang's own; shards; fused experts) are compared between
servers of the same layout: an update that went wrong at one of them shows.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from megaopd.rollout.sglang.api import UpdateFailed
from megaopd.rollout.sglang.client import ServerClient
from megaopd.weight_sync.buckets import Bucket, on_host
from megaopd.weight_sync.carrier import Faults

# What a server makes one tensor of, in this order.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_PART = {part: (fused, i) for fused, parts in FUSED.items() for i, part in enumerate(parts)}
_NAME = re.compile(r"(.*\.)(\w+)(\.(?:weight|bias))")
# A server appends rows of zeros to the vocabulary up to a multiple of this.
VOCAB_MULTIPLE = 64


class Checksums:
    """Of what is sent, by the names that a server gives to it. Buckets are added in order."""

    def __init__(self) -> None:
        self._hashes: dict[str, Any] = {}
        self._parts: Counter[str] = Counter()
        self._padded: dict[str, bytes] = {}

    def add(self, bucket: Bucket) -> None:
        """Takes in the tensors of a bucket."""
        for name, tensor in bucket.tensors:
            name, place = server_name(name)
            if self._parts[name] == place:
                flat = on_host(tensor).reshape(-1).view(torch.uint8).numpy()
                self._hashes.setdefault(name, hashlib.sha256()).update(flat)
                self._parts[name] += 1
            else:
                # Parts in another order than the server's: not to be told by a running hash.
                self._parts[name] = -1
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                missing = -tensor.shape[0] % VOCAB_MULTIPLE
                self._padded[name] = bytes(missing * tensor[0].nbytes)

    def of(self, name: str) -> set[str]:
        """The checksums that a server may give for a tensor of its own; empty where that is not
        known."""
        whole = next((len(p) for fused, p in FUSED.items() if f".{fused}." in name), 1)
        if name not in self._hashes or self._parts[name] != whole:
            return set()
        plain = self._hashes[name]
        padded = plain.copy()
        padded.update(self._padded.get(name, b""))
        # The first 8 bytes, in hexadecimal.
        return {plain.hexdigest()[:16], padded.hexdigest()[:16]}


def server_name(name: str) -> tuple[str, int]:
    """The server's name of the tensor that a Hugging Face tensor becomes a part of, and its place
    there."""
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in _PART or ".experts." in name:
        return name, 0
    fused, place = _PART[match[2]]
    return f"{match[1]}{fused}{match[3]}", place


def disagreement(ours: Checksums, answers: Mapping[ServerClient, Mapping[str, Any]]) -> Faults:
    """The servers that hold something else than what was sent.

    Args:
        answers: of /weights_checker.
    """
    faults: Faults = {}
    layouts: dict[int, dict[ServerClient, tuple[Any, ...]]] = defaultdict(dict)
    for client, answer in answers.items():
        ranks = [rank["checksums"] for rank in answer.get("ranks") or ()]
        if not ranks:
            faults[client] = UpdateFailed(f"{client.url}: it tells no checksums")
        elif client.capabilities.device == "cpu" and len(ranks) == 1:
            known = {name: ours.of(name) for name in ranks[0]}
            wrong = [
                name for name, hashes in known.items() if hashes and ranks[0][name] not in hashes
            ]
            if wrong or not any(known.values()):
                named = ", ".join(wrong[:3]) or "no tensor that was sent"
                found = f"checksums differ of {len(wrong)} of {len(known)} tensors ({named})"
                faults[client] = UpdateFailed(f"{client.url}: {found}")
        if client not in faults:
            layouts[len(ranks)][client] = tuple(tuple(sorted(r.items())) for r in ranks)
    for held in layouts.values():
        common, count = Counter(held.values()).most_common(1)[0]
        if count < len(held):
            # Without a majority nobody knows who is right.
            doubted = [c for c, sums in held.items() if sums != common or 2 * count <= len(held)]
            for client in doubted:
                found = "its checksums are not those of the other servers"
                faults[client] = UpdateFailed(f"{client.url}: {found}")
    return faults
