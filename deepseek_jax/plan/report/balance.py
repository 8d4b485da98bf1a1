"""How unevenly the devices of the experts would be loaded, without and with redundant experts, from measured loads."""

import numpy as np

from deepseek_jax.layers.router import max_violation
from deepseek_jax.parallel import eplb
from deepseek_jax.plan.figures import GIVEN, Column, Figure, Row, Section
from deepseek_jax.plan.job import Job

REDUNDANT = (1, 2)  # slots of a device for redundant experts


def balance(job: Job, load_LE: np.ndarray) -> Section:
    """Returns the imbalance (load of the busiest device above an even share) of each way to place the experts.

    `load_LE` are tokens of each expert in each layer. V3 serves with one redundant expert per device (section 3.4.1).
    """
    n_devices = job.expert_devices
    rows = [_row("as in training", "in_order", load_LE.reshape(len(load_LE), n_devices, -1).sum(axis=-1), "in order")]
    nodes = n_devices // job.chip.reach if n_devices % job.chip.reach == 0 else 1
    for redundant in (0, *REDUNDANT):
        n_slots = job.network.n_experts + redundant * n_devices
        placed = eplb.place(load_LE, n_slots, n_devices, job.network.n_groups, nodes)
        loads_LP = eplb.device_loads(load_LE, placed, n_devices)
        label = f"{redundant * n_devices} redundant, placed by load"
        rows.append(_row(label, f"redundant_{redundant}", loads_LP, f"{n_slots // n_devices} experts a device"))
    columns = tuple(Column(name, f"derived/{GIVEN}") for name in ("mean over layers", "worst layer"))
    return Section("balance", f"imbalance over {n_devices} devices", tuple(rows), columns)


def _row(label: str, key: str, loads_LP: np.ndarray, note: str) -> Row:
    found = np.asarray(max_violation(loads_LP), np.float64)
    values = (("mean", float(found.mean())), ("worst", float(found.max())))
    figures = tuple(Figure(f"{key}_{name}", value, f"{value:.3f}", f"derived/{GIVEN}") for name, value in values)
    return Row(label, figures, note)
