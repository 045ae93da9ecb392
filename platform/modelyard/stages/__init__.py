"""One module a stage kind: the only place where a core meets Ray and tracking; plus the graph runner."""
