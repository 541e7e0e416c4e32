"""Score tables: mean and standard deviation over seeds, one row for every variant of quantization."""

import csv
import io
import re
import statistics
from collections.abc import Iterable, Sequence

from tfmq_exp.report.columns import COSTS, ERRORS, SCORES, SHARES, score_columns
from tfmq_exp.report.comparability import (
    comparison_key,
    describe,
    differing_names,
    distinctions,
    group_by,
    one_per_seed,
    setting,
    setting_key,
)
from tfmq_exp.report.records import ScoreRecord

FLOAT = "float"  # the method of records of the unquantized network
FORMATS = ("markdown", "csv")


def cell(values: Sequence[float | None], digits: int) -> str:
    """`mean ± standard deviation` of the present values, the mean alone where all print the same, a dash without any."""
    present = [value for value in values if value is not None]
    return " ± ".join(filter(None, mean_and_deviation(present, digits))) if present else "–"


def mean_and_deviation(values: Sequence[float], digits: int) -> tuple[str, str]:
    """Mean and sample standard deviation in print; no deviation where all values print the same."""
    differ = len({f"{value:.{digits}f}" for value in values}) > 1
    return f"{statistics.mean(values):.{digits}f}", f"{statistics.stdev(values):.{digits}f}" if differ else ""


def bits_order(quant: str) -> tuple[int, ...]:
    """Sort key of names like w4a8: more bits first."""
    return tuple(-int(digits) for digits in re.findall(r"\d+", quant))


def changed_choices(record: ScoreRecord) -> dict[str, str]:
    """Choices that were changed in a method, without those that its name says: S_N says its N."""
    return {key: value for key, value in sorted(record.choices.items()) if record.method != f"s{value}"}


def engine_of(record: ScoreRecord) -> str:
    """The engine that executed it; empty for simulated quantization, and for the float network."""
    return record.choices.get("engine", "")


def label(record: ScoreRecord, group: str = "") -> str:
    """A method with what was changed in it, and the engine that executed it. Records of different labels are not averaged.

    Args:
        record: of any method.
        group: of choices, whose name is left away before theirs.
    """
    choices, engine = changed_choices(record), engine_of(record)
    inside = [key for key in choices if key.partition(".")[0] != "engine"]
    words = [f"{key.removeprefix(group).lstrip('./')}={choices[key]}" for key in inside]
    words += [f"executed by {engine}"] if engine else []
    words += [f"{key}={choices[key]}" for key in choices if key.startswith("engine.")]
    return f"{record.method} ({', '.join(words)})" if words else record.method


def names(records: Sequence[ScoreRecord]) -> list[str]:
    """The label of each record, with its setting where several settings share the label."""
    groups = group_by(records, lambda record: (record.quant, label(record)))
    variants = {key: [same[0] for same in group_by(group, setting_key).values()] for key, group in groups.items()}

    def name(record: ScoreRecord) -> str:
        words = _setting_words(record, variants[record.quant, label(record)])
        return f"{label(record)} [{words}]" if words else label(record)

    return [name(record) for record in records]


def _setting_words(record: ScoreRecord, others: Sequence[ScoreRecord]) -> str:
    """Text that distinguishes a record's setting from others: changed settings, a hash, or effort and coverage."""
    if len(others) < 2:
        return ""
    named = {other.settings["hash"]: other.settings["named"] for other in others if other.settings}
    own = record.settings.get("named", "") if record.settings else "settings not noted"
    if record.settings and (not own or list(named.values()).count(own) > 1):
        own = record.settings["hash"]
    count = len(named) + any(not other.settings for other in others)
    differing = [name for name in differing_names([setting(other) for other in others]) if name != "settings"]
    more = describe(setting(record), differing) if count < len(others) else ""
    return ", ".join(filter(None, (own if count > 1 else "", more)))


def executed_dtypes(executed: Iterable[str]) -> str:
    """The formats that an engine multiplies layers in; int8 is called integers, `float` is what it leaves out."""
    found = sorted(set(executed) - {"float"})
    return "integers" if found in ([], ["int8"]) else ", ".join(found)


def execution(records: Sequence[ScoreRecord]) -> str:
    """Execution of the quantized rows among these, for a headline: simulated, by an engine, or both."""
    rows = [record for record in records if record.method != FLOAT]
    deployed = [record for record in rows if engine_of(record)]
    if not deployed:
        return "simulated quantization"
    shares = [share for record in deployed if (share := record.quantized.get("layers_executed")) is not None]
    ends = dict.fromkeys(f"{share:.0%}" for share in (min(shares), max(shares))) if shares else ()
    layers = f" ({' to '.join(ends)} of their layers)" if ends else ""
    engines = " or ".join(sorted({engine_of(record) for record in deployed}))
    dtypes = executed_dtypes(dtype for record in deployed for dtype in record.quantized.get("executed_in", ()))
    simulated = "" if len(deployed) == len(rows) else "simulated quantization; rows "
    return f"{simulated}executed by {engines} in {dtypes}{layers}"


def devices(records: Sequence[ScoreRecord]) -> str:
    """Devices of the records, for a headline; empty for fewer than two kinds."""
    found = sorted({str(record.environment["device"]) for record in records if "device" in record.environment})
    return f"made on {' and '.join(found)}" if len(found) > 1 else ""


def sampling_title(record: ScoreRecord) -> str:
    """Sampler, guidance and number of images in a line; what a record does not say is left out."""
    protocol, sampler = record.protocol, record.protocol.get("sampler", {})
    kind = sampler.get("kind", sampler.get("class", ""))
    steps = f"{kind} {sampler['num_inference_steps']} steps" if "num_inference_steps" in sampler else kind
    eta = f"eta {sampler['eta']}" if "eta" in sampler else ""
    guidance = f"guidance {protocol['guidance']}" if protocol.get("guidance", 1) != 1 else ""
    return ", ".join(
        filter(None, (steps, eta, guidance, f"{protocol['images']} images" if "images" in protocol else ""))
    )


def scored_by(record: ScoreRecord) -> str:
    """Evaluator and reference."""
    return " against ".join(filter(None, (record.evaluator["name"], record.evaluator.get("reference"))))


def titles(groups: Sequence[Sequence[ScoreRecord]]) -> list[str]:
    """Titles of the groups of `by_protocol`: the protocols, in words that differ."""
    first = [group[0] for group in groups]
    plain = [f"{record.model}, {sampling_title(record)}, {scored_by(record)}" for record in first]
    return [", ".join(filter(None, pair)) for pair in zip(plain, distinctions(first, plain), strict=True)]


def headline(title: str, shown: Sequence[ScoreRecord]) -> str:
    """A title with how the records in a table were computed, and where."""
    return ", ".join(filter(None, (title, execution(shown), devices(shown))))


def by_protocol(records: Sequence[ScoreRecord]) -> list[list[ScoreRecord]]:
    """Records that may share a table."""
    return list(group_by(records, comparison_key).values())


def table(records: Sequence[ScoreRecord]) -> tuple[list[str], list[list[str]]]:
    """Header and rows; records of one protocol and one evaluator, float rows first.

    Raises:
        ValueError: no records, or records that were made under different protocols.
    """
    if not records:
        raise ValueError("there are no results to tabulate")
    if (protocols := len(by_protocol(records))) > 1:
        raise ValueError(f"{protocols} different protocols in one table; use `by_protocol` first")
    columns = [*score_columns(SCORES, records[0].evaluator["name"]), *ERRORS, *SHARES, *COSTS]
    named = zip(records, names(records), strict=True)
    groups = group_by(named, lambda pair: (pair[0].method != FLOAT, pair[0].quant, pair[1]))
    rows = []
    for key in sorted(groups, key=lambda key: (key[0], bits_order(key[1]), key)):
        members, left_out = one_per_seed([record for record, _ in groups[key]])
        numbers = [cell([column.read(record) for record in members], column.digits) for column in columns]
        rows.append([*key[1:], *numbers, f"{len(members)}{_left_out(left_out)}"])
    return ["bits", "method", *[column.heading for column in columns], "seeds"], rows


def _left_out(count: int) -> str:
    """Note on the number of runs that repeat a seed and are not in the mean; empty for none."""
    return f" ({count} more run{'s' if count > 1 else ''} of them left out)" if count else ""


def pivot(records: Sequence[ScoreRecord], score: str, methods: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """One score or error with a row for each pair of bits and a column for each label, as papers print ablations.

    Args:
        records: of one protocol and one evaluator.
        score: its name, or that of an error against the float network.
        methods: whose columns, in this order; a method brings all of its labels.

    Raises:
        ValueError: a method without records, or a score or error that none has.
    """
    named = list(zip(records, names(records), strict=True))
    labels = group_by(named, lambda pair: pair[0].method)
    if missing := [method for method in methods if method not in labels]:
        raise ValueError(f"no results of {', '.join(missing)}; there are {', '.join(sorted(labels))}")
    known = {name: None for record in records for name in (*sorted(record.scores), *sorted(record.errors))}
    if score not in known:
        raise ValueError(f"no record has the score or error {score!r}; there are {', '.join(known)}")
    columns = [name for method in methods for name in sorted({name for _, name in labels[method]})]
    digits = 3 if any(score in record.scores for record in records) else 4

    def mean(quant: str, column: str) -> str:
        members, left_out = one_per_seed([record for record, name in named if (record.quant, name) == (quant, column)])
        values = [record.scores.get(score, record.errors.get(score)) for record in members]
        return cell(values, digits) + _left_out(left_out)

    quants = sorted({record.quant for record in records if record.method in methods}, key=bits_order)
    return ["bits", *columns], [[quant, *(mean(quant, column) for column in columns)] for quant in quants]


def render(header: Sequence[str], rows: Sequence[Sequence[str]], format_name: str) -> str:
    """The table as text.

    Raises:
        ValueError: an unknown format.
    """
    if format_name == "csv":
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
        return buffer.getvalue()
    if format_name == "markdown":
        return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *rows))
    raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format_name!r}")
