"""Running steps within a total time, most valuable first; the standard library only.

Each step gets what its limit and the time left allow, less what later steps are sure of. Its result
is in gpu.json as soon as it is known, and what a stopped step had written is kept.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TAIL = 30  # lines of a step's output kept in gpu.json
SHORTEST = 5.0  # seconds with which a step is still begun


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Attributes:
        name: in gpu.json and for --only.
        command: its arguments; None with ``missing`` for a step that cannot run here.
        limit: seconds it may take at most.
        least: seconds kept for it while earlier steps run.
        result: reads what it wrote, also after it was stopped; None when that is its exit code.
        missing: why it cannot run here.
        needs: an earlier step without whose success this one would run something else.
    """

    name: str
    command: Sequence[str] | None
    limit: float
    least: float = 0.0
    result: Callable[[str], Any] | None = None
    missing: str = ""
    needs: str = ""


@dataclass
class Run:
    """Runs steps within a total time and writes results after each of them.

    A step's status is ``ok``, ``failed``, ``stopped`` (its time was up), ``no time`` (not begun for
    lack of it), ``blocked`` (not begun: what it needs did not succeed) or ``skipped`` (it cannot
    run on this machine).

    ``clock`` and ``execute`` are there for tests; ``execute(command, seconds, environment, log)``
    returns the exit code, None when it was stopped, and the output.
    """

    output: Path
    environment: dict[str, str]
    total: float
    clock: Callable[[], float] = time.monotonic
    execute: Callable[..., tuple[int | None, str]] = field(default_factory=lambda: execute)
    facts: dict[str, Any] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)

    def go(self, steps: Sequence[Step]) -> bool:
        """Run the steps in order; whether all succeeded that can run on this machine."""
        began = self.clock()
        self._write("running")
        for index, step in enumerate(steps):
            left = self.total - (self.clock() - began)
            allowed = allowance(step, steps[index + 1 :], left)
            self.results.append(self._one(step, allowed))
            self._write("running")
            last = self.results[-1]
            print(f"{last['name']}: {last['status']}, {last['seconds']:.0f} s", flush=True)
        self._write("done")
        return all(result["status"] in ("ok", "skipped") for result in self.results)

    def _one(self, step: Step, allowed: float) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": step.name, "status": "skipped", "seconds": 0.0}
        if step.command is None:
            return entry | {"reason": step.missing}
        for earlier in self.results:
            if earlier["name"] == step.needs and earlier["status"] != "ok":
                reason = f"needs {step.needs}: {earlier['status']}"
                return entry | {"status": "blocked", "reason": reason}
        if allowed < SHORTEST:
            return entry | {"status": "no time", "reason": f"{allowed:.0f} s were left for it"}
        start = self.clock()
        code, text = self.execute(step.command, allowed, self.environment, self.output / "log.txt")
        status = {0: "ok", None: "stopped"}.get(code, "failed")
        entry |= {
            "status": status,
            "seconds": round(self.clock() - start, 1),
            "limit": round(allowed, 1),
            "code": code,
            "command": list(step.command),
            "tail": text.splitlines()[-TAIL:],
        }
        if step.result is not None:
            try:
                entry["result"] = step.result(text)
            except (OSError, ValueError) as error:
                entry["result"] = None
                entry["reason"] = f"no result to read: {error}"
        return entry

    def _write(self, state: str) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        found = {"schema": 1, "state": state, **self.facts, "steps": self.results}
        part = self.output / ".gpu.json.part"
        part.write_text(json.dumps(found, indent=1), encoding="utf-8")
        part.replace(self.output / "gpu.json")

    def table(self) -> str:
        """The results, a line a step."""
        width = max(len(result["name"]) for result in self.results)
        lines = []
        for result in self.results:
            detail = result.get("reason") or brief(result.get("result"))
            lines.append(
                f"{result['name']:{width}}  {result['status']:7}  {result['seconds']:5.0f} s  "
                f"{detail}".rstrip()
            )
        return "\n".join(lines)


def allowance(step: Step, later: Sequence[Step], left: float) -> float:
    """Seconds a step gets: its limit, or what is left less what later steps are sure of."""
    kept = sum(other.least for other in later if other.command is not None)
    return max(0.0, min(step.limit, left - kept))


def execute(
    command: Sequence[str], seconds: float, environment: dict[str, str], log: Path
) -> tuple[int | None, str]:
    """Run a command with all it starts in a process group; kill the group when time is up."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        stream.write(f"\n== {' '.join(command)}\n".encode())
        stream.flush()
        begins = stream.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT,
            process_group=0,
        )  # fmt: skip
        code: int | None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also when this process is told to end
            _end(process)
    with log.open("rb") as stream:
        stream.seek(begins)
        return code, stream.read().decode("utf-8", "replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of the group has ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def brief(result: Any) -> str:
    """A result in a few words."""
    if not isinstance(result, dict):
        return ""
    counts = {name: value for name, value in result.items() if type(value) is int}
    return ", ".join(f"{value} {name}" for name, value in counts.items() if name != "schema")
