"""`modelyard serve`: from a model reference to a running server."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from modelyard.errors import DataError
from modelyard.stages import session
from modelyard.storage import ArtifactStore, absolute, exists, join

if TYPE_CHECKING:
    from modelyard.serving import ServeOptions, ServerHandle

log = logging.getLogger(__name__)


def find_model(reference: str, root: str) -> tuple[str, str, str]:
    """Folder, name and version (empty = none is known) of the model that a person means.

    Args:
        reference: `models:/name@alias` or `models:/name/3`, the folder of a published artifact, or a
            Hugging Face folder.
        root: the root whose MLflow store knows `models:/`.

    Raises:
        DataError: there is no model there.
        StorageError: MLflow cannot be reached.
    """
    if reference.startswith("models:/"):
        from modelyard.tracking import resolve

        uri, number = resolve(reference, root=absolute(root))
        return uri, reference.removeprefix("models:/").partition("@")[0].partition("/")[0], str(number)
    uri, version = absolute(reference), ""
    if exists(join(uri, "manifest.json")):
        artifact = ArtifactStore(root).open(uri)
        uri, name, version = artifact.join("model"), artifact.manifest.recipe, artifact.manifest.fingerprint[:12]
    else:
        name = Path(uri).name
    if not exists(join(uri, "config.json")):
        raise DataError(
            "no model is there: it has no config.json",
            place=uri,
            mend="give models:/name@champion, the folder of a pretrain or finetune artifact, or a Hugging Face folder",
        )
    return uri, name, version


def serve_model(
    reference: str, root: str, options: ServeOptions, name: str | None = None, say: Callable[[str], None] | None = None
) -> ServerHandle:
    """Starts Ray and a server for the model, and returns when it answers.

    It follows the aliases it was given, and writes its figures to MLflow, until
    :func:`modelyard.stages.served.stop_watching`. `say` takes one-line notices.

    Raises what :func:`find_model` and :func:`modelyard.serving.launch` raise.
    """
    from modelyard.serving.server import HAPROXY_ENVIRONMENT, check, launch
    from modelyard.serving.traffic import Variant
    from modelyard.stages.served import Served, references, variants

    uri, found, version = find_model(reference, root)
    wanted = references(reference, options)
    stable, *others = variants(wanted[1:], root, [Variant(version, uri)])
    check(options, here="RAY_ADDRESS" not in os.environ)
    if options.use_haproxy:
        # Ray's processes inherit this: it has to be there before they start.
        os.environ.update(HAPROXY_ENVIRONMENT)
    # One version's replicas more: a new version starts beside the old one.
    replicas = options.autoscaling.max_replicas * options.cpus_per_replica
    session.start(replicas * (1 + len(others)) + max(1, options.autoscaling.min_replicas) * options.cpus_per_replica)
    say = say or log.info
    say("starting; a machine's first start takes half a minute longer")  # the engine compiles its kernels
    handle = launch(stable.model, name or found, options, stable.version, others)
    Served(handle, wanted, absolute(root), options, say)
    return handle
