"""The page of a real run, made by the script and opened in a browser: wide, as narrow as a phone, and in the dark."""

import asyncio
import itertools
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.jobs import job
from tests.e2e.test_scripts import call
from tests.helpers.browser import Tab, listening
from tfmq_exp.core.files import read_record, write_record

aiohttp = pytest.importorskip("aiohttp", reason="no client of websockets to speak with a browser")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHARTS = """[...document.querySelectorAll('.plot')].map(p => {
  const box = p.querySelector('svg.main-svg')?.getBoundingClientRect();
  const room = p.getBoundingClientRect();
  return [p.getAttribute('aria-label'), box?.width ?? 0, box?.height ?? 0, room.width,
          p.querySelectorAll('.scatterlayer .trace, .barlayer .trace').length];
})"""
COLUMN = "[...document.querySelectorAll('#table-1 tbody tr')].map(row => row.children[{}].textContent.trim())"
TABLE_ROOM = "(() => { const room = document.querySelector('#table-1').parentElement; return [room.scrollWidth, room.clientWidth] })()"
WIDE_ROOM = "[document.documentElement.scrollWidth, innerWidth]"


@dataclass(frozen=True)
class Seen:
    """What the browser saw."""

    room: dict[str, list[int]]
    table: list[int]
    charts: dict[str, list[list[Any]]]
    before: list[str]
    ascending: list[str]
    descending: list[str]
    keyboard: list[str]
    filtered: list[str]
    switched: list[str]
    background: dict[str, str]
    said: list[dict[str, Any]]


async def look(browser: str, path: Path, profile: Path) -> Seen:
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run")
    process = subprocess.Popen(
        [browser, *options, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.DEVNULL
    )
    try:
        port = await listening(profile / "DevToolsActivePort")
        async with aiohttp.ClientSession() as session:
            pages = await (await session.get(f"http://127.0.0.1:{port}/json")).json()
            place = next(page for page in pages if page["type"] == "page")["webSocketDebuggerUrl"]
            tab = Tab(await session.ws_connect(place, max_msg_size=0), [], itertools.count(1))
            for domain in ("Runtime", "Log", "Page", "Network"):
                await tab.order(f"{domain}.enable")
            return await visit(tab, path)
    finally:
        process.terminate()
        process.wait()


async def visit(tab: Tab, path: Path) -> Seen:
    room, charts, background = {}, {}, {}
    for name, width, scheme in (("phone", 390, "dark"), ("wide", 1440, "light")):
        await tab.show(path, width, scheme)
        room[name], charts[name] = await tab.value(WIDE_ROOM), await tab.value(CHARTS)
        background[name] = await tab.value("getComputedStyle(document.body).backgroundColor")
    table = await tab.value(TABLE_ROOM)
    fid = await tab.value("[...document.querySelectorAll('#table-1 th')].findIndex(h => h.innerText.startsWith('FID'))")
    column, button = COLUMN.format(fid), f"document.querySelectorAll('#table-1 th')[{fid}].querySelector('button')"
    before = await tab.value(column)
    await tab.value(f"{button}.click()")
    ascending = await tab.value(column)
    await tab.value(f"{button}.click()")
    descending = await tab.value(column)
    await tab.value(f"{button}.focus()")
    for kind in ("keyDown", "keyUp"):
        await tab.order(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
        )
    keyboard = await tab.value(column)
    await tab.value(
        "{const f = document.getElementById('filter-1'); f.value = 'W3A8'; f.dispatchEvent(new Event('input'))}"
    )
    filtered = await tab.value("[...document.querySelectorAll('#table-1 tbody tr:not(.hidden)')].map(r => r.innerText)")
    title = "document.querySelector('.plot .ytitle').textContent"
    switched = [await tab.value(title)]
    await tab.value("document.querySelectorAll('.views button')[1].click()")
    await asyncio.sleep(0.5)
    switched.append(await tab.value(title))
    return Seen(room, table, charts, before, ascending, descending, keyboard, filtered, switched, background, tab.said)


def altered(run: Path, target: Path, bits: str, seed: int, fid: float) -> None:
    """The same run with another record."""
    shutil.copytree(run, target)
    found = read_record(target / "results.json")
    for row in found["rows"]:
        row["seed"] = seed
    found["rows"][-1] |= {
        "quant": bits,
        "scores": found["rows"][-1]["scores"] | {"fid": fid},
        "keys": {"seed": str(seed)},
    }
    write_record(target / "results.json", found)


def executed(run: Path) -> None:
    """As if an engine had executed the run's model, too."""
    found = read_record(run / "results.json")
    scores = found["rows"][-1]["scores"] | {"fid": 41.0}
    found["rows"].append(
        found["rows"][-1]
        | {"scores": scores, "choices": {"engine": "an_engine"}, "quantized": {"layers_executed": 0.5}}
    )
    write_record(run / "results.json", found)
    layers = "".join(f"{'long_name_of_a_block.' * 4}{number},res_conv,int8,4,\n" for number in range(9))
    (run / "sites.csv").write_text(
        f"site,role,executed,weight_bits,why\n{layers}conv_in,stem,float,32,it is not quantized\n"
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    made = job(
        root / "job", "debug=smoke", "method=tfmq", "protocol.sampling.images=8", "protocol.reconstruction.iterations=2"
    )
    for number, (bits, seed, fid) in enumerate([("w4a8", 1, 40.0), ("w3a8", 0, 7.0), ("w3a8", 1, 9.0)]):
        altered(made, root / "sweep" / str(number), bits, seed, fid)
    executed(root / "sweep" / "0")
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, "report", str(made), str(root / "sweep"), "-o", str(root / "report.html")) == 0
    return root / "report.html"


@pytest.fixture(scope="module")
def seen(report: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on PATH")
    return asyncio.run(look(browser, report, tmp_path_factory.mktemp("profile")))


def test_no_page_is_wider_than_its_window(seen: Seen) -> None:
    assert seen.room["phone"][1] == 390
    for content, window in seen.room.values():
        assert content <= window


def test_what_is_in_integers_is_beside_the_charts(report: Path) -> None:
    text = report.read_text()
    assert "9 of 10 layers in integers" in text
    assert "executed by an_engine" in text


def test_the_scores_of_a_run_need_no_scrolling_on_a_wide_screen(seen: Seen) -> None:
    content, window = seen.table
    assert content <= window


def test_every_chart_is_drawn_within_its_room(seen: Seen) -> None:
    for charts in seen.charts.values():
        assert {name for name, *_ in charts} >= {
            "Scores against bits",
            "Quality against cost",
            "Temporal-feature error per timestep",
            "Trajectory error along the steps",
            "Reconstruction error per unit",
            "Stages",
        }
        for name, width, height, room, traces in charts:
            assert 200 < width <= room + 1, name
            assert height > 150, name
            assert traces > 0, name


def test_a_column_sorts_by_its_numbers_with_mouse_and_keyboard(seen: Seen) -> None:
    def numbers(texts: list[str]) -> list[float]:
        return [float(text.split("±")[0].strip()) for text in texts]

    assert numbers(seen.ascending) == sorted(numbers(seen.before))
    assert numbers(seen.descending) == sorted(numbers(seen.before), reverse=True)
    assert seen.ascending != seen.before
    assert seen.keyboard == seen.ascending


def test_lines_are_filtered_by_words(seen: Seen) -> None:
    assert len(seen.filtered) == 1
    assert seen.filtered[0].startswith("w3a8")


def test_a_chart_shows_another_score_on_request(seen: Seen) -> None:
    assert [text.partition(" ")[0] for text in seen.switched] == ["FID", "sFID"]


def test_the_page_follows_the_readers_choice_of_light_and_dark(seen: Seen) -> None:
    def brightness(colour: str) -> int:
        return sum(int(part) for part in re.findall(r"\d+", colour)[:3])

    assert brightness(seen.background["phone"]) < 150
    assert brightness(seen.background["wide"]) > 700


def test_nothing_goes_wrong_and_nothing_is_fetched(seen: Seen) -> None:
    wrong = [event for event in seen.said if event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]
    spoken = [event for event in seen.said if event.get("method") == "Runtime.consoleAPICalled"]
    asked = [e["params"]["request"]["url"] for e in seen.said if e.get("method") == "Network.requestWillBeSent"]
    assert wrong == []
    assert [event for event in spoken if event["params"]["type"] in ("error", "warning", "assert")] == []
    assert asked
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)


def test_a_folder_without_runs_is_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "report", str(tmp_path), "-o", str(tmp_path / "report.html")) == 1
    assert "no folder of a run" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
