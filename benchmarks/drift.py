"""Does a long stream keep its look? Saturation, exposure and sharpness by second, a line for each case of an
evaluation, truth in black.

relic evaluate tiny --groups pan loop --seconds 60 --out runs/minute
python benchmarks/drift.py runs/minute drift.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LOOK = ("saturation", "exposure", "sharpness")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of relic evaluate")
    parser.add_argument("out", help="the picture")
    args = parser.parse_args()
    report = json.loads((Path(args.run) / "report.json").read_text())
    cases = sorted({row["case"] for row in report["cases"]})
    figure, axes = plt.subplots(len(cases), len(LOOK), figsize=(11, 2.1 * len(cases)), squeeze=False)
    for line, case in zip(axes, cases, strict=True):
        for axis, name in zip(line, LOOK, strict=True):
            for row in report["cases"]:
                if row["case"] == case:
                    color = "#222" if row["contestant"] == "truth" else None
                    axis.plot(row["look"][name], label=row["contestant"], color=color)
            axis.set(title=f"{case.rsplit('-scene', 1)[0]}: {name}", ylim=(0, None))
            axis.title.set_fontsize(9)
    for axis in axes[-1]:
        axis.set_xlabel("second")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(args.out, dpi=100)
    print(f"Wrote {args.out}: {', '.join(cases)}")


if __name__ == "__main__":
    main()
