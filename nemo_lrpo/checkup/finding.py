"""One result of a check, and the table of many."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

PASS, WARN, FAIL, SKIP = "pass", "warn", "fail", "skip"
_STYLES = {PASS: "green", WARN: "yellow", FAIL: "bold red", SKIP: "dim"}


@dataclass(frozen=True)
class Finding:
    """What a check found on a node. remedy: what to do about a warning or a failure."""

    check: str
    outcome: str
    detail: str
    remedy: str = ""
    node: str = ""


@dataclass
class Findings:
    """Collects what the checks of one node find."""

    node: str
    all: list[Finding]

    def add(self, check: str, outcome: str, detail: str, remedy: str = "") -> None:
        self.all.append(Finding(check, outcome, detail, remedy, self.node))

    @contextmanager
    def checking(self, check: str, *expected: type[BaseException]) -> Iterator[None]:
        """An `expected` error inside is a failure in its own words, any other one a failure with its type."""
        try:
            yield
        except expected as error:
            self.add(check, FAIL, str(error))
        except Exception as error:
            self.add(check, FAIL, f"could not be checked: {type(error).__name__}: {error}")


def failed(findings: Iterable[Finding]) -> bool:
    """Whether a run should not start."""
    return any(finding.outcome == FAIL for finding in findings)


def print_table(findings: Sequence[Finding], nodes: Sequence[str], console: Console | None = None) -> None:
    """One row for what was found alike on several of `nodes`; remedies under the detail."""
    table = Table(show_lines=False, pad_edge=False)
    for title in ("check", "", "where", "found"):
        table.add_column(title, overflow="fold")
    for (check, outcome, detail, remedy), where in _alike(findings).items():
        place = "all nodes" if len(nodes) > 1 and set(where) == set(nodes) else ", ".join(where)
        text = f"{detail}\n-> {remedy}" if remedy and outcome in (WARN, FAIL) else detail
        table.add_row(check, f"[{_STYLES[outcome]}]{outcome}[/]", place, _plain(text))
    if console is None:
        console = Console()
        if not console.is_terminal:
            # In a log: as wide as our lines, whatever the variable COLUMNS says.
            console = Console(width=120)
    console.print(table)


def _alike(findings: Iterable[Finding]) -> dict[tuple[str, str, str, str], list[str]]:
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    order: list[str] = []
    for finding in findings:
        groups.setdefault((finding.check, finding.outcome, finding.detail, finding.remedy), []).append(finding.node)
        if finding.check not in order:
            order.append(finding.check)
    return dict(sorted(groups.items(), key=lambda item: order.index(item[0][0])))


def _plain(text: str) -> str:
    """Square brackets mean markup to rich."""
    return text.replace("[", r"\[")
