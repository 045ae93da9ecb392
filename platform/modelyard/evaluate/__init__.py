"""Evaluation: losses on held-out data, generation, and whether a model gives personal data back.

A core: it may import `train`, `models`, `tokens`, `recipe` and `errors`, never Ray or MLflow. What personal
data looks like is the corpus room's affair: scanners come in as functions over plain strings.
Only `modelyard.evaluate.options` is light; the rest imports torch.
"""
