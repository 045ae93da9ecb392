"""From one version to another without a failed request: start the new, switch, let the old end, stop it.

Each version has its own engines (`app.build`), because another version may have another tokenizer: a prompt must
never meet an engine it was not encoded for. So a change needs room for both while it lasts; what does not start in
time is taken back, and the old version never stopped answering.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from modelyard.errors import ResourceError, StageError
from modelyard.serving.names import APPLICATION, INGRESS, engine_name
from modelyard.serving.options import ServeOptions
from modelyard.serving.traffic import Variant

if TYPE_CHECKING:
    from ray import serve

log = logging.getLogger(__name__)


class Rollout:
    """The versions of one model that serve, and how others take their place.

    Args:
        name: the model's name in the API.
        options: as the server was launched with.
        keys: digests of API keys and their holders, or None.
        variants: the versions of the start, the stable one first.
    """

    def __init__(
        self, name: str, options: ServeOptions, keys: Mapping[str, str] | None, variants: Sequence[Variant]
    ) -> None:
        self._name, self._options, self._keys = name, options, keys
        self.variants: tuple[Variant, ...] = checked(variants)
        self._lock = threading.Lock()

    def application(self, variants: Sequence[Variant], others: Sequence[Variant] = ()) -> serve.Application:
        """The Serve application of some versions, as `app.build`. Raises DataError for what cannot be served."""
        from modelyard.serving.app import build

        return build(self._name, self._options, self._keys, variants, others)

    def deploy(self, application: serve.Application) -> None:
        """Hands an application to Serve and returns at once."""
        from ray import serve

        serve.run_many(
            [serve.RunTarget(application, name=APPLICATION, route_prefix="/", logging_config=quiet())],
            wait_for_applications_running=False,
        )

    def move(self, variants: Sequence[Variant], say: Callable[[str], None] = log.info) -> None:
        """Other versions, or other shares, take the place of those of now.

        Returns when the new ones answer and the old ones have ended. One change at a time: a second caller waits.

        Raises:
            DataError: a folder cannot be served; nothing has changed then.
            StageError: a new version does not start; the old ones go on as if nothing had been.
            ResourceError: it does not start in `ready_timeout_s`; likewise.
        """
        with self._lock:
            new, old = checked(variants), self.variants
            if new == old:
                return
            try:
                self._settle(old, new)  # both run, the old ones answer
                self._settle(new, old)
                self._expect(new)
            except (StageError, ResourceError):
                say("the new version does not start: back to the old one")
                self.deploy(self.application(old))
                raise
            self.variants = new
            leaving = [v for v in old if v.version not in {n.version for n in new}]
            for variant in leaving:
                self._drain(variant.version)
            if leaving:
                self._settle(new)

    def _settle(self, variants: Sequence[Variant], others: Sequence[Variant] = ()) -> None:
        """Deploys and waits until everything runs."""
        self.deploy(self.application(variants, others))
        deadline = time.monotonic() + self._options.ready_timeout_s
        time.sleep(0.2)  # the controller takes up the new goal with its next turn
        while not running():
            if time.monotonic() > deadline:
                raise ResourceError(
                    f"the new version did not start in time: {reason()}",
                    place=", ".join(v.version for v in variants),
                    mend="a change needs CPUs and memory for both versions while it lasts; add nodes, or stop first",
                )
            time.sleep(0.1)

    def _expect(self, variants: Sequence[Variant]) -> None:
        """Waits until every ingress sends requests to these versions."""
        goal, seen = [v.version for v in variants], list[Any]()
        for _ in range(300):
            with suppress(Exception):  # an ingress that is just starting does not answer
                seen = calls(INGRESS, "versions", APPLICATION)
                if seen and all(found == goal for found in seen):
                    return
            time.sleep(0.1)
        raise StageError(f"the ingress stays at {seen}", place=str(goal), mend="see Ray's serve logs")

    def _drain(self, version: str) -> None:
        """Waits until no ingress has a request of a version and its engines have nothing to do, twice in a row, at most
        `drain_s`. An engine is done before the ingress has heard and sent all of it."""
        deadline, quiet_looks = time.monotonic() + self._options.traffic.drain_s, 0
        while quiet_looks < 2 and time.monotonic() < deadline:
            time.sleep(0.3)
            try:
                answering = sum(busy.get(version, 0) for busy in calls(INGRESS, "busy", APPLICATION))
                stats = calls(engine_name(version), "stats", APPLICATION)
            except Exception as error:  # none of its replicas is left
                log.info("version %s: %s", version, error)
                return
            idle = not answering and all(s.running == s.waiting == 0 for s in stats)
            quiet_looks = quiet_looks + 1 if idle else 0


def checked(variants: Sequence[Variant]) -> tuple[Variant, ...]:
    """The variants, when they make sense together. Raises StageError for a version named twice."""
    names = [v.version for v in variants]
    if len(set(names)) < len(names):
        raise StageError(
            f"version {next(n for n in names if names.count(n) > 1)!r} is named twice",
            place="traffic",
            mend="let canary and shadow name another version than the model's",
        )
    return tuple(variants)


def calls(deployment: str, method: str, application: str) -> list[Any]:
    """What every running replica of a deployment answers."""
    from ray import serve

    handle = serve.get_deployment_handle(deployment, application)
    return list(handle.broadcast(method).results(timeout_s=10))


def quiet() -> Any:
    """Serve's logging: no access log, because paths and addresses are personal data; bodies enter no log anyway."""
    from ray.serve.schema import LoggingConfig

    return LoggingConfig(enable_access_log=False, log_level="WARNING")


def running() -> bool:
    """Whether the application runs as asked. Raises StageError when a replica failed to start."""
    status = _status()
    if status is not None and status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
        raise StageError(f"a replica failed to start: {reason()}", place=APPLICATION, mend="see above")
    return status is not None and status.status == "RUNNING"


def _status() -> Any:
    from ray import serve

    return serve.status().applications.get(APPLICATION)


def reason() -> str:
    """What Serve says about the application and its deployments, on a few lines."""
    status = _status()
    if status is None:
        return "the application is unknown to Serve"
    parts = [status.message] + [f"{n}: {d.status} {d.message}" for n, d in status.deployments.items()]
    return "\n".join(p.strip() for p in parts if p.strip())[:4000] or str(status.status)
