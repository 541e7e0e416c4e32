"""What records say of how their numbers were made."""

from pathlib import Path

from tests.smoke.jobs import composed
from tfmq_exp.experiment.results import settings


def test_settings_tell_trainings_apart_and_seeds_not(tmp_path: Path) -> None:
    def of(*overrides: str) -> dict[str, str]:
        return settings(composed(tmp_path, "method=lsq_tdq", "quant=w4a4", *overrides))

    plain = of()
    assert plain["named"] == ""
    assert of("seed=3") == plain
    assert of("runtime.threads=1", "model.protocol.images=32")["hash"] == plain["hash"]
    faster = of("model.protocol.qat_learning_rate=0.01", "seed=1")
    assert faster["named"] == "qat_learning_rate=0.01"
    preset = of("experiment=qat_digits")
    assert preset["named"] == "experiment=qat_digits"
    assert len({plain["hash"], faster["hash"], preset["hash"]}) == 3
