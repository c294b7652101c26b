"""Whether a plan for a speedup is as fast as was asked for, on a machine that does nothing else.

    python benchmarks/speedups.py dit
    python benchmarks/speedups.py mmdit32

For each speedup a plan is searched for, several times. Then generations without it and with it take turns, and the
transformer's calls are timed. A try is met where the median of the ratios is no more than 3 % below what was asked. Two
neighbouring numbers of computed steps may be further apart than that, so `next` says how fast the plan would be with one more
computed step. What is finished is not measured again.
"""

import json
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import budget
import torch
import typer
from tqdm import tqdm

import arrowhead as ah
from arrowhead.calibration.driver import driver_of
from arrowhead.plans.cells import FULL
from arrowhead.searches.budget.validation import measured_seconds
from arrowhead.versions import versions

HERE = Path(__file__).parent
ASKED = (1.5, 2.0, 3.0)
SHORT = 0.03


def next_slower(ratio: float, computed: int, steps: int) -> float:
    """The speedup with one more computed step, of a plan of so many that is faster by `ratio`."""
    part = computed / steps
    skipped = (1 / ratio - part) / (1 - part)  # seconds of a skipped step, of those of a computed one
    return 1 / (1 / ratio + (1 - skipped) / steps)


def main(
    name: budget.Name,
    inputs: Annotated[int, typer.Option(help="prompts or labels at once")] = 4,
    tries: Annotated[int, typer.Option(help="searches for each speedup")] = 3,
    rounds: Annotated[int, typer.Option(help="generations of each kind after a search")] = 3,
) -> None:
    """Search, time, and write the table after each try."""
    torch.set_num_threads(1)
    path, case, pipe = HERE / f"results/speedups_{name}.json", budget.CASES[name], ah.tiny.load(name)
    pipe.set_progress_bar_config(disable=True)
    calibrating = {**case.common, case.asks: case.calibration[:inputs], "generator": torch.Generator().manual_seed(budget.SEED)}
    about = {
        "command": f"python benchmarks/speedups.py {name} --inputs {inputs} --tries {tries} --rounds {rounds}",
        "date": datetime.now(UTC).date().isoformat(),
        "device": "cpu, float32, one thread",
        "versions": versions(),
    }
    rows: dict[str, Any] = json.loads(path.read_text())["rows"] if path.exists() else {}
    for asked, index in tqdm([(asked, index) for asked in ASKED for index in range(tries)]):
        if (row := f"{asked} try {index}") in rows:
            continue
        plan = ah.search(pipe, calibrating, budget=ah.Budget(speedup=asked), progress=False)
        times = [measured_seconds(driver_of(pipe, calibrating), plan) for _ in range(rounds)]
        ratio = statistics.median(raw / compressed for raw, compressed in times)
        computed = sum(step[0] == FULL for step in plan.cells)
        rows[row] = {
            "measured": round(ratio, 3),
            "met": ratio >= asked * (1 - SHORT),
            "next": round(next_slower(ratio, computed, plan.steps), 3),
            "computed": computed,
            **{key: plan.about["search"].get(key) for key in ("predicted_speedup", "measured_speedup", "generations")},
        }
        path.write_text(json.dumps({**about, "rows": rows}, indent=1, allow_nan=False) + "\n")
    typer.echo(f"{sum(row['met'] for row in rows.values())} of {len(rows)} are met")


if __name__ == "__main__":
    typer.run(main)
