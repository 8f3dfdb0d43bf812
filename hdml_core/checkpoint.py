"""A run to disk and back, whole or not at all.

A checkpoint is a folder `epoch-00012` with `state.safetensors` (every tensor of the run) and `run.json` (its settings,
where it is, every report so far, and the checksum of all that and of the tensors). It is written aside under another
name, flushed and renamed; the one before it stays, and `load` falls back to it where the newest is damaged. No pickle.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as to_bytes
from torch import Tensor

from hdml_core import whole
from hdml_core.config import to_settings
from hdml_core.notation import Averages, EpochReport, RetrievalReport
from hdml_core.training import Run

KEPT = 2
MAY_CHANGE = ("optim.epochs",)
"""Settings that a run may be continued under with another value."""


class CheckpointError(RuntimeError):
    """Checkpoints are there and none can be used, or one is of another run."""


def save(run: Run, folder: Path) -> Path:
    """Write the run as it is into `folder`, and drop all but the newest two checkpoints there; return the new one.

    Raises OSError (no space left, read-only) with the folder as it was before.
    """
    state = to_bytes({name: value.contiguous() for name, value in _tensors(run).items()})
    record = {
        "settings": to_settings(run.config),
        "epoch": run.epoch,
        "step": run.step,
        "window_steps": run.averages.steps,
        "reports": [_to_json(report) for report in run.reports],
    }
    record["sha256"] = _checksum(record, state)
    target = folder / f"epoch-{run.epoch:05d}"
    whole.put(target, {"state.safetensors": state, "run.json": json.dumps(record).encode()})
    for old in _newest_first(folder)[KEPT:]:
        shutil.rmtree(old)
    return target


def load(run: Run, folder: Path) -> bool:
    """Restore the run in place from the newest whole checkpoint in `folder`; return False where there is none.

    Raises CheckpointError where checkpoints are there and all are damaged, or where one has other settings.
    """
    found = newest(folder)
    if found is None:
        return False
    path, record, tensors = found
    _check_settings(run, record["settings"], path)
    _restore(run, record, tensors)
    return True


def newest(folder: Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]] | None:
    """Read the newest whole checkpoint in `folder`: where it is, its record, its tensors; None where there is none.

    Raises CheckpointError where checkpoints are there and all are damaged.
    """
    damages = []
    for path in _newest_first(folder):
        try:
            return path, *_read(path)
        except (OSError, ValueError, KeyError) as error:
            damages.append(f"{path.name}: {error}")
    if damages:
        raise CheckpointError(
            f"no checkpoint in {folder} can be read ({'; '.join(damages)}): remove the folder to start anew"
        )
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-*"), reverse=True)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    record = json.loads((path / "run.json").read_text())
    content = (path / "state.safetensors").read_bytes()
    if record.pop("sha256") != _checksum(record, content):
        raise ValueError("it does not have its checksum")
    return record, load_tensors(content)


def _checksum(record: dict[str, Any], state: bytes) -> str:
    return hashlib.sha256(json.dumps(record).encode() + state).hexdigest()


def _check_settings(run: Run, saved: dict[str, Any], path: Path) -> None:
    own = json.loads(json.dumps(to_settings(run.config)))
    other = [
        f"{name} {saved.get(name)!r} there, {own.get(name)!r} here"
        for name in sorted({*saved, *own})
        if saved.get(name) != own.get(name) and name not in MAY_CHANGE
    ]
    if other:
        raise CheckpointError(f"{path} is of another run: {', '.join(other)}")


def _tensors(run: Run) -> dict[str, Tensor]:
    """Every tensor of the run by name: networks, optimiser moments, averages."""
    named = {f"networks.{name}": value for name, value in run.networks.state_dict().items()}
    for optimiser_name, optimiser in run.optimisers.items():
        for number, moments in optimiser.state_dict()["state"].items():
            named |= {f"optimisers.{optimiser_name}.{number}.{name}": value for name, value in moments.items()}
    for name, value in run.averages._asdict().items():
        if isinstance(value, Tensor):
            named[f"averages.{name}"] = value
    # Tensors that share memory, as j_avg and j_gen_avg do at the start, must be written apart.
    return {name: value.detach().clone() for name, value in named.items()}


def _restore(run: Run, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    run.networks.load_state_dict(under("networks."))
    for name, optimiser in run.optimisers.items():
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in under(f"optimisers.{name}.").items():
            number, _, moment = key.partition(".")
            moments.setdefault(int(number), {})[moment] = value
        optimiser.load_state_dict({"state": moments, "param_groups": optimiser.state_dict()["param_groups"]})
    averages = {name: value.to(run.device) for name, value in under("averages.").items()}
    run.averages = Averages(**averages, steps=record["window_steps"])
    run.epoch, run.step = record["epoch"], record["step"]
    run.reports[:] = [_from_json(report) for report in record["reports"]]


def _to_json(report: EpochReport) -> dict[str, Any]:
    return report._asdict() | {"validation": report.validation and report.validation._asdict()}


def _from_json(record: dict[str, Any]) -> EpochReport:
    validation = record["validation"]
    if validation is not None:
        recall_at = {int(k): value for k, value in validation["recall_at"].items()}
        validation = RetrievalReport(**validation | {"recall_at": recall_at})
    trace = {name: tuple(values) for name, values in record["trace"].items()}
    return EpochReport(**record | {"trace": trace, "validation": validation})
