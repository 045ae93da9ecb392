"""The corpus room: from raw files to clean documents, with a reason for everything left out.

Readers, cleaning steps, deduplication and the report, all as functions on Arrow tables; the compiled
kernels under `kernels/` read the UTF-8 bytes of the Arrow buffers directly. This room imports neither
Ray nor MLflow: `modelyard.stages.curate` runs it over Ray Data. It may import `storage`, `recipe`
(option models only) and `errors`. Nothing here is imported on `import modelyard.corpus`;
`modelyard.corpus.options` is light, everything else pulls in pyarrow and, at first use, Numba.
"""
