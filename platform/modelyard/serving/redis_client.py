"""How the cache and the task queue reach Redis."""

from __future__ import annotations

from typing import Any

from modelyard.errors import ResourceError


def redis_client(url: str, place: str, **options: Any) -> Any:
    """A client of `redis.asyncio`, which connects when first used.

    Args:
        url: `redis://`, `rediss://` or `unix://`.
        place: the option that holds it, such as `cache.redis_url`.
        options: of `Redis.from_url`.

    Raises:
        ResourceError: the client library is not installed, or the URL is none.
    """
    try:
        from redis.asyncio import Redis
    except ImportError as error:
        raise ResourceError(
            "redis_url needs the redis client", place=place, mend="pip install 'modelyard[redis]'"
        ) from error
    try:
        return Redis.from_url(url, **options)
    except ValueError as error:
        raise ResourceError(f"not a Redis URL: {error}", place=place, mend="write redis://host:6379/0") from error
