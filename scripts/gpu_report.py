# SPDX-License-Identifier: Apache-2.0
"""REPORT.md, one page on what ``gpu_check.sh`` found, made from the folder that it leaves.

python scripts/gpu_report.py FOLDER

Read are machine.txt (facts, a line each, up to the first empty line), steps.tsv (name, exit code and seconds of each step), the
steps' outputs NAME.txt, and results.json of the benchmarks where there is one. Only the standard library is needed: the page is
made where the build itself has failed, too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

LINES, LINES_OF_FAILED = 3, 25  # of a step's output, its last ones
WEAKEST = 10
# Exit codes that a shell gives beside those of the programs.
MEANINGS = {"124": "out of time", "127": "not found", "130": "stopped", "137": "killed, perhaps for want of memory"}


class Step(NamedTuple):
    name: str
    code: str
    seconds: str

    @property
    def result(self) -> str:
        if self.code == "0":
            return "passed"
        meaning = MEANINGS.get(self.code)
        return f"**failed** (exit code {self.code}{f': {meaning}' if meaning else ''})"


def report(folder: Path) -> str:
    """The page."""
    steps = [Step(*line.split("\t")) for line in _text(folder / "steps.tsv").splitlines()]
    failed = [step for step in steps if step.code != "0"]
    facts = _text(folder / "machine.txt").split("\n\n")[0].splitlines()
    title = f"{len(failed)} of {len(steps)} steps failed" if failed else f"all {len(steps)} steps passed"
    parts = [
        f"# GPU check: {title}",
        "\n".join(f"- {fact}" for fact in facts) or "- no facts of the machine were found",
    ]
    parts.append(
        _table(["step", "result", "minutes"], [[s.name, s.result, f"{float(s.seconds) / 60:.1f}"] for s in steps])
    )
    for step in (*failed, *(step for step in steps if step.code == "0")):
        output = _text(folder / f"{step.name}.txt").rstrip().splitlines()
        last = output[-(LINES if step.code == "0" else LINES_OF_FAILED) :] or ["(no output)"]
        parts.append("\n".join([f"## {step.name}: {step.result}", "", "```", *last, "```"]))
    parts += ["## Benchmarks", *_benchmarks(folder / "results.json"), "## What to do", _advice(folder, failed)]
    return "\n\n".join(parts) + "\n"


def _benchmarks(file: Path) -> list[str]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return ["There are no results."]
    parts = [] if content["complete"] else ["**The run was stopped before its end.**"]
    parts += [f"- **failed**: {case}: {why}" for case, why in content["failed"].items()]
    ratios, shares = {}, {}  # the weakest of each bench and peer, and of each bench
    for record in content["records"]:
        bench, key = record["bench"], record["key"]
        for peer, ratio in record["ratios"].items():
            if ratio is not None:
                ratios[bench, peer] = max(ratios.get((bench, peer), (ratio, key)), (ratio, key))
        share = record["contenders"].get("ours", {}).get("roofline")
        if share is not None:
            shares[bench] = min(shares.get(bench, (share, key)), (share, key))
    weakest = sorted(ratios.items(), key=lambda item: item[1], reverse=True)[:WEAKEST]
    if weakest:
        parts.append("Weakest against each peer: ours divided by the peer's, so that more than 1 is slower or larger.")
        rows = [[bench, peer, f"{ratio:.2f}", key] for (bench, peer), (ratio, key) in weakest]
        parts.append(_table(["bench", "peer", "ours / peer", "case"], rows))
    if shares:
        parts.append("Farthest from the least possible time: its share of ours, in each bench.")
        rows = [
            [bench, f"{share:.1%}", key] for bench, (share, key) in sorted(shares.items(), key=lambda item: item[1])
        ]
        parts.append(_table(["bench", "share", "case"], rows))
    return parts or ["Nothing was measured."]


def _advice(folder: Path, failed: list[Step]) -> str:
    lines = []
    if failed:
        names = ", ".join(f"{step.name}.txt" for step in failed)
        lines.append(
            f"- Read {names}. A failed self-test comes first: what follows relies on those instructions and passes."
        )
    files: list[str] = sorted({path.name for path in folder.iterdir() if path.is_file()} | {"REPORT.md"})
    lines.append(f"- Commit `{folder}` as it is{', failed steps included' if failed else ''}: {', '.join(files)}.")
    lines.append("- `python -m benchmarks report` then writes the documents' tables anew.")
    if not failed:
        lines.append('- In `docs/how/cuda.md` say on which card this ran: "have not run on a GPU yet" is over.')
    return "\n".join(lines)


def _table(head: list[str], rows: list[list[Any]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8", errors="replace")
    except OSError:
        return ""


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: gpu_report.py FOLDER")
    (Path(sys.argv[1]) / "REPORT.md").write_text(report(Path(sys.argv[1])), "utf-8")
