"""CORE: alignment. Forms of data, preference losses, reward models, rewards, rollouts and policy gradients.

`records` reads the forms that instruction, preference and feedback data come in, `encode` turns them into token
sequences with masks, `losses` and `policy` are the papers' formulas as functions of log-probabilities, `objectives`
make of them what the training loop minimises, `programs` are whole jobs a worker runs. `rollouts` lets inference
engines write what a policy learns from: `supply` asks a `pool` of them, ahead of training where staleness allows,
`episodes` are answers of several turns, and `environment` is what those are told.

May import train, engine, models, tokens and what is below; never Ray or MLflow. `options`, `reward_options`, `records`
and this package load no torch.
"""

from __future__ import annotations
