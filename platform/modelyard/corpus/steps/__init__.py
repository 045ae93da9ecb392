"""The row-wise steps, one file each. See `modelyard.corpus.step` for what a step is."""
