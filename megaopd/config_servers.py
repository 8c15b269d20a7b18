"""Rules of SGLang servers, the rollout's and the teachers': which there are, where they listen, and
what they may be combined with."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from megaopd.errors import ConfigError

if TYPE_CHECKING:
    from megaopd.config import Config, RolloutConfig, SGLangConfig, TeacherConfig

# Flags of sglang.launch_server that the run gives by itself -> what to do about it.
_OUR_FLAGS = {
    **dict.fromkeys(("--model-path", "--model"), "set student.path"),
    **dict.fromkeys(("--tp-size", "--tensor-parallel-size", "--tp"), "set rollout.sglang.tensor"),
    "--host": "set rollout.sglang.host",
    "--port": "leave it out: every server gets a free one",
    "--api-key": "put the key into the variable that rollout.sglang.api_key_env names",
    "--admin-api-key": "put the key into the variable that rollout.sglang.admin_key_env names",
}
# Its other flags that take a secret, while all arguments are shown in logs and reports.
_SECRET_FLAG = re.compile(r"--.*(passw|ssl-keyfile-p|secret|credential|auth)")


def check_rollout_servers(config: Config, environ: Mapping[str, str]) -> None:
    """Checks `rollout`: the servers, and what a step off and a shared device need.

    Args:
        environ: environment variables, which hold the keys.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    rollout = config.rollout
    if rollout.kind == "sglang":
        _check_source(rollout)
        check_host("rollout.sglang.host", rollout.sglang.host)
        _check_args(rollout.sglang.args)
        check_urls("rollout.urls", rollout.urls, rollout.sglang.api_key_env, environ)
    elif rollout.launch or rollout.urls:
        key = "rollout.launch" if rollout.launch else "rollout.urls"
        raise ConfigError(
            key, f"set, and rollout.kind is {rollout.kind}", "set rollout.kind=sglang as well"
        )
    if rollout.max_staleness and rollout.kind == "embedded":
        raise ConfigError(
            "rollout.max_staleness",
            f"{rollout.max_staleness} with rollout.kind embedded, which generates nothing while "
            "the same processes train",
            "set it to 0, or rollout.kind=sglang",
        )
    if rollout.kind == "sglang" and rollout.sglang.colocated:
        if rollout.max_staleness:
            raise ConfigError(
                "rollout.max_staleness",
                f"{rollout.max_staleness} with rollout.sglang.colocated: the servers give up their "
                "memory while the trainer works, and generate nothing",
                "set it to 0, or give the servers GPUs of their own",
            )
        if rollout.sglang.sync == "distributed":
            raise ConfigError(
                "rollout.sglang.sync",
                "distributed with rollout.sglang.colocated: NCCL joins no two processes of one GPU",
                "set rollout.sglang.sync=tensor",
            )


def check_local(rollout: RolloutConfig, environ: Mapping[str, str] = os.environ) -> None:
    """Checks what the servers need on this host: a directory for weights, an interpreter. Only rank
    0 starts servers and writes for them, so the other ranks need neither.

    Raises:
        ConfigError: it is not there.
    """
    if rollout.kind != "sglang" or environ.get("RANK", "0") != "0":
        return
    servers = rollout.sglang
    if servers.sync == "disk" and not _is_writable(servers.sync_dir):
        raise ConfigError(
            "rollout.sglang.sync_dir",
            f"{servers.sync_dir} is no directory that can be written",
            "name one that the trainer and the servers see, or set rollout.sglang.sync=distributed",
        )
    if rollout.launch:
        _check_interpreter(servers)


def _check_interpreter(servers: SGLangConfig) -> None:
    if servers.python:
        found = "" if shutil.which(servers.python) else f"{servers.python} cannot be run"
    else:
        has_sglang = importlib.util.find_spec("sglang") is not None
        found = "" if has_sglang else "not set, and this interpreter has no sglang"
    if found:
        raise ConfigError(
            "rollout.sglang.python", found, "name the interpreter of an environment that has sglang"
        )


def _is_writable(directory: str) -> bool:
    return os.path.isdir(directory) and os.access(directory, os.W_OK | os.X_OK)


def check_teacher_servers(key: str, teacher: TeacherConfig, environ: Mapping[str, str]) -> None:
    """Checks the servers of the teacher at `key`.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    if teacher.kind != "sglang":
        if teacher.urls:
            raise ConfigError(
                f"{key}.urls", f"set, and {key}.kind is {teacher.kind}", f"set {key}.kind=sglang"
            )
        return
    if not teacher.urls:
        raise ConfigError(
            f"{key}.urls", f"not set, and {key}.kind is sglang", "name the teacher's servers"
        )
    check_urls(f"{key}.urls", teacher.urls, teacher.api_key_env, environ)


def _check_source(rollout: RolloutConfig) -> None:
    if rollout.launch and rollout.urls:
        raise ConfigError(
            "rollout.urls",
            "set, and rollout.launch is true",
            "set rollout.launch=false to use these servers, or rollout.urls=[] to start others",
        )
    if not rollout.launch and not rollout.urls:
        raise ConfigError(
            "rollout.urls",
            "not set, and rollout.kind is sglang",
            "name the servers, or set rollout.launch=true to start them",
        )


def check_host(key: str, host: str) -> None:
    """Checks an address that this run listens on.

    Raises:
        ConfigError: the whole network reaches it.
    """
    address = _address(host)
    if not host or (address is not None and (address.is_global or address.is_unspecified)):
        raise ConfigError(
            key,
            f"{host or 'empty'}, which the whole network reaches",
            "give the address of loopback or of the job's private interface",
        )


def _check_args(args: Sequence[str]) -> None:
    for i, word in enumerate(args):
        where = f"rollout.sglang.args[{i}]"
        flag = re.split(r"[=\s]", word)[0]
        if remedy := _remedy_of(flag):
            raise ConfigError(where, f"{flag}, which the run sets by itself", remedy)
        if _SECRET_FLAG.match(flag):
            raise ConfigError(where, f"{flag}, which takes a secret", "start the server yourself")


def _remedy_of(flag: str) -> str | None:
    """What to do instead of a flag of ours, or of what argparse takes for one: its beginning."""
    if not flag.startswith("--") or flag in _OUR_FLAGS:
        return _OUR_FLAGS.get(flag)
    keys = (ours for ours in _OUR_FLAGS if ours.startswith(flag) and "key" in ours)
    return _OUR_FLAGS.get(next(keys, ""))


def check_urls(
    key: str, urls: Sequence[str], key_variable: str, environ: Mapping[str, str]
) -> None:
    """Checks the form of URLs, and that a server of another host has a key.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    for i, url in enumerate(urls):
        where = f"{key}[{i}]"
        try:
            parts = urlsplit(url)
            port = parts.port  # raises for what is no port
        except ValueError as error:
            raise ConfigError(
                where, f"found {url!r} ({error})", "write it as http://host:port"
            ) from error
        extra = parts.path.strip("/") or parts.query or parts.fragment
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or extra:
            raise ConfigError(where, f"found {url!r}", "write it as http://host:port")
        if url.rstrip("/").lower() in [other.rstrip("/").lower() for other in urls[:i]]:
            raise ConfigError(where, f"{url} is there twice", "name each server once")
        if not _is_loopback(parts.hostname) and not environ.get(key_variable):
            raise ConfigError(
                where,
                f"{url} is not on this host, and ${key_variable} is not set",
                "start the server with --api-key and put the key into that variable",
            )


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that `host` is, None where it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback
