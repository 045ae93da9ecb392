"""Starts and stops a served model: checks first, then Ray Serve, then waits until it answers."""

from __future__ import annotations

import logging
import os
import socket
import ssl
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from modelyard.engine import choose
from modelyard.errors import RecipeError, ResourceError
from modelyard.serving import tls
from modelyard.serving.keys import digest, new_key, read_keys
from modelyard.serving.options import ServeOptions
from modelyard.serving.rollout import Rollout, quiet, reason, running
from modelyard.serving.traffic import Variant

log = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 45.0
_CONTROLLER = "SERVE_CONTROLLER_ACTOR"
ANYWHERE = frozenset({"0.0.0.0", "::"})  # noqa: S104 - allowed only with API keys
# Serve's processes run user code and router in one loop and talk gRPC: twice the streamed tokens/s (measured
# with 16 clients on 2 cores: 915 -> 2,062 chunks/s, first token 130 -> 88 ms) at no cost.
ENVIRONMENT = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # On a busy machine a proxy takes longer than Serve's 5 s to start, and is killed and started anew for ever.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
}
# HAProxy instead of Serve's Python proxy, straight to the ingress replicas: 2,538 chunks/s, first token 43 ms.
HAPROXY_ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",  # 30 by default; HAProxy deregisters within a second
    # An hour by default, which a client that never ends its request's head would have. Waiting for an answer is no
    # inactivity of the client's: at 3 s, one that took 69 s came whole, and so did a stream of 30 s.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
}
HAPROXY_PORTS = (("STATS", "8404"), ("METRICS", "9101"))
"""Names in Ray's variables, and defaults, of the ports besides the server's own that HAProxy opens."""


@dataclass(frozen=True)
class ServerHandle:
    """A running server.

    Attributes:
        name: the model's name in the API.
        url: base URL without `/v1`.
        seconds: from the call to the first answer of `/healthz`.
        key: an API key made for the caller, valid while this server runs; None when none is asked for.
        rollout: the versions that serve, and how others take their place.
        verify: what httpx is to verify HTTPS by: this server's certificate and no other.
    """

    name: str
    url: str
    seconds: float
    key: str | None = field(repr=False)
    rollout: Rollout = field(repr=False)
    verify: ssl.SSLContext | bool = field(default=True, repr=False)

    @property
    def headers(self) -> dict[str, str]:
        """Headers that requests to it need."""
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def shutdown(self) -> None:
        """Drains and stops the server and Ray Serve. Ray itself goes on."""
        shutdown()


def launch(
    model: str,
    name: str,
    options: ServeOptions | None = None,
    version: str = "",
    others: Sequence[Variant] = (),
) -> ServerHandle:
    """Serves a model folder over HTTP and returns when it answers.

    Starts a local Ray when none is connected.

    Args:
        model: Hugging Face folder: a path or an `s3://` URI that every node can read.
        name: the model's name in the API.
        options: replicas, address, limits, engine.
        version: of the model, as answers name it.
        others: versions beside it: a canary with a share, one in the shadow.

    Raises:
        RecipeError: an address beyond loopback without API keys.
        DataError: the folder cannot be served, the key file is damaged, or certificate and key do not do.
        ResourceError: the port is in use, Serve already runs, or the cluster is too small.
        StageError: a replica failed to start.
    """
    started = time.monotonic()
    o = options or ServeOptions()
    keys = check(o, here=_here())
    key = new_key() if keys else None
    if key is not None:
        keys = {**(keys or {}), digest(key): "launcher"}
    port = o.port or free_port(o.host)
    import ray

    o = o.model_copy(update={"port": port})
    rollout = Rollout(name, o, keys, (Variant(version, model), *others))
    application = rollout.application(rollout.variants)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its import set it to INFO
    if not ray.is_initialized():
        # "local": never a cluster that merely happens to run on this machine.
        ray.init(os.environ.get("RAY_ADDRESS") or "local", include_dashboard=False, log_to_driver=False)
    _check_cluster(o, 1 + len(others))
    _start(o)
    rollout.deploy(application)
    url = _url(o)
    verify = tls.client_context(o.tls.certificate) if o.tls is not None else True
    try:
        _wait(url, verify, started + o.ready_timeout_s)
    except BaseException:
        shutdown()
        raise
    return ServerHandle(name, url, time.monotonic() - started, key, rollout, verify)


def _here() -> bool:
    """Whether this process will start the Ray that replicas run in."""
    ray = sys.modules.get("ray")
    return "RAY_ADDRESS" not in os.environ and not (ray is not None and ray.is_initialized())


def _url(options: ServeOptions) -> str:
    host = "127.0.0.1" if options.host in ANYWHERE else options.host
    return f"{'https' if options.tls else 'http'}://{f'[{host}]' if ':' in host else host}:{options.port}"


def check(options: ServeOptions, *, here: bool = True) -> Mapping[str, str] | None:
    """Checks engine, address, port, keys and certificate before any work; returns the keys' digests and holders, if
    any. `here`: replicas will run in this environment.

    Raises RecipeError, DataError or ResourceError.
    """
    choose.check(options.engine, options.gpus_per_replica, here=here)
    keys = read_keys(Path(options.api_keys)) if options.api_keys else None
    if keys is None and not options.loopback:
        raise RecipeError(
            f"refusing to listen on {options.host} without API keys",
            place="host",
            mend="give api_keys (python -m modelyard.serving.keys add FILE NAME), or listen on 127.0.0.1",
        )
    if keys is None and options.use_haproxy:
        raise RecipeError(
            "HAProxy mode opens replica ports on all interfaces and needs API keys",
            place="haproxy",
            mend="give api_keys, or leave haproxy off",
        )
    if options.tls is not None:
        if options.use_haproxy:
            raise RecipeError(
                "HAProxy as Ray sets it up cannot end TLS",
                place="haproxy",
                mend="leave haproxy out; or leave tls out and end TLS in a proxy of your own in front",
            )
        tls.check(options.tls)
    if options.port:
        check_port(options.host, options.port)
    return keys


def check_port(host: str, port: int) -> None:
    """Raises ResourceError when `port` cannot be listened on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ResourceError(
                f"cannot listen on {host}:{port}: {error.strerror or error}",
                place="port",
                mend=f"stop what uses it (ss -ltnp 'sport = :{port}'), or choose another port; 0 = any free one",
            ) from error


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port nobody listens on now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def shutdown() -> None:
    """Stops Ray Serve if it runs. Requests in progress are drained first."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or not _serve_runs():
        return
    from ray import serve
    from ray.exceptions import GetTimeoutError, RayActorError
    from ray.serve.context import _get_global_client

    # This process' handles report to the controller for ever, and would start a Ray of their own after this one.
    client = _get_global_client()
    if client is not None:
        client.shutdown_cached_handles()
    # serve.shutdown() alone leaves an alarming message: the controller ends in the midst of a call that Ray
    # would like to retry. Asked without retries first, it goes quietly.
    controller = ray.get_actor(_CONTROLLER, namespace="serve")
    with suppress(RayActorError, GetTimeoutError):
        ray.get(controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=SHUTDOWN_SECONDS)
    serve.shutdown()


def _serve_runs() -> bool:
    import ray

    try:
        ray.get_actor(_CONTROLLER, namespace="serve")
    except ValueError:
        return False
    return True


def _check_cluster(options: ServeOptions, versions: int) -> None:
    import ray

    if _serve_runs():
        raise ResourceError(
            "Ray Serve already runs on this cluster",
            place="ray serve",
            mend="stop it (`serve shutdown -y`), or use another cluster",
        )
    have = float(ray.cluster_resources().get("CPU", 0))
    need = options.cpus_per_replica * max(1, options.autoscaling.min_replicas) * versions
    if need > have:
        raise ResourceError(
            f"{need:g} CPUs are needed for the replicas, the cluster has {have:g}",
            place="autoscaling.min_replicas, cpus_per_replica",
            mend="lower them or add nodes",
        )


def _start(options: ServeOptions) -> None:
    from ray import serve
    from ray.serve.config import ControllerOptions, HTTPOptions, ProxyLocation

    # The ingress listens itself, or a proxy does: on this machine only, or on every node.
    place = ProxyLocation.HeadOnly if options.loopback else ProxyLocation.EveryNode
    if options.listens:
        place = ProxyLocation.Disabled
    # For Serve's processes alone: in this one a handle must go on working without an event loop.
    chosen = {k: v for k, v in os.environ.items() if k.startswith("RAY_SERVE_")}
    environment = ENVIRONMENT | (HAPROXY_ENVIRONMENT if options.use_haproxy else {}) | chosen
    if options.use_haproxy:
        # Ray 2.60 writes `bind *` into HAProxy's configuration and has an option for the ports only.
        ports = [environment.get(f"RAY_SERVE_HAPROXY_{name}_PORT", usual) for name, usual in HAPROXY_PORTS]
        log.warning("HAProxy shows its statistics and metrics on all interfaces and asks for no key: "
                    "let nobody reach ports %s from outside", " and ".join(ports))  # fmt: skip
    certificate, key = options.tls.absolute() if options.tls is not None else (None, None)
    serve.start(
        proxy_location=place,
        http_options=HTTPOptions(
            host=options.host,
            port=options.port,
            request_timeout_s=options.request_timeout_s,
            ssl_keyfile=key,
            ssl_certfile=certificate,
        ),
        logging_config=quiet(),
        controller_options=ControllerOptions(runtime_env={"env_vars": environment}),
    )


def _wait(url: str, verify: ssl.SSLContext | bool, deadline: float) -> None:
    """Returns when the application runs and `/healthz` answers. Raises StageError or ResourceError when not."""
    import httpx

    while time.monotonic() < deadline:
        if running():
            try:
                if httpx.get(f"{url}/healthz", timeout=5, verify=verify).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # the proxy is still starting
        time.sleep(0.1)
    raise ResourceError(
        f"the server did not answer in time: {reason()}",
        place=url,
        mend="check that the cluster has free CPUs and memory, or raise ready_timeout_s",
    )
