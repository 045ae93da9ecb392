"""The Ray Serve application: an ingress, and a deployment of engine replicas for each version."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.schema import TaskProcessorConfig
from ray.serve.task_consumer import task_consumer

from modelyard.engine.checkpoint import check_adapter, check_folder
from modelyard.serving.consumer import RedisTasks
from modelyard.serving.folders import local_folder
from modelyard.serving.ingress import Consumer, Ingress
from modelyard.serving.names import INGRESS, engine_name
from modelyard.serving.options import ServeOptions
from modelyard.serving.replicas import EngineReplica
from modelyard.serving.traffic import Variant

HEAD_NODE = "node:__internal_head__"
"""The resource by which Ray names its head node."""
LOAD_EVERY_S = 0.5
"""Seconds between two reports of queues and engines' load to the autoscaler. At Serve's 10 s the first request at zero
replicas waits up to 10 s until it is seen."""
LOOK_BACK_S = 4.0
"""Seconds of load the autoscaler averages; its delays come on top."""


def build(
    name: str,
    options: ServeOptions,
    keys: Mapping[str, str] | None,
    variants: Sequence[Variant],
    others: Sequence[Variant] = (),
) -> serve.Application:
    """The Serve application of one model: an ingress, and a deployment of engine replicas for each version.

    Deployed again with other variants, engines and ingress that stay go on running: Serve compares their versions,
    which are fixed here by what decides them.

    Args:
        name: the model's name in the API.
        options: replicas, limits, engine.
        keys: digests of API keys and their holders, or None.
        variants: versions that requests go to, the stable one first; their folders are readable from every node.
        others: versions whose engines run besides: about to be used, or ending what they have begun.

    Raises:
        DataError: a folder cannot be served.
    """
    engines = {v.version: v for v in (*others, *variants)}
    for variant in engines.values():
        check_folder(local_folder(variant.model, weights=False))
    for place in options.adapters.values():
        check_adapter(local_folder(place, weights=False))
    # The engine queues what exceeds its slots, so that a freed slot is filled in the next step, not a round trip later.
    ongoing = options.engine.max_sequences * 2
    # An ingress that listens itself does so on the head, where the loopback address of the person is.
    entrance = Ingress if options.listens else serve.ingress()(Ingress)
    head = {"resources": {HEAD_NODE: 0.001}} if options.listens else {}
    ingress = serve.deployment(entrance).options(  # type: ignore[attr-defined]
        name=INGRESS,
        # Room for two versions' replicas whatever runs: a changed bound would make Serve announce the ingress anew.
        max_ongoing_requests=2 * ongoing * options.autoscaling.max_replicas + options.max_queued + 64,
        graceful_shutdown_timeout_s=20,
        ray_actor_options={"num_cpus": 0, **head},
        user_config={"variants": [asdict(v) for v in variants]},
        version="1",
        _internal=True,
    )
    bound: serve.Application = ingress.bind(
        name,
        options.model_dump(),
        dict(keys) if keys else None,
        *(_engine(v, options, ongoing) for v in engines.values()),
        *_consumer(name, options, variants),
    )
    return bound


def _consumer(name: str, options: ServeOptions, variants: Sequence[Variant]) -> list[Any]:
    """The deployment that answers asynchronous requests, if there are any."""
    a = options.asynchronous
    if a is None:
        return []
    config = TaskProcessorConfig(
        queue_name=name, adapter=RedisTasks, adapter_config=a.model_dump(), max_retries=0
    )  # fmt: skip
    consumer = serve.deployment(task_consumer(task_processor_config=config)(Consumer)).options(  # type: ignore[attr-defined]
        name="consumer",
        max_ongoing_requests=a.concurrency,
        ray_actor_options={"num_cpus": 0},
        user_config={"variants": [asdict(v) for v in variants if not v.shadow]},
        version="1",
        _internal=True,
    )
    return [consumer.bind(name, options.model_dump())]


def _engine(variant: Variant, options: ServeOptions, ongoing: int) -> Any:
    """The engine replicas of one version."""
    resources: dict[str, Any] = {"num_cpus": options.cpus_per_replica, "num_gpus": options.gpus_per_replica}
    engine = options.engine.placed(options.gpus_per_replica).model_dump()
    decides = repr((variant.model, engine, options.adapters, options.max_adapters, options.warm_up)).encode()
    replicas = serve.deployment(
        EngineReplica
    ).options(  # type: ignore[attr-defined]
        name=engine_name(variant.version),
        max_ongoing_requests=ongoing,
        # Serve counts a request as queued also while it is handed to a replica with room for it: a burst that a replica
        # can take at once is not refused.
        max_queued_requests=options.max_queued + ongoing,
        max_constructor_retry_count=3,  # a version that cannot start is given up soon, the one before goes on
        health_check_period_s=5,
        graceful_shutdown_timeout_s=20,
        ray_actor_options=resources,
        autoscaling_config=_autoscaling(options),
        request_router_config=RequestRouterConfig.model_validate(
            {
                "request_router_class": "modelyard.serving.affinity.AffinityRouter",
                "request_router_kwargs": {
                    "imbalance": max(2, options.engine.max_sequences // 2),
                    "prefer": options.affinity,
                },
            }
        ),
        version=hashlib.sha256(decides).hexdigest()[:16],
        _internal=True,
    )
    return replicas.bind(variant.model, engine, options.adapters, options.max_adapters, warm=options.warm_up)


def _autoscaling(options: ServeOptions) -> AutoscalingConfig:
    a, sequences = options.autoscaling, options.engine.max_sequences
    config: dict[str, Any] = {
        "min_replicas": a.min_replicas,
        "max_replicas": a.max_replicas,
        "upscale_delay_s": a.upscale_delay_s,
        "downscale_delay_s": a.downscale_delay_s,
        "target_ongoing_requests": a.target_requests or max(1.0, 0.75 * sequences),
        "metrics_interval_s": LOAD_EVERY_S,
        "look_back_period_s": LOOK_BACK_S,
    }
    if a.target_requests is None:
        kwargs = {"kv_target": a.target_kv, "tokens_target": a.target_waiting_tokens, "sequences": sequences}
        config["policy"] = {"policy_function": "modelyard.serving.scaling:EngineLoad", "policy_kwargs": kwargs}
    with warnings.catch_warnings():
        # Serve 2.60 calls metrics_interval_s deprecated, but reads the environment variables that are to replace it
        # nowhere.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(**config)
