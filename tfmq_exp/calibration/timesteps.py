"""Which points of the trajectory a method learns from."""

from dataclasses import dataclass

from tfmq_exp.calibration.dataset import CalibrationSet


@dataclass(frozen=True)
class EveryKth:
    """Every k-th sampling step, the first included (Q-Diffusion, arXiv 2302.04304, section 3.2); k = 1 keeps all."""

    k: int = 1

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    def __call__(self, data: CalibrationSet) -> CalibrationSet:
        """The part of the set that is kept."""
        return data[data.step % self.k == 0]
