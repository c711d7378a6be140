"""Handles of the models' deployments, made when they are first needed: models come and go while an ingress runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ray.serve.handle import DeploymentHandle

from cluster.applications import GRAPH, application_of
from cluster.config.names import deployment_name
from cluster.config.version import Configuration


class Handles(Mapping[str, DeploymentHandle]):
    """The handle of each model's deployment by the model's id.

    Nobody may call one before the ledger has a replica of its model that is ready: at 0 replicas any call to a handle
    makes Serve start one by itself.
    """

    def __init__(self, configuration: Configuration) -> None:
        self._applications: dict[str, str] = {}
        self._handles: dict[tuple[str, str], DeploymentHandle] = {}
        self.follow(configuration)

    def follow(self, configuration: Configuration) -> None:
        """Take over where the models live now. A model that was removed stays known, for its last streams."""
        self._applications |= {model: application_of(configuration, model) for model in configuration.pool.models}

    def __getitem__(self, model: str) -> DeploymentHandle:
        application = self._applications.get(model, GRAPH)
        handle = self._handles.get((model, application))
        if handle is None:
            handle = self._handles[model, application] = DeploymentHandle(deployment_name(model), application)
        return handle

    def __iter__(self) -> Iterator[str]:
        return iter(self._applications)

    def __len__(self) -> int:
        return len(self._applications)
