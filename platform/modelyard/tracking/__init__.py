"""MLflow: runs, lineage, the model registry. The only room that imports mlflow.

May import storage, monitor and errors. A run is a stream of events: they go to MLflow in batches, or,
when it cannot be reached, to a spool on disk that is replayed later. `import mlflow` takes seconds, so
it happens inside functions and importing this room is cheap.
"""

from modelyard.tracking.aliases import Aliases, Move
from modelyard.tracking.history import FinishedRun, History
from modelyard.tracking.redact import flatten, redact
from modelyard.tracking.registry import ModelVersion, Registry, register, resolve
from modelyard.tracking.run import Run
from modelyard.tracking.spool import SpoolRun, read_events, replay
from modelyard.tracking.status import RecipeRun, StageRun, status
from modelyard.tracking.tracker import Tracker
from modelyard.tracking.ui import Ui, ui, ui_command

__all__ = [
    "Aliases",
    "FinishedRun",
    "History",
    "ModelVersion",
    "Move",
    "RecipeRun",
    "Registry",
    "Run",
    "SpoolRun",
    "StageRun",
    "Tracker",
    "Ui",
    "flatten",
    "read_events",
    "redact",
    "register",
    "replay",
    "resolve",
    "status",
    "ui",
    "ui_command",
]
