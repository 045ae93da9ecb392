"""Parallelism from outside: a device mesh, and a plan that shards a plain model over it."""
