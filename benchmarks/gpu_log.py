"""A pytest plugin of `make gpu`: a JSON line for each test as soon as it has run.

    pytest -p benchmarks.gpu_log --test-log=FILE --chunk=NAME

Each line has chunk, test, outcome (passed, failed, skipped), seconds, message.
"""

import json
import time

import pytest

MESSAGE = 400  # characters


def pytest_addoption(parser: pytest.Parser) -> None:
    """The two options."""
    parser.addoption("--test-log", default=None, help="file to append a JSON line a test to")
    parser.addoption("--chunk", default="", help="written into each line")


class Log:
    """Writes the lines; under xdist the controller does, the workers do not."""

    def __init__(self, path: str, chunk: str) -> None:
        self.path, self.chunk = path, chunk

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One line when a test has run, was skipped, or broke before or after."""
        if report.when == "call" or report.outcome != "passed":
            self._line(report.nodeid, report.outcome, report.duration, report.longreprtext)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported is a failed test."""
        if report.failed:
            self._line(report.nodeid, "failed", 0.0, report.longreprtext)

    def _line(self, test: str, outcome: str, seconds: float, text: str) -> None:
        message = "" if outcome == "passed" else text.strip()[-MESSAGE:]
        entry = {
            "chunk": self.chunk,
            "test": test,
            "outcome": outcome,
            "seconds": round(seconds, 3),
            "message": message,
            "time": round(time.time(), 1),
        }
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """Register the log where a file was named and this is no worker."""
    path = config.getoption("--test-log")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Log(path, config.getoption("--chunk")))
