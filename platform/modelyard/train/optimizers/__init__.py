"""Optimizers that torch has not, or not in a form that shards: Lion, LAMB, Adafactor, Muon, and 8-bit
Adam behind an extra.

They work on this worker's shards and exchange only what the method needs: nothing (Lion), a few norms (LAMB), whole
matrices (Muon). Each takes the same parameter groups as `torch.optim.AdamW`, keeps its state as tensors (checkpointed
by name and resharded like every tensor), and is proven against a slow twin in `tests/train/test_optimizers.py`.
"""
