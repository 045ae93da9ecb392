"""Recipes as jobs on a Ray cluster, through Ray's Jobs API."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from modelyard.errors import ResourceError


def submit_job(address: str, entrypoint: str, working_dir: Path) -> str:
    """Uploads `working_dir` and starts the entrypoint on the cluster's head; returns the job's id.

    Raises ResourceError when the cluster does not answer or refuses the token.
    """
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        job: str = client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(working_dir)})
    except (ConnectionError, RuntimeError, OSError) as error:
        raise ResourceError(
            f"the cluster does not take the job: {error}",
            place=address,
            mend="check the address and the token (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH)",
        ) from error
    return job


def follow_job(address: str, job: str, write: Callable[[str], None]) -> str:
    """Hands the job's log to `write` until it ends; returns its final status (`SUCCEEDED`, `FAILED`, `STOPPED`)."""
    import asyncio

    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(address)

    async def follow() -> None:
        async for text in client.tail_job_logs(job):
            write(text)

    asyncio.run(follow())
    return str(client.get_job_status(job).value)
