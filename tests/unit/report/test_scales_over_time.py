"""Intervals over timesteps: read from a diagnosis, correlated, compared between seeds."""

from pathlib import Path

import numpy as np
import pytest

from tfmq_exp.report.scales_over_time import (
    FILE,
    RunScales,
    correlations,
    draw,
    most_changing,
    read_scales,
    spread,
    summary,
)

T = np.array([900, 600, 300, 0])
STILL, RISING, FALLING = np.full(4, 0.5), np.array([0.1, 0.2, 0.3, 0.4]), np.array([4.0, 3.0, 2.0, 1.0])


def scales(seed: int, times: float = 1.0) -> RunScales:
    return RunScales("w4a4", seed, T, {"a": times * RISING, "b": STILL}, {"a": RISING, "b": FALLING})


def test_a_diagnosis_is_read_activation_by_activation(tmp_path: Path) -> None:
    (tmp_path / FILE).parent.mkdir()
    lines = ["activation,bits,call,t,std,interval"]
    lines += [f"{name},4,{call},{t},{t / 100},{call + 1}" for call, t in enumerate(T) for name in ("a", "b")]
    (tmp_path / FILE).write_text("\n".join(lines))
    (tmp_path / "config.yaml").write_text("goal: diagnose\nseed: 3\nname: digits-w4a4-lsq_tdq\n")
    found = read_scales(tmp_path)
    assert (found.label, found.t.tolist()) == ("digits-w4a4-lsq_tdq, seed 3", T.tolist())
    assert found.interval["b"].tolist() == [1, 2, 3, 4]
    assert found.deviation["a"].tolist() == [9, 6, 3, 0]
    with pytest.raises(FileNotFoundError, match="until=diagnose"):
        read_scales(tmp_path / "nothing")


def test_correlations_say_what_changes_and_what_follows() -> None:
    first, second = correlations([scales(0)])
    assert (first["deviation_with_t"], first["interval_with_deviation"]) == (pytest.approx(-1), pytest.approx(1))
    assert second["deviation_with_t"] == pytest.approx(1)
    assert np.isnan(second["interval_with_deviation"])
    (line,) = summary([scales(0)])
    assert (line["|r| > 0.7"], line["intervals follow, r > 0.5"]) == (1.0, 0.5)


def test_the_spread_of_seeds_is_their_standard_deviation(tmp_path: Path) -> None:
    assert spread([scales(0)]) == []
    rows = {(row["activation"], row["t"]): row for row in spread([scales(0), scales(1, times=3.0)])}
    assert rows["a", 300]["mean"] == pytest.approx(0.6)
    assert rows["a", 300]["std"] == pytest.approx(0.3 * 2**0.5)
    assert rows["a", 300]["relative_std"] == pytest.approx(2**-0.5)
    assert rows["b", 0]["std"] == 0
    with pytest.raises(ValueError, match="different timesteps"):
        spread([scales(0), RunScales("w4a4", 1, T[::-1], {"a": RISING}, {"a": RISING})])
    assert most_changing([scales(0)], 1) == ["a"]
    draw([scales(0), scales(1)], tmp_path / "intervals.png")
    assert (tmp_path / "intervals.png").stat().st_size > 10_000
