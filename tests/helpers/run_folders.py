"""Fabricated run folders, and a page read back without a browser."""

import csv
import html.parser
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from tfmq_exp.report.html.page import render_page
from tfmq_exp.report.html.run_reader import read_runs
from tfmq_exp.report.published_tables import PublishedRow

PROTOCOL = {"sampler": {"class": "DDIM", "num_inference_steps": 4, "eta": 0.0}, "images": 24, "network_calls": 4}
EVALUATOR = {"name": "digits features", "reference": "scikit-learn digits"}
FID = {("a", 0): 3.0, ("a", 1): 4.5, ("b", 0): 2.0, ("b", 1): 2.25}
RELATIVE = {0: (0.5, 0.25), 1: (1.5, 0.75)}  # temporal error of a seed at t = 3 and t = 1


def row(method: str, bits: str, seed: int, fid: float, **changes: Any) -> dict[str, Any]:
    record = {
        "model": "digits",
        "quant": bits,
        "method": method,
        "seed": seed,
        "scores": {"fid": fid},
        "protocol": PROTOCOL,
        "evaluator": EVALUATOR,
        "weights_bytes": 400 if method == "float" else 100,
        "quantized": {} if method == "float" else {"mac_share_weights_and_inputs": 0.5},
        "errors": {} if method == "float" else {"trajectory": fid / 10},
    }
    return record | changes


def table(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def run(folder: Path, method: str = "a", seed: int = 0, bits: str = "w4a8", **changes: Any) -> Path:
    """A whole run folder."""
    folder.mkdir(parents=True)
    config = {
        "until": "scores",
        "seed": seed,
        "model": {"name": changes.get("model", "digits")},
        "quant": {"name": bits},
        "method": {"name": method, "iterations": {"a": 5, "b": 7}.get(method, 9), "shared": {"deep": [1, 2]}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps({"git": "c0ffee", "command": f"run.py method={method}"}))
    stages = {"weights": {"computed": seed == 0, "seconds": 1.5, "took": 2.5, "peak_mib": 900}}
    (folder / "artifacts.json").write_text(json.dumps(stages))
    rows = [
        row("float", "fp32", seed, 1.0, **changes),
        row(method, bits, seed, FID.get((method, seed), 9.0), **changes),
    ]
    (folder / "results.json").write_text(json.dumps({"rows": rows}))
    noisy, clean = RELATIVE[seed]
    table(folder / "temporal_error.csv", [{"t": 3, "relative_mse": noisy}, {"t": 1, "relative_mse": clean}])
    table(folder / "trajectory_error.csv", [{"t": t, "eps_error": 0.1, "x_error": 0.2} for t in (3, 1)])
    Image.new("RGB", (30, 20), "navy").save(folder / "samples.png")
    return folder


class Reader(html.parser.HTMLParser):
    """Texts, tables by their id, elements with their attributes, and what scripts hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[tuple[str, str]]]] = {}
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.words: list[str] = []
        self._inside = ""
        self._table = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.elements.append((tag, named))
        if tag in ("script", "style"):
            self._inside = tag
            (self.scripts if tag == "script" else self.styles).append("")
        elif tag == "table":
            self._table = named.get("id") or f"table {len(self.tables)}"
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th") and self._table:
            self.tables[self._table][-1].append(
                (next((f"{word} " for word in ("best", "close") if word in (named.get("class") or "").split()), ""), "")
            )

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag in ("script", "style") else self._inside
        self._table = "" if tag == "table" else self._table

    def handle_data(self, data: str) -> None:
        if self._inside:
            (self.scripts if self._inside == "script" else self.styles)[-1] += data
            return
        self.words.append(data)
        if self._table and self.tables[self._table] and self.tables[self._table][-1]:
            best, text = self.tables[self._table][-1][-1]
            self.tables[self._table][-1][-1] = (best, f"{text} {data}".strip())

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def figures(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Names of views and their figures."""
        for text in self.scripts:
            if text.startswith('{"views"'):
                for view in json.loads(text)["views"]:
                    yield view["name"], view["figure"]


def read(*sources: Path, published: tuple[PublishedRow, ...] = ()) -> Reader:
    return Reader(render_page(read_runs(sources), published))
