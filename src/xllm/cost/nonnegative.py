"""Least squares under x ≥ 0 from normal equations, for a few unknowns (Lawson and Hanson's active set).

Pure arithmetic on small lists. numpy would take longer to call than this takes to run.
"""

from __future__ import annotations

_TOLERANCE = 1e-10


def solve_nonnegative(matrix: list[list[float]], target: list[float]) -> list[float]:
    """argmin ½ xᵀMx − tᵀx over x ≥ 0. `matrix` is symmetric and positive definite."""
    n = len(target)
    x = [0.0] * n
    free: list[int] = []
    # Every round that adds an index lowers the objective, so no free set comes back; the bound only
    # keeps rounding from making this untrue.
    for _ in range(3 * n):
        gradient = [
            t - sum(m * v for m, v in zip(row, x, strict=True)) for row, t in zip(matrix, target, strict=True)
        ]
        outside = [i for i in range(n) if i not in free and gradient[i] > _TOLERANCE]
        if not outside:
            break
        free.append(max(outside, key=gradient.__getitem__))
        while free:
            trial = _solve([[matrix[i][j] for j in free] for i in free], [target[i] for i in free])
            if min(trial) > 0.0:
                x = [0.0] * n
                for i, value in zip(free, trial, strict=True):
                    x[i] = value
                break
            # Walk from x towards the trial until the first unknown reaches zero, and hold it there.
            blocked = [(x[i] / (x[i] - v), i) for i, v in zip(free, trial, strict=True) if v <= 0.0]
            share = min(step for step, _ in blocked)
            for i, value in zip(free, trial, strict=True):
                x[i] += share * (value - x[i])
            for step, i in blocked:
                if step <= share:
                    free.remove(i)
                    x[i] = 0.0
    return x


def _solve(matrix: list[list[float]], target: list[float]) -> list[float]:
    """Gaussian elimination in place; a positive definite matrix needs no pivoting."""
    n = len(target)
    for k in range(n):
        for i in range(k + 1, n):
            factor = matrix[i][k] / matrix[k][k]
            for j in range(k, n):
                matrix[i][j] -= factor * matrix[k][j]
            target[i] -= factor * target[k]
    for k in reversed(range(n)):
        rest = sum(matrix[k][j] * target[j] for j in range(k + 1, n))
        target[k] = (target[k] - rest) / matrix[k][k]
    return target
