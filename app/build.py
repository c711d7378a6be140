"""From a configuration to a Serve application: one deployment per model, one ingress in front.

`serve_config.yaml` names `app.build:build`. Scaling is not decided here: every model's deployment has a policy that
asks the ledger. A replica is bound to its model's id, and its deployment to what a replica takes of the machine, so a
deploy with another configuration of a model restarts nothing.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from app.http import build_http
from cluster import effects
from cluster.applications import INGRESS
from cluster.config import ConfigError, PoolConfig, load_config
from cluster.config.names import deployments_collide
from cluster.config.share import share_of
from cluster.config.version import Configuration
from deployments.engines.registry import estimate_mib
from deployments.ingress import Building, Ingress
from deployments.replica import Replica
from deployments.weights import weights_at_hand

#: Calls that Serve lets through to one process. The ledger's slots are the bound, so this must never be one.
UNBOUNDED = 100_000
#: Serve's own bound on the replicas of a model. The ledger's is the configured one, which may change at run time.
MOST_REPLICAS = 1024
#: What Serve's grace period leaves above the longest request, in seconds.
GRACE_S = 60.0
#: Ray's flag: a process sees all devices of its machine, also where Ray has booked one for it.
ALL_DEVICES = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"


def build(args: dict[str, Any]) -> serve.Application:
    """The application for `args` of the Serve configuration. Raises `ConfigError` with a line per mistake."""
    config = estimated(load_config(args))
    if deployments_collide(config.models):
        raise ConfigError("two model ids differ only in characters that Ray Serve does not allow in a name")
    source = str(Path(str(args["config"])).expanduser().resolve()) if "config" in args else None
    graph = [replicas(config, model) for model in config.models]
    ingress = serve.deployment(
        name=INGRESS,
        max_ongoing_requests=UNBOUNDED,
        max_replicas_per_node=1,
        health_check_period_s=1.0,
        graceful_shutdown_timeout_s=config.longest_request_s() + GRACE_S,
        graceful_shutdown_wait_loop_s=0.1,
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress()(Ingress))
    building = Building(build_http, application, estimated, source)
    return ingress.bind(Configuration((time.time(), 0), config), building, graph)


class Front:
    """The first deployment of a model's own application. It never has a replica.

    With direct ingress Serve gives every replica of an application's first deployment a public port, and there is one.
    """

    def __init__(self, model: Any) -> None:
        self._model = model


def application(config: PoolConfig, model: str) -> serve.Application:
    """The Serve application of a model that the graph has no deployment for."""
    front = serve.deployment(
        name=f"{effects.deployment_name(model)}-front",
        autoscaling_config=AutoscalingConfig(min_replicas=0, max_replicas=1, policy=_policy("")),
        ray_actor_options={"num_cpus": 0},
    )(Front)
    return front.bind(replicas(config, model))


def _policy(model: str) -> AutoscalingPolicy:
    return AutoscalingPolicy(policy_function="cluster.scaling:LedgerPolicy", policy_kwargs={"model": model})


def estimated(config: PoolConfig) -> PoolConfig:
    """The configuration with the memory that its models will take, for those whose files are on this machine.

    Read once, here, so that every process of the pool has the same figures. Blocks for milliseconds per model.
    """
    estimates = {}
    for name, model in config.models.items():
        path = weights_at_hand(model.model_path)
        estimate = None if path is None else estimate_mib(model, path)
        if estimate is not None:
            estimates[name] = estimate
    return config.with_estimates(estimates)


def replicas(config: PoolConfig, model: str) -> serve.Application:
    """The deployment of one configured model, as a part of the graph or as an application of its own."""
    deployment = serve.deployment(
        name=effects.deployment_name(model),
        max_ongoing_requests=UNBOUNDED,
        graceful_shutdown_timeout_s=config.longest_request_s() + GRACE_S,
        graceful_shutdown_wait_loop_s=0.02,
        health_check_period_s=config.health_check_interval,
        autoscaling_config=AutoscalingConfig(
            min_replicas=0,
            max_replicas=MOST_REPLICAS,
            upscale_delay_s=0,
            downscale_delay_s=0,
            downscale_to_zero_delay_s=0,
            metrics_interval_s=10,
            policy=_policy(model),
        ),
        request_router_config=RequestRouterConfig(request_router_class="deployments.routing:PinRouter"),
        ray_actor_options=actor_options(config, model),
    )(Replica)
    return deployment.bind(model)


def actor_options(config: PoolConfig, model: str) -> dict[str, Any]:
    """What Ray is asked for with every replica of a model.

    One that stays is not bound to the device of which it takes a share: the ledger says on which ones each engine
    runs. In a Ray that was started without that flag, Ray would hide the others from it.
    """
    share = share_of(config, config.models[model])
    options: dict[str, Any] = share._asdict()
    if config.max_asleep != 0 and share.num_gpus and os.environ.get(ALL_DEVICES) != "1":
        options["runtime_env"] = {"env_vars": {ALL_DEVICES: "1"}}
    return options
