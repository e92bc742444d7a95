"""What a run would do where it is asked for, without doing it: its stages, the hosts, and who would work where.

No worker is started and nothing is left behind. What a host is like, the doctor says (`runtime.doctor`); what is asked
here is whether there is room for the workers that are wanted.
"""

import os

from rich.console import Console

from rbm_dist import storage
from rbm_dist.config.run import ClusterConfig, Config
from rbm_dist.report.doctor_table import WRONG, doctor_table, judged
from rbm_dist.report.workers_table import workers_table
from rbm_dist.runtime.cluster import ray_cluster
from rbm_dist.runtime.doctor import examine
from rbm_dist.runtime.placement import hosts
from rbm_dist.stages import lease
from rbm_dist.stages import run as run_
from rbm_dist.stages.external_teacher import require_files
from rbm_dist.stages.inputs import check_input
from rbm_dist.stages.pipeline import all_stages, stages_of

_WORDS = {"done": "done before", "started": "goes on from where it was", "new": "to do"}


def dry_run(config: Config, console: Console, address: str | None) -> bool:
    """Say what a run would do; whether nothing stands in its way. Raises `InputError` for what the run would refuse."""
    url = storage.absolute(config.run_dir)
    stages = all_stages(config)
    run_.refuse_other_files(stages, url)
    run_.refuse_other_configuration(stages, config, url)
    check_input(stages[0], config, url, overwrite=False, console=console)
    states = stage_states(config, url)
    for name, state in states.items():
        mark = "[green]✓[/]" if state == "done" else "·"
        console.print(f"  {mark} {name}: {_WORDS[state]}", highlight=False)
    if set(states.values()) == {"done"}:
        return True
    if states["teacher"] != "done":
        require_files(config)
    address = address or os.environ.get("RAY_ADDRESS")
    is_new = not storage.exists(url)
    lines = judged(examine(address, url))
    if is_new:
        storage.remove_empty(url)
    console.print(doctor_table(lines), highlight=False)
    names, room = _room(config.cluster, address)
    wanted = {"training": config.cluster.group_size(sum(room)), "inference": config.cluster.inference_workers}
    shares = {kind: dealt(count, room, pack=config.cluster.use_gpu) for kind, count in wanted.items()}
    console.print(workers_table(names, room, shares), highlight=False)
    found = missing(config.cluster, sum(room))
    owner, at_work = lease.look(url)
    if at_work:
        found.append(f"another rbm-dist is at work in {url}: {owner}")
    for problem in found:
        console.print(f"  [red]![/] {problem}", highlight=False, soft_wrap=True)
    return not found and not any(line.verdict == WRONG for each in lines.values() for line in each)


def stage_states(config: Config, url: str) -> dict[str, str]:
    """`done`, `started` or `new` for each stage of a run; after the first that is not done, all that follow are new."""
    states: dict[str, str] = {}
    upstream = None
    for stage in stages_of(config):
        if all(state == "done" for state in states.values()):
            states[stage.name] = run_.state(stage, url, upstream)
        else:
            states[stage.name] = "new"
        if states[stage.name] == "done":
            upstream = run_.digest(stage, url)
    return states


def dealt(workers: int, room: list[int], pack: bool) -> list[int]:
    """So many workers, as far as they fit, dealt to hosts as Ray would: to as few as will do (`pack`), or in turn."""
    share = [0] * len(room)
    for _ in range(min(workers, sum(room))):
        free = [host for host in range(len(room)) if share[host] < room[host]]
        best = max(free, key=lambda host: (share[host] > 0, room[host])) if pack else min(free, key=share.__getitem__)
        share[best] += 1
    return share


def missing(cluster: ClusterConfig, room: int) -> list[str]:
    """What there is no room for, a line each."""
    wanted = {"train_workers": cluster.fewest_workers, "inference_workers": cluster.inference_workers}
    each = "a CPU and a GPU" if cluster.use_gpu else "a CPU"
    return [
        f"cluster.{key}: {count} need {each} each, and there is room for {room}; the run would wait for more for "
        f"{cluster.start_timeout_s:g} s (cluster.start_timeout_s)"
        for key, count in wanted.items()
        if count > room
    ]


def _room(cluster: ClusterConfig, address: str | None) -> tuple[list[str], list[int]]:
    """The hosts, and how many workers each has room for now."""
    if address:
        with ray_cluster(cluster, address):
            there = hosts()
        return [host.address for host in there], [host.fits(cluster.worker_resources) for host in there]
    import torch

    # The Ray that a run starts here has a CPU for each worker.
    cpus = max(cluster.most_workers, cluster.inference_workers)
    return ["this machine"], [torch.cuda.device_count() if cluster.use_gpu else cpus]
