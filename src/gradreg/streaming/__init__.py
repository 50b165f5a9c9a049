"""Work on a data set batch by batch, with what every evaluation and measurement needs: resuming, sharing, counting."""

from gradreg.streaming.identity import describe
from gradreg.streaming.ledger import Batch, Record
from gradreg.streaming.setting import (
    RIGHT,
    WRONG,
    Cost,
    Counted,
    Model,
    as_text,
    check_batch,
    classified,
    is_correct,
    work_through,
)

__all__ = [
    "RIGHT",
    "WRONG",
    "Batch",
    "Cost",
    "Counted",
    "Model",
    "Record",
    "as_text",
    "check_batch",
    "classified",
    "describe",
    "is_correct",
    "work_through",
]
