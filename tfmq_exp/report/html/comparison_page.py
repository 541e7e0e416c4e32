"""The page of a comparison: distances from the float images, methods against each other, and pairs to look at."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tfmq_exp.report.html.environment import page_environment
from tfmq_exp.report.image_distances import DISTANCES, FLOAT_AGAIN
from tfmq_exp.report.paired_tables import NetworkImages, Table, distance_table, distances_in, paired_table

SHOWN = 6  # pairs of each heading
MAX_SIDE, LOSSLESS_SIDE = 768, 128  # pixels: of a picture in the page; of one that is kept as PNG
CARD, SMALL_CARD = 340, 160  # pixels: least width of a pair at first; of pairs of small images
QUALITY = 88  # of WebP
BRIGHTEST = 255
Pixels = UInt8[np.ndarray, "height width 3"]


class Pair(NamedTuple):
    """A float image and another network's of the same noise."""

    name: str
    caption: str  # what the image was made from; may be empty
    exact: Pixels
    image: Pixels
    values: Mapping[str, float]  # by distance


def order_distance(networks: Sequence[NetworkImages]) -> str:
    """The distance that pairs are sorted by: LPIPS where there is one, else PSNR."""
    found = distances_in(networks)
    return next((name for name in found if name.startswith("lpips")), "psnr")


def chosen_pairs(values: Sequence[float], better: str, count: int = SHOWN) -> dict[str, list[int]]:
    """Indices of the pairs that are farthest apart, in the middle, and closest, by heading; a pair is shown once."""
    order = np.argsort(values, kind="stable")
    order = (order if better == "↑" else order[::-1]).tolist()  # farthest first
    each = min(count, max(1, len(order) // 3)) if len(order) > 2 else 1
    start = (len(order) - each) // 2
    parts = {"Farthest apart": order[:each], "In the middle": order[start : start + each], "Closest": order[-each:]}
    seen: set[int] = set()
    found = {heading: [i for i in part if not (i in seen or seen.add(i))] for heading, part in parts.items()}
    return {heading: part for heading, part in found.items() if part}


def difference_map(exact: Pixels, image: Pixels) -> tuple[Pixels, int]:
    """Largest difference over the channels, multiplied so that the largest is bright, and that whole factor."""
    difference = np.abs(exact.astype(np.int16) - image.astype(np.int16)).max(2)
    gain = max(1, BRIGHTEST // max(1, int(difference.max())))
    return np.repeat((difference * gain).astype(np.uint8)[..., None], 3, axis=2), gain


def inline(pixels: Pixels) -> str:
    """An image as the page has it: PNG of small ones, WebP of others, of at most `MAX_SIDE` pixels a side."""
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    kind = "PNG" if max(image.size) <= LOSSLESS_SIDE else "WEBP"
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    image.save(buffer, kind, **({} if kind == "PNG" else {"quality": QUALITY, "method": 4}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def card(pair: Pair) -> dict[str, Any]:
    """A pair as the template shows it."""
    difference, gain = difference_map(pair.exact, pair.image)
    height, width = pair.exact.shape[:2]
    values = [f"{DISTANCES[name].title} {value:.{DISTANCES[name].digits}f}" for name, value in pair.values.items()]
    pictures = {"exact": pair.exact, "other": pair.image, "map": difference}
    uris = {name: inline(pixels) for name, pixels in pictures.items()}
    return {
        **{"name": pair.name, "caption": pair.caption, "values": values, "gain": gain, **uris},
        **{"width": width, "height": height, "pixelated": max(width, height) <= LOSSLESS_SIDE},
    }


def numbered(table: Table) -> dict[str, Any]:
    """A table whose cells have their first word's number, by which the page sorts a column where all cells have one."""
    header, rows = table
    cells = [[(text, _number(text)) for text in row] for row in rows]
    numeric = [all(row[i][1] is not None for row in cells) for i in range(len(header))]
    floats = [any(text.startswith(FLOAT_AGAIN) for text in row) for row in rows]
    return {"header": list(zip(header, numeric, strict=True)), "rows": list(zip(floats, cells, strict=True))}


def _number(text: str) -> float | None:
    try:
        return float(text.partition(" ")[0])
    except ValueError:
        return None


def render_comparison(
    title: str,
    lead: str,
    networks: Sequence[NetworkImages],
    pairs: Mapping[str, Mapping[str, Sequence[Pair]]],
    against: str | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Render the page.

    Args:
        title: of the page.
        lead: what is compared, in a sentence.
        networks: with their distances from the float images.
        pairs: by network and heading.
        against: the reference of paired differences; None for the best of the same bits.
        notes: further sentences on how the numbers were made.
    """
    order = order_distance(networks)
    tables = {name: paired_table(networks, name, against) for name in distances_in(networks)}
    cards = {name: {head: list(map(card, some)) for head, some in groups.items()} for name, groups in pairs.items()}
    small = all(one["pixelated"] for groups in cards.values() for some in groups.values() for one in some)
    size = SMALL_CARD if small else CARD
    return (
        page_environment()
        .get_template("comparison.html.j2")
        .render(
            **{"title": title, "lead": lead, "notes": notes, "cards": cards},
            ordered_by=DISTANCES[order].title,
            distances=numbered(distance_table(networks)),
            size=size,
            has_floor=any(network.floor for network in networks),
            paired={DISTANCES[name].title: numbered(table) for name, table in tables.items() if table[1]},
        )
    )
