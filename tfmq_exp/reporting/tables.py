"""Comparison tables: mean and standard deviation over seeds, one row per way of quantizing."""

import csv
import io
import json
import statistics
from collections.abc import Callable, Iterable, Sequence

from tfmq_exp.report.comparability import comparable, differing, distinctions, in_words, one_per_seed, setting
from tfmq_exp.report.records import ScoreRecord

FORMATS = ("markdown", "csv")

# column -> (how to read it off a record, digits)
Column = tuple[str, Callable[[ScoreRecord], float | None], int]


def columns(evaluator: str) -> list[Column]:
    """What a table shows. Score names carry the evaluator's."""
    return [
        (f"FID ({evaluator}) ↓", lambda r: r.scores.get("fid"), 3),
        (f"sFID ({evaluator}) ↓", lambda r: r.scores.get("sfid"), 3),
        (f"IS ({evaluator}) ↑", lambda r: r.scores.get("is"), 2),
        ("temporal error ↓", lambda r: r.errors.get("temporal_relative_mse"), 5),
        ("trajectory error ↓", lambda r: r.errors.get("trajectory"), 4),
        ("weights integer", lambda r: r.quantized.get("weight_share"), 3),
        ("MACs integer", lambda r: r.quantized.get("mac_share_weights_and_inputs"), 3),
        ("outputs quantized", lambda r: r.quantized.get("mac_share_outputs"), 3),
        ("samples", lambda r: _most(r, "weight_samples", "activation_samples"), 0),
        ("iterations", lambda r: _sum(r, "weight_iterations", "activation_iterations"), 0),
        ("size / fp32", lambda r: r.cost.get("size_ratio"), 3),
        ("quantization, s", lambda r: r.cost.get("quantization_seconds"), 0),
    ]


def _most(record: ScoreRecord, *names: str) -> float | None:
    return max((record.cost[name] for name in names if name in record.cost), default=None)


def _sum(record: ScoreRecord, *names: str) -> float | None:
    found = [record.cost[name] for name in names if name in record.cost]
    return sum(found) if found else None


def cell(values: Sequence[float | None], digits: int) -> str:
    """`mean ± standard deviation` of what is there, the mean alone where all print the same; a dash when nothing is."""
    present = [v for v in values if v is not None]
    if not present:
        return "–"
    mean = f"{statistics.mean(present):.{digits}f}"
    printed = {f"{v:.{digits}f}" for v in present}
    return mean if len(printed) == 1 else f"{mean} ± {statistics.stdev(present):.{digits}f}"


def changed(record: ScoreRecord) -> dict[str, str]:
    """Choices that were changed in a method and that its name does not say: that of S_N says its N."""
    return {key: value for key, value in sorted(record.choices.items()) if record.method != f"s{value}"}


def engine_of(record: ScoreRecord) -> str:
    """The engine that executed it; empty for simulated quantization, and for the float network."""
    return record.choices.get("engine", "")


def label(record: ScoreRecord, group: str = "") -> str:
    """A method with what was changed in it, and the engine that executed it. What differs here is averaged nowhere.

    Args:
        record: of any method.
        group: of choices, whose name is left away before theirs.
    """
    choices, engine = changed(record), engine_of(record)
    inside = [key for key in choices if key.partition(".")[0] != "engine"]
    words = [f"{key.removeprefix(group).lstrip('./')}={choices[key]}" for key in inside]
    words += [f"executed by {engine}"] if engine else []
    words += [f"{key}={choices[key]}" for key in choices if key.startswith("engine.")]
    return f"{record.method} ({', '.join(words)})" if words else record.method


def names(records: Sequence[ScoreRecord]) -> list[str]:
    """The label of each record; with what tells settings apart where one label stands for several, which are no seeds of each other."""
    ways: dict[tuple[str, str], dict[str, ScoreRecord]] = {}
    for record in records:
        alike = ways.setdefault((record.quant, label(record)), {})
        alike.setdefault(json.dumps(setting(record), sort_keys=True, default=str), record)

    def name(record: ScoreRecord) -> str:
        alike = list(ways[record.quant, label(record)].values())
        words = _apart(record, alike)
        return f"{label(record)} [{words}]" if words else label(record)

    return [name(record) for record in records]


def _apart(record: ScoreRecord, alike: Sequence[ScoreRecord]) -> str:
    """What tells a record's setting from others: what was named on the command line, a hash, or effort and coverage."""
    if len(alike) < 2:
        return ""
    named = {other.settings["hash"]: other.settings["named"] for other in alike if other.settings}
    own = record.settings.get("named", "") if record.settings else "settings not noted"
    if record.settings and (not own or list(named.values()).count(own) > 1):
        own = record.settings["hash"]
    several = len(named) + any(not other.settings for other in alike)
    others = [name for name in differing([setting(other) for other in alike]) if name != "settings"]
    further = in_words(setting(record), others) if several < len(alike) else ""
    return ", ".join(filter(None, (own if several > 1 else "", further)))


def execution(records: Sequence[ScoreRecord]) -> str:
    """How the quantized rows among these were computed, for a headline: simulated, by an engine, or some either way."""
    rows = [record for record in records if record.method != "float"]
    deployed = [record for record in rows if engine_of(record)]
    if not deployed:
        return "simulated quantization"
    shares = [f"{share:.0%}" for record in deployed if (share := record.quantized.get("layers_executed")) is not None]
    shares = sorted(set(shares), key=lambda text: int(text.rstrip("%")))
    engines = " or ".join(sorted({engine_of(record) for record in deployed}))
    forms = formats(form for record in deployed for form in record.quantized.get("executed_in", ()))
    layers = f" ({shares[0] if len(shares) == 1 else f'{shares[0]} to {shares[-1]}'} of their layers)" if shares else ""
    if len(deployed) == len(rows):
        return f"executed by {engines} in {forms}{layers}"
    return f"simulated quantization; rows executed by {engines} in {forms}{layers}"


def how_made(record: ScoreRecord) -> str:
    """The protocol of a table in a line."""
    sampler = record.protocol["sampler"]
    return (
        f"{record.model}, {sampler.get('kind', sampler['class'])} {sampler['steps']} steps, eta {sampler['eta']}, "
        f"{record.protocol['images']} images, {record.evaluator['name']} against {record.evaluator['reference']}"
    )


def titles(groups: Sequence[Sequence[ScoreRecord]]) -> list[str]:
    """How the records of each table were made, with words that tell tables apart which would go by one title.

    Args:
        groups: of `by_protocol`.
    """
    plain = [how_made(group[0]) for group in groups]
    words = distinctions([group[0] for group in groups], plain)
    return [", ".join(filter(None, pair)) for pair in zip(plain, words, strict=True)]


def headline(title: str, shown: Sequence[ScoreRecord]) -> str:
    """A title with how the records in a table were computed, and where."""
    return ", ".join(filter(None, (title, execution(shown), devices(shown))))


def devices(records: Sequence[ScoreRecord]) -> str:
    """Where records were made, for a headline; empty where that is one kind of device, or where they do not say."""
    found = sorted({str(record.environment["device"]) for record in records if "device" in record.environment})
    return f"made on {' and '.join(found)}" if len(found) > 1 else ""


def formats(executed: Iterable[str]) -> str:
    """What layers are multiplied in, in words: bytes are integers, and `float` is what an engine leaves."""
    found = sorted(set(executed) - {"float"})
    return "integers" if found in ([], ["int8"]) else ", ".join(found)


def table(records: Sequence[ScoreRecord]) -> tuple[list[str], list[list[str]]]:
    """Header and rows; records of one protocol and one evaluator, float rows first.

    Raises:
        ValueError: no records, or records that were made under different protocols.
    """
    if not records:
        raise ValueError("there are no results to tabulate")
    if (protocols := len(by_protocol(records))) > 1:
        raise ValueError(f"{protocols} different protocols in one table; use `by_protocol` first")
    cols = columns(records[0].evaluator["name"])
    groups: dict[tuple[bool, str, str], list[ScoreRecord]] = {}
    for record, name in zip(records, names(records), strict=True):
        groups.setdefault((record.method != "float", record.quant, name), []).append(record)
    header = ["bits", "method", *[name for name, _, _ in cols], "seeds"]
    rows = []
    for (_, quant, name), together in sorted(
        groups.items(), key=lambda item: (item[0][0], bits_order(item[0][1]), item[0])
    ):
        members, left_out = one_per_seed(together)
        count = f"{len(members)}{_left_out(left_out)}"
        rows.append([quant, name, *[cell([read(r) for r in members], d) for _, read, d in cols], count])
    return header, rows


def _left_out(count: int) -> str:
    """Other runs with the seeds of a mean, which it does not count."""
    return f" ({count} more runs of them left out)" if count > 1 else " (1 more run of them left out)" if count else ""


def pivot(records: Sequence[ScoreRecord], score: str, methods: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """One score, or error, with a row for each pair of bits and a column for each label, as papers print ablations.

    Args:
        records: of one protocol and one evaluator.
        score: its name, or that of an error against the float network.
        methods: whose columns, in this order; a method brings all of its labels.

    Raises:
        ValueError: a method that no record is of, or a score or error that none has.
    """
    labels: dict[str, set[str]] = {}
    named = list(zip(records, names(records), strict=True))
    for record, name in named:
        labels.setdefault(record.method, set()).add(name)
    if missing := [method for method in methods if method not in labels]:
        raise ValueError(f"no results of {', '.join(missing)}; there are {', '.join(sorted(labels))}")
    known = {name: None for record in records for name in (*sorted(record.scores), *sorted(record.errors))}
    if score not in known:
        raise ValueError(f"no record has the score or error {score!r}; there are {', '.join(known)}")
    columns = [name for method in methods for name in sorted(labels[method])]
    digits = 3 if any(score in record.scores for record in records) else 4

    def value(record: ScoreRecord) -> float | None:
        return record.scores.get(score, record.errors.get(score))

    def seeds(quant: str, column: str) -> str:
        members, left_out = one_per_seed([r for r, name in named if (r.quant, name) == (quant, column)])
        return cell([value(r) for r in members], digits) + _left_out(left_out)

    rows = [
        [quant, *(seeds(quant, column) for column in columns)]
        for quant in sorted({r.quant for r in records if r.method in methods}, key=bits_order)
    ]
    return ["bits", *columns], rows


def bits_order(quant: str) -> tuple[int, ...]:
    """Sort key of names like w4a8: more bits first."""
    digits = "".join(c if c.isdigit() else " " for c in quant).split()
    return tuple(-int(d) for d in digits)


def by_protocol(records: Sequence[ScoreRecord]) -> list[list[ScoreRecord]]:
    """Records that may stand in one table."""
    groups: dict[str, list[ScoreRecord]] = {}
    for record in records:
        groups.setdefault(comparable(record), []).append(record)
    return list(groups.values())


def render(header: Sequence[str], rows: Sequence[Sequence[str]], form: str) -> str:
    """The table as text.

    Raises:
        ValueError: an unknown format.
    """
    if form == "csv":
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
        return buffer.getvalue()
    if form == "markdown":
        lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
        return "\n".join(lines) + "\n"
    raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {form!r}")
