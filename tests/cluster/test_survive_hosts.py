"""Hosts die and come; the head, and with it the driver and the whole cluster, dies too."""

from collections.abc import Callable

import pytest

from tests.cluster.bed import Bed
from tests.cluster.hosts import Host
from tests.cluster.submitted import PART, WORKER, Submitted, Undisturbed
from tests.patience import patient

pytestmark = [pytest.mark.long, pytest.mark.timeout(patient(400))]
ELASTIC = "cluster.train_workers=[1,3]"


def one_with(bed: Bed, process: str) -> Host:
    """A host that has such a process; not the head, where the driver is."""
    return next(host for host in (bed.hosts["a"], bed.hosts["b"]) if host.processes(process))


def test_a_host_loses_its_power_in_soft_labels_and_another_in_the_student(
    bed: Bed, submit: Callable[..., Submitted], undisturbed: Undisturbed
) -> None:
    """No connection is closed: that they are gone shows in their silence alone."""
    run = submit()
    run.wait_for(lambda: bed.hosts["a"].processes(PART) or bed.hosts["b"].processes(PART), "soft labels", patient(120))
    host = one_with(bed, PART)
    host.cut()
    host.kill()
    run.wait_for_step("student/rbm")
    bed.mend()
    host = one_with(bed, WORKER)
    host.cut()
    host.kill()
    run.wait_for_progress("student/rbm")
    assert run.end() == 0, run.log
    undisturbed.assert_same(run)


def test_the_cluster_dies_and_the_same_submission_goes_on_with_fewer_hosts(
    bed: Bed, submit: Callable[..., Submitted], undisturbed: Undisturbed
) -> None:
    first = submit()
    first.wait_for_step("teacher", 3)
    for host in (bed.head, bed.hosts["a"], bed.hosts["b"]):
        host.kill()
    first.stop()
    for host in (bed.head, bed.hosts["a"]):
        host.start()
    bed.start_ray(bed.head, bed.hosts["a"])
    second = submit("cluster.train_workers=2", "cluster.inference_workers=1", "cluster.shard_servers=0", run=first.run)
    assert second.end() == 0, second.log
    assert "teacher" in second.log
    assert "went on from where it was" in second.log
    undisturbed.assert_same(second)


def test_a_group_shrinks_with_the_cluster_and_grows_with_it(
    bed: Bed, submit: Callable[..., Submitted], undisturbed: Undisturbed
) -> None:
    run = submit(ELASTIC, "cluster.start_timeout_s=15")
    run.wait_for_step("teacher")
    for name in ("a", "b"):
        bed.hosts[name].kill()
    run.wait_for_progress("teacher")
    assert len(bed.head.processes(WORKER)) < 3
    bed.mend()
    run.wait_for(lambda: any(bed.hosts[name].processes(WORKER) for name in "ab"), "workers on the hosts that joined")
    assert run.end() == 0, run.log
    undisturbed.assert_same(run)
