"""Which Serve application a model's replicas live in: the graph that was deployed, or one of the model's own.

An application of a model's own is named after the model and after what a replica of it takes of Ray's books. So a
model whose replicas take another amount has another application, and what stands in the configuration says which
applications there must be.
"""

from __future__ import annotations

from cluster.config.names import deployment_name
from cluster.config.share import share_of
from cluster.config.version import Configuration

#: The application that `serve_config.yaml` deploys, and what the names of the others begin with.
GRAPH = "slotpool"
PREFIX = "slotpool-model-"
#: The one deployment of the graph that is no model.
INGRESS = "ingress"


def application_of(configuration: Configuration, model: str) -> str:
    """The name of the application in which replicas of a configured model are started now."""
    if model not in configuration.runtime:
        return GRAPH
    share = share_of(configuration.pool, configuration.pool.models[model])
    return f"{PREFIX}{deployment_name(model)}-{share.num_gpus:g}-{share.num_cpus:g}"


def own_applications(configuration: Configuration) -> dict[str, str]:
    """The models with an application of their own, by its name."""
    return {application_of(configuration, model): model for model in sorted(configuration.runtime)}
