"""Kill runs at random moments, and turn single bits of what they have stored: the results are those of undisturbed runs.

    python scripts/check_resume.py kills [--count 100] [--seed 0]
    python scripts/check_resume.py flips [--count 300] [--seed 0]

`kills` starts a run in an empty store, kills it (SIGKILL) after a random time, and starts it again until it ends by itself.
`flips` turns a bit of a file of a finished run, or of one that was killed in the middle of a stage, and runs the same command.
Then every stage's files and the run's results must be those of the undisturbed run, or the error of the run names the damaged
file; else the exit status is 1. At smoke size, one run after the other, in forks of this process, which has imported everything.
"""

import argparse
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tfmq_exp.cli.main  # noqa: F401  # so that forks need not
from tfmq_exp.core.files import sha256_of

ROOT = Path(__file__).parents[1]
CONFIGURATIONS = {
    "nearest w8a8": ("method=nearest", "quant=w8a8"),
    "brecq w4a8": ("method=brecq", "quant=w4a8"),
    "lsq w4a4 on images": ("method=lsq", "quant=w4a4", "runtime.checkpoint_every_min=0"),
    "diagnosis of tfmq": ("method=tfmq", "until=diagnose"),
    "tfmq by two processes": ("method=tfmq", "runtime.processes=2"),
}
# Where runs are killed for `flips`: configuration, and files of one stage that are there before it is finished.
BROKEN_OFF = (
    ("brecq w4a8", "trajectory/*/inputs.json", 1),
    ("brecq w4a8", "weights/*/units/*.safetensors", 4),
    ("brecq w4a8", "activations/*/units/*.safetensors", 4),
    ("brecq w4a8", "images/*/images-*.safetensors", 2),
    ("lsq w4a4 on images", "examples/*/batches.sha256", 1),
    ("lsq w4a4 on images", "weights/*/checkpoints/*.ckpt", 1),
    ("diagnosis of tfmq", "diagnosis_sensitivity/*/units/*.json", 4),
)
TIMES = {"manifest.json", "units.json"}  # say how long something took
LIMIT = 600.0  # seconds after which a run is stuck


@dataclass(frozen=True)
class Outcome:
    """End of a run: exit status (negative: the signal), seconds, output, and whether a process of it was left running."""

    status: int
    seconds: float
    said: str
    stuck: bool


def start(folder: Path, overrides: Sequence[str]) -> int:
    """Run `run.py` in a fork, with a store and a run folder below `folder`; returns the process."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    if process := os.fork():
        return process
    status = 1
    try:
        os.setsid()
        target = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(target, stream)
        usual = ("model=digits", "debug=smoke", "runtime.threads=1", f"paths.outputs={folder}")
        sys.argv = [str(ROOT / "run.py"), *usual, f"hydra.run.dir={folder}/run", *overrides]
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(status)


def finish(process: int, folder: Path, kill: Callable[[float], bool] = lambda seconds: seconds > LIMIT) -> Outcome:
    """Wait for a run, or kill it as soon as `kill` says so of its seconds."""
    began, killed = time.monotonic(), False
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        seconds = time.monotonic() - began
        if ended:
            said = (folder / "said").read_text(encoding="utf-8", errors="replace")
            return Outcome(os.waitstatus_to_exitcode(status), seconds, said, left_behind(process))
        if not killed and (killed := kill(seconds)):
            os.kill(process, signal.SIGKILL)
        time.sleep(0.002)


def left_behind(group: int) -> bool:
    """Whether processes of a run are there still, a while after its first one; they are ended."""
    try:
        for _ in range(600):
            os.killpg(group, 0)
            time.sleep(0.1)
    except ProcessLookupError:
        return False
    os.killpg(group, signal.SIGKILL)
    return True


def result(folder: Path) -> dict[str, str]:
    """Hash of everything that must be the same: files of finished stages, and what the run says of them."""
    paths = [*(folder / "run").glob("*_error.csv"), *(folder / "run").glob("diagnosis/*.csv")]
    for manifest in folder.glob("store/*/*/manifest.json"):
        if manifest.parts[-3] != "jobs":
            paths += [path for path in manifest.parent.iterdir() if path.is_file() and path.name not in TIMES]
    found = {str(path.relative_to(folder)): sha256_of(path) for path in paths}
    stages = json.loads((folder / "run/artifacts.json").read_text(encoding="utf-8"))
    found["artifacts.json"] = json.dumps({name: stage["key"] for name, stage in stages.items()}, sort_keys=True)
    if (path := folder / "run/results.json").is_file():
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        found["results.json"] = json.dumps(list(map(without_times, rows)), sort_keys=True)
    return found


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `results.json` without seconds, memory and paths."""
    cost = {name: value for name, value in row["cost"].items() if "seconds" not in name and name != "peak_mib"}
    keys = {"stages": {name: stage["key"] for name, stage in cost["stages"].items()}} if "stages" in cost else {}
    environment = {name: value for name, value in row["environment"].items() if name not in ("command", "git")}
    return {**row, "cost": cost | keys, "environment": environment}


def differences(folder: Path, expected: dict[str, str], but: str = "") -> str:
    """Names of the results of a run that differ from the expected ones, in a line; empty if none does. `but` is not compared."""
    found = result(folder)
    wrong = sorted(name for name in (found.keys() | expected.keys()) - {but} if found.get(name) != expected.get(name))
    return ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def undisturbed(home: Path, name: str) -> tuple[dict[str, str], float]:
    """Results and seconds of a run of a configuration in peace; its store stays in `home`/`name`."""
    folder = home / name
    if (outcome := finish(start(folder, CONFIGURATIONS[name]), folder)).status:
        raise RuntimeError(f"{name} fails undisturbed: {outcome.said}")
    return result(folder), outcome.seconds


def kills(home: Path, count: int, draw: random.Random) -> list[str]:
    """Kill runs; returns what went wrong."""
    print("configuration | kills | runs to their end | as undisturbed", "---|---:|---:|---:", sep="\n")
    problems = list[str]()
    for i, (name, overrides) in enumerate(CONFIGURATIONS.items()):
        expected, seconds = undisturbed(home, name)
        share = count // len(CONFIGURATIONS) + (i < count % len(CONFIGURATIONS))
        killed, ended, good, folder = 0, 0, 0, home / "killed"
        while killed < share or folder.exists():
            moment = LIMIT if (last := killed == share) else draw.uniform(0, 1.1 * seconds)
            outcome = finish(start(folder, overrides), folder, lambda s, moment=moment: s > moment)
            problems += [f"{name}, after {killed} kills: a process is stuck"] if outcome.stuck else []
            if outcome.status == -signal.SIGKILL and not last:
                killed += 1
                continue
            wrong = outcome.said.strip()[-300:] if outcome.status else differences(folder, expected)
            ended, good = ended + 1, good + (not wrong)
            problems += [f"{name}, after {killed} kills: {wrong}"] if wrong else []
            shutil.rmtree(folder)
        print(name, killed, ended, good, sep=" | ", flush=True)
    return problems


def broken_off(folder: Path, name: str, pattern: str, files: int) -> None:
    """A run that was killed when the store had so many files of a stage that is not finished."""
    unfinished = pattern.split("/")[0] + "/*/manifest.json"

    def there(seconds: float) -> bool:
        found, finished = (list((folder / "store").glob(what)) for what in (pattern, unfinished))
        return (len(found) >= files and not finished) or seconds > LIMIT

    for _ in range(9):  # it may be finished before it is killed
        finish(start(folder, CONFIGURATIONS[name]), folder, there)
        if not list((folder / "store").glob(unfinished)):
            return
        shutil.rmtree(folder)
    raise RuntimeError(f"{name} was never killed between {pattern} and {unfinished}")


def flips(home: Path, count: int, draw: random.Random) -> list[str]:
    """Turn bits; returns what went wrong."""
    expected = {name: undisturbed(home, name)[0] for name in sorted({name for name, *_ in BROKEN_OFF})}
    states = [(name, "finished", home / name) for name in expected]
    for i, (name, pattern, files) in enumerate(BROKEN_OFF):
        broken_off(home / f"broken-{i}", name, pattern, files)
        states.append((name, f"broken off in {pattern.split('/')[0]}", home / f"broken-{i}"))
    seen, problems = dict[str, Counter[str]](), list[str]()
    for number in range(count):
        name, state, source = states[number % len(states)]
        folder = home / "flipped"
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("run"))
        path, bit = flip(folder / "store", draw, jobs=number // len(states) % 4 == 3)
        sealed = any((above / "manifest.json").is_file() for above in path.parents)  # not read, it stays as it is
        if path.parts[-3] != "jobs":
            shutil.rmtree(folder / "store/jobs", ignore_errors=True)  # else the stages would not be looked at
        outcome = finish(start(folder, CONFIGURATIONS[name]), folder)
        what, place = "as undisturbed", str(path.relative_to(folder))
        if outcome.status:
            what = "named" if path.name in outcome.said and "error:" in outcome.said else "another error"
        elif wrong := differences(folder, expected[name], but=place if sealed else ""):
            what = f"USED: {wrong}"
        if what not in ("as undisturbed", "named"):
            problems.append(f"{name}, {state}, {place} bit {bit}: {what} {outcome.said.strip()[-300:]}")
        seen.setdefault(f"{name}, {state}", Counter())[what.split(":")[0]] += 1
        shutil.rmtree(folder)
    print(
        "state | flips | named in an error | made again, or not read: as undisturbed | wrong\n---|---:|---:|---:|---:"
    )
    for state, counts in seen.items():
        good = counts["named"], counts["as undisturbed"]
        print(state, counts.total(), *good, counts.total() - sum(good), sep=" | ")
    return problems


def flip(store: Path, draw: random.Random, *, jobs: bool) -> tuple[Path, int]:
    """Turn one bit of a file: of records of finished jobs, if there are any and they are asked for, or of stages."""
    paths = sorted(path for path in store.rglob("*") if path.is_file() and path.stat().st_size)
    records = [path for path in paths if path.is_relative_to(store / "jobs")]
    path = draw.choice(records if jobs and records else [path for path in paths if path not in records])
    content = bytearray(path.read_bytes())
    content[(bit := draw.randrange(8 * len(content))) // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return path, bit


def main() -> int:
    """Disturb, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "flips"))
    parser.add_argument("--count", type=int, help="kills (100), or bits (300)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, files and bits")
    args = parser.parse_args()
    disturb, usual = {"kills": (kills, 100), "flips": (flips, 300)}[args.what]
    with tempfile.TemporaryDirectory(prefix="tfmq-resume-") as home:
        problems = disturb(Path(home), args.count or usual, random.Random(args.seed))
    print(*(f"WRONG: {problem}\n" for problem in problems), sep="", end="")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
