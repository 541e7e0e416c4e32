"""A page in a headless browser, driven over its debugging protocol."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 60  # seconds


@dataclass
class Tab:
    """A page of a browser, spoken to by its protocol; `said` has what it said meanwhile."""

    socket: Any
    said: list[dict[str, Any]]
    numbers: Iterator[int]

    async def order(self, method: str, **given: Any) -> dict[str, Any]:
        number = next(self.numbers)
        await self.socket.send_json({"id": number, "method": method, "params": given})
        while True:
            answer = json.loads((await self.socket.receive(timeout=PATIENCE)).data)
            if answer.get("id") == number:
                return answer["result"]
            self.said.append(answer)

    async def value(self, program: str) -> Any:
        answer = await self.order("Runtime.evaluate", expression=program, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def show(self, path: Path, width: int, scheme: str) -> None:
        """Open the page, and wait until its charts are drawn."""
        await self.order(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.order("Emulation.setEmulatedMedia", features=features)
        await self.order("Page.navigate", url=path.as_uri())
        for _ in range(10 * PATIENCE):
            if await self.value("document.body?.dataset.charts ?? ''") == "drawn":
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"the charts were not drawn: {self.said}")


async def listening(file: Path) -> str:
    """The port that the browser writes into a file once it listens."""
    for _ in range(10 * PATIENCE):
        if file.is_file() and (lines := file.read_text().splitlines()):
            return lines[0]
        await asyncio.sleep(0.1)
    raise AssertionError("the browser did not start")
