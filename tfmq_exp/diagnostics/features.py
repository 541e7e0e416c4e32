"""Which layers' temporal features moved."""

from statistics import fmean

from tfmq_exp.diagnostics.temporal_error import Row


def features_by_layer(rows: list[Row]) -> list[Row]:
    """One row per layer: means over the timesteps, and `at_t`, where the relative error is largest."""
    by_layer: dict[str, list[Row]] = {}
    for row in rows:
        by_layer.setdefault(row["layer"], []).append(row)
    return [
        {
            "layer": layer,
            **{key: fmean(row[key] for row in group) for key in ("cosine_distance", "mse", "relative_mse")},
            "at_t": max(group, key=lambda row: row["relative_mse"])["t"],
        }
        for layer, group in by_layer.items()
    ]
