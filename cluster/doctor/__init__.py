"""The doctor: what is wrong with a cluster, told before a study is begun on it.

`python -m cluster doctor cluster/gpu.yaml` looks at the layout and the secrets, on the machine that starts clusters,
before there is anything to pay for. Where RAY_ADDRESS is set it looks at the cluster there: at every node, the ledger
and MLflow; on a head it always is, so that `python -m cluster doctor` is all to say there.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cluster.doctor.finding import BAD, OK, UNSEEN, Findings, unseen
from hdml_core.errors import ConfigError

DONE, MISTAKE, WRONG, INTERRUPTED = 0, 2, 3, 130
"""Exit status: all that was looked at is well; a mistake in the call; something is wrong; interrupted."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Look at everything that can be looked at from here, and say it line by line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("layout", metavar="FILE", type=Path, nargs="?", help="a layout, such as cluster/gpu.yaml")
    given = parser.parse_args(arguments)
    try:
        return _say(_examine(given.layout))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _examine(layout: Path | None) -> Findings:
    """Look at the layout, if one is given, and at the cluster, if one is named."""
    live = "RAY_ADDRESS" in os.environ
    if layout is None and not live:
        raise ConfigError(
            "RAY_ADDRESS must name a cluster where no layout is given, got neither: "
            "`python -m cluster doctor cluster/gpu.yaml` before one is started, or "
            "`ray exec cluster/gpu.yaml 'python -m cluster doctor'` once it runs"
        )
    if layout is not None and not layout.is_file():
        raise ConfigError(f"FILE must be a layout, such as cluster/gpu.yaml, got {layout}, which is no file")
    # Ray, MLflow and torch take seconds to import: a mistake in the call is told before.
    if layout is not None:
        from cluster.doctor.layout import examine as examine_layout

        yield from examine_layout(layout)
    if live:
        from cluster.doctor.live import examine as examine_cluster

        yield from examine_cluster(os.environ["RAY_ADDRESS"])
    else:
        yield unseen(
            "nodes, ledger and MLflow",
            f"RAY_ADDRESS is not set here; once the cluster runs: ray exec {layout} 'python -m cluster doctor'",
        )


def _say(findings: Findings) -> int:
    from studies.machinery.redaction import redacted

    marks: Counter[str] = Counter()
    for finding in findings:
        marks[finding.mark] += 1
        print(redacted(str(finding)), flush=True)
    unlooked = f", {marks[UNSEEN]} not looked at" if marks[UNSEEN] else ""
    end = "mend what is BAD before a study is begun" if marks[BAD] else "nothing to mend"
    print(f"{marks[OK]} ok, {marks[BAD]} BAD{unlooked}: {end}", flush=True)
    return WRONG if marks[BAD] else DONE
