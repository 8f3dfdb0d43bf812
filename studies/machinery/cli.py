"""The command line: of every study file, and of `python -m studies`."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hdml_core.config import ConfigError, parse_setting
from hdml_core.datasets import DataError
from studies.machinery.redaction import redacted
from studies.machinery.study import Study, parse_field, variant

DONE, MISTAKE, FAILED, INTERRUPTED = 0, 2, 3, 130
"""Exit status: done; a mistake in the call or a setting; more failed trials than allowed, or ledgers that do not
agree; interrupted, state saved."""


def main(study: Study, arguments: Sequence[str] | None = None) -> int:
    """Run a study as its command line says; return the exit status."""
    parser = argparse.ArgumentParser(
        description=study.question, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--dataset", metavar="NAME", help="another data set than the study's own")
    add("--trials", metavar="N", type=int, help=f"trials in all, earlier ones included; else {study.trials}")
    add("--hours", metavar="H", type=float, help="begin no trial after so many hours")
    add("--tiny", action="store_true", help="toy size on glyphs, under a minute once started")
    add("--set", metavar="NAME=VALUE", action="append", default=[], help="a setting by dotted name; repeat for more")
    add("--out", metavar="DIR", type=Path, help="where to write, instead of HDML_OUT or `runs`")
    add("--fresh", action="store_true", help="put what the study has so far aside, and begin anew")
    add("--join", action="store_true", help="work on the same trials beside a driver that is at it already")
    add("--retry-failed", action="store_true", help="try again the trials that failed for want of a living worker")
    add("--warm-start", metavar="STUDY", help="try the best points of another study first")
    add("--name", metavar="NAME", help="keep this variant of the study under a name of its own")
    add("--gpus-per-trial", metavar="G", type=float, help="a share of a GPU, such as 0.5, or several")
    given = parser.parse_args(arguments)

    def run() -> int:
        of_study = [assignment for assignment in given.set if assignment.startswith("study.")]
        of_trial = [assignment for assignment in given.set if assignment not in of_study]
        options = {"trials": given.trials, "hours": given.hours, "gpus_per_trial": given.gpus_per_trial}
        asked = variant(
            study,
            dataset=given.dataset,
            tiny=given.tiny,
            overrides=dict(parse_setting(assignment) for assignment in of_trial),
            name=given.name,
            **dict(parse_field(assignment) for assignment in of_study),
            **{name: value for name, value in options.items() if value is not None},
        )
        # Ray, MLflow and torch take seconds to import: a mistake in the call is told before.
        from studies.machinery.driver import Places, run_study
        from studies.machinery.progress import summary

        places = Places.under(out_folder(given.out))
        ledgers = run_study(
            asked,
            places,
            fresh=given.fresh,
            join=given.join,
            retry_failed=given.retry_failed,
            warm_start=given.warm_start,
        )
        say(summary(asked, ledgers, places.tracking_uri, places.out))
        failed = sum(row.state == "FAIL" for ledger in ledgers.values() for row in ledger.rows())
        if failed > asked.failures_allowed * asked.trials:
            print(f"{failed} trials failed, more than the study allows", file=sys.stderr)
            return FAILED
        if asked.test_seeds:
            from studies.machinery.confirm import close_study

            say(close_study(asked, ledgers["search"], places))
        return DONE

    return status_of(run)


def commands(arguments: Sequence[str] | None = None) -> int:
    """Run a command about studies that have been run: `python -m studies COMMAND [STUDY]`."""
    parser = argparse.ArgumentParser(prog="python -m studies", description="What to do with a study that has run.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, does: str, study: bool = True) -> argparse.ArgumentParser:
        added = subparsers.add_parser(name, help=does, description=does, allow_abbrev=False)
        if study:
            added.add_argument(
                "study", metavar="STUDY", help="as the ledger has it: alpha_beta, alpha_beta-cub200, ..."
            )
        added.add_argument("--out", metavar="DIR", type=Path, help="where the study was written")
        return added

    command("list", "the studies of the ledger, how far each is, and who is at work on it", study=False)
    command("show", "one study: its trials, what they reached and what they cost")
    command("sync", "send to MLflow what it has not been told yet")
    command("verify", "whether ledger, MLflow and checkpoints agree, and how to mend what does not")
    confirm = command("confirm", "open the test classes, once, for the best trial beside its baseline")
    confirm.add_argument("--seeds", metavar="N", type=int, default=5, help="trainings of each; else 5")
    confirm.add_argument("--against", metavar="STUDY", help="this study's best trial instead of the baseline")
    confirm.add_argument("--again", action="store_true", help="open them once more; that too is recorded")
    confirm.add_argument(
        "--paper-mode",
        action="store_true",
        help="beside the honest number, let the test classes choose the epoch, as published numbers mostly did",
    )
    confirm.add_argument("--gpus-per-trial", metavar="G", type=float, default=1.0)
    given = parser.parse_args(arguments)

    def run() -> int:
        from studies.machinery import confirm, review
        from studies.machinery.driver import Places

        places = Places.under(out_folder(given.out))
        match given.command:
            case "list":
                say(review.list_studies(places))
            case "show":
                say(review.show(given.study, places))
            case "sync":
                say(review.sync(given.study, places))
            case "verify":
                disagreements = review.verify(given.study, places)
                say("\n".join(disagreements) or "ledger, MLflow and checkpoints agree")
                return FAILED if disagreements else DONE
            case "confirm":
                opening = confirm.Asked(given.seeds, given.against, given.again, given.paper_mode, given.gpus_per_trial)
                say(confirm.confirm_study(given.study, places, opening))
        return DONE

    return status_of(run)


def out_folder(given: Path | None) -> Path:
    """Where studies write: as given, else HDML_OUT, else `runs` in the working directory."""
    return given or Path(os.environ.get("HDML_OUT", "runs"))


def say(text: str) -> None:
    """Print what was found, which may name addresses, without their passwords."""
    print(redacted(text))


def status_of(run: Callable[[], int]) -> int:
    """Run to an exit status; a mistake of the caller's is one line on stderr, an interruption no error."""
    try:
        return run()
    except (ConfigError, DataError) as error:
        print(redacted(f"error: {error}"), file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted: all is saved, and the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
