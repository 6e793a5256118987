"""Noise schedules and solvers as tables, under the name that models use: `cgkernels.samplers`."""

from cgkernels.samplers import (
    PREDICTIONS,
    SAMPLERS,
    SCHEDULES,
    SPACINGS,
    VARIANCES,
    WEIGHTINGS,
    SamplerTable,
    Schedule,
    make_schedule,
    make_table,
    x0_coefficients,
)

__all__ = [
    "PREDICTIONS",
    "SAMPLERS",
    "SCHEDULES",
    "SPACINGS",
    "VARIANCES",
    "WEIGHTINGS",
    "SamplerTable",
    "Schedule",
    "make_schedule",
    "make_table",
    "x0_coefficients",
]
