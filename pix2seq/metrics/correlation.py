"""How well what is said goes with what is true."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def matthews(true: NDArray[np.bool_], said: NDArray[np.bool_]) -> float | None:
    """Return Matthews' correlation of truths and answers (P,), -1 to 1; None where one side is always the same."""
    if len(true) == 0 or true.all() or not true.any() or said.all() or not said.any():
        return None
    return float(np.corrcoef(true, said)[0, 1])
