"""The launcher on this machine: `cluster/try_local.sh` from `ray up` to `ray down`, over a real ssh."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.cluster


def test_all_that_a_user_does_works():
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("try_local.sh makes namespaces and a user: only root on Linux can")
    lacking = [program for program in ("/usr/sbin/sshd", "rsync") if not shutil.which(program)]
    if lacking and not shutil.which("apt-get"):
        pytest.skip(f"{', '.join(lacking)} not found, and no apt-get to install them with")
    tried = subprocess.run(
        ["bash", ROOT / "cluster/try_local.sh"], capture_output=True, text=True, check=False, timeout=1200
    )
    said = tried.stdout + tried.stderr
    if "can't install" in said:
        pytest.skip(said.splitlines()[-1])
    assert tried.returncode == 0, said
    assert tried.stdout.splitlines()[-1] == "tried: all of it works"
    # The first submission runs four trials, the second finds them and runs two more, the job four of its own.
    assert re.findall(r"^(\d of \d) trials: \d COMPLETE", said, re.MULTILINE) == ["4 of 4", "6 of 6", "4 of 4"]
    assert re.search("[1-9][0-9]* ok, 0 BAD: nothing to mend", said)
    assert "ledger, MLflow and checkpoints agree" in said
    assert [line for line in said.splitlines() if line.endswith(": 401")] == [
        "job submission: 401",
        "dashboard: 401",
        "MLflow: 401",
    ]
    assert "PostgreSQL: no password supplied" in said
