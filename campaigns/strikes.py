"""How each kind of fault strikes at a job of the campaign."""

import os
import shutil
import signal
from collections.abc import Callable

import psutil

from faults import EXPIRED, MONITOR, STORE_FULL, TARGETS, TRANSIENT, transient
from jobs import kill_all
from s3 import Faults
from scene import LIMIT_S, Scene, left_over

A_MINUTE_S, A_WHILE_S, STOPPED_S = 60.0, 8.0, 20.0


def strike(here: Scene) -> str:
    """Do what the fault is; says what it hit, or nothing where there was nothing yet."""
    name, form = here.fault.kind.name, here.fault.form
    if name in TRANSIENT:
        here.break_network(transient(name, here.fault.seed))
        return name
    if name.startswith("store gone"):
        return _silence(here, form, A_WHILE_S if name.endswith("while") else None)
    if name == "driver cut off":
        return _cut_off(here) if form.startswith("storage") else _stop_driver(here)
    if name.endswith("disk full"):
        assert here.disk is not None
        here.disk.fill()
        return "filled"
    return STRIKES[name](here)


def _silence(here: Scene, fault: str, seconds: float | None) -> str:
    here.break_network(Faults(stall_s=LIMIT_S, **{fault: 1.0}))
    if seconds is not None:
        here.after(seconds, lambda: here.break_network(Faults()))
    return fault


def _cut_off(here: Scene) -> str:
    """The driver alone: the cluster's workers reach the storage by another way."""
    here.proxies[0].faults = Faults(stall_s=LIMIT_S, stall=1.0)
    here.after(A_MINUTE_S, lambda: setattr(here.proxies[0], "faults", Faults()))
    return "stall"


def _stop_driver(here: Scene) -> str:
    driver = here.processes[-1]
    os.kill(driver.pid, signal.SIGSTOP)
    here.after(STOPPED_S, lambda: os.kill(driver.pid, signal.SIGCONT))
    return "stopped"


def _refuse(here: Scene) -> str:
    """The store is full, which says no to writing alone, or says no to everything."""
    is_full = here.fault.form in STORE_FULL
    answer = (STORE_FULL | EXPIRED)[here.fault.form]
    here.break_network(Faults(error=1.0, answer=answer, only=lambda request: request.method == "PUT" or not is_full))
    return answer.code


def workers(here: Scene, target: str) -> list[psutil.Process]:
    """Processes of one stage, wherever they run."""
    return [process for process in left_over(here) if TARGETS[target] in " ".join(process.cmdline())]


def _kill_worker(here: Scene) -> str:
    for process in workers(here, here.fault.kind.name.split()[0])[:1]:
        process.kill()
        return str(process.pid)
    return ""


def _kill_driver(here: Scene) -> str:
    number = getattr(signal, here.fault.form)
    os.kill(here.processes[-1].pid, number)
    return here.fault.form


def _kill_all(here: Scene) -> str:
    kill_all(here.processes[-1])
    return "all"


def _lose_node(here: Scene) -> str:
    assert here.cluster is not None
    nodes = [node for node in here.cluster.list_all_nodes() if node is not here.cluster.head_node]
    for node in nodes if here.fault.form.startswith("both") else nodes[:1]:
        here.cluster.remove_node(node, allow_graceful=False)
    if "another" in here.fault.form:
        here.errands.put(lambda: here.cluster.add_node(num_cpus=1))  # Ray starts nodes from a main thread alone
    return here.fault.form


def _take_memory(here: Scene) -> str:
    """Let actors have no more address space than they have now; Ray's monitor is told before they start."""
    if here.fault.form == MONITOR:
        return "threshold"
    for process in workers(here, "actor"):
        has = process.memory_info().vms
        process.rlimit(psutil.RLIMIT_AS, (has, has))
    return "limited" if workers(here, "actor") else ""


def _replace_shard(here: Scene) -> str:
    here.input.replace(here.replaced, (here.world.folder / "b" / here.replaced).read_bytes())
    return here.replaced


def _change_recipe(here: Scene) -> str:
    other, name = here.world.folder / "other", {"base": "base", "adapter": "ten"}[here.fault.form]
    for file in (other / name).iterdir():
        shutil.copyfile(file, here.folder / name / "incoming")
        (here.folder / name / "incoming").rename(here.folder / name / file.name)
    return name


def _kill_one_of_two(here: Scene) -> str:
    if here.fault.form == "one killed":
        os.kill(here.processes[0].pid, signal.SIGKILL)
    return here.fault.form


STRIKES: dict[str, Callable[[Scene], str]] = {
    "actor killed": _kill_worker,
    "decoder killed": _kill_worker,
    "writer killed": _kill_worker,
    "driver killed": _kill_driver,
    "driver told to end": _kill_driver,
    "all processes killed": _kill_all,
    "node lost": _lose_node,
    "store full": _refuse,
    "keys expired": _refuse,
    "out of memory": _take_memory,
    "shard replaced": _replace_shard,
    "recipe changed": _change_recipe,
    "started twice": _kill_one_of_two,
}
