"""`python -m benchmarks.plots`: draws the results of cases of growth, each as an SVG file beside its result."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks import results
from benchmarks.cases import CASES, Growth
from benchmarks.results import Result


def draw(result: Result, file: Path) -> None:
    """Median time of a step against the number of tokens, with the line of a time that grows in proportion."""
    import matplotlib

    matplotlib.use("svg")
    # the same picture for the same result, its words as words
    matplotlib.rcParams |= {"svg.hashsalt": result.case, "svg.fonttype": "none"}
    import matplotlib.pyplot as plt

    lengths = [int(length) for length in result.outcome.samples]
    seconds = [statistics.median(times) for times in result.outcome.samples.values()]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.loglog(lengths, seconds, "o-", color="#1f4e79", label="attnfuse")
    axes.loglog(
        lengths, [seconds[0] * n / lengths[0] for n in lengths], ":", color="#999999", label="in proportion to N"
    )
    axes.loglog(
        lengths, [seconds[0] * (n / lengths[0]) ** 2 for n in lengths], "--", color="#cccccc", label="to its square"
    )
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.set_ylabel("s, forward and backward")
    exponent = result.outcome.rows[0].estimate
    title = f"exponent {exponent.value:.2f}" if exponent else ""
    axes.set_title(f"{result.case}: {title}\n{result.machine['cpu']}, {result.machine['cores']} cores", fontsize=9)
    axes.legend()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    for name, case in CASES.items():
        if isinstance(case, Growth):
            for file in sorted(results.FOLDER.glob(f"*/{name}.json")):
                result = results.load(file)
                if result is not None and result.outcome.samples:
                    draw(result, file.with_suffix(".svg"))
                    print(file.with_suffix(".svg"))


if __name__ == "__main__":
    main()
