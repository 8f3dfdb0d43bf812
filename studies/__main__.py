"""`python -m studies COMMAND STUDY`: what to do with a study that has run."""

from studies.machinery.cli import commands

raise SystemExit(commands())
