"""A real cluster of two nodes on this machine; one of them is killed while it trains."""

import time

import pytest

from attnscope.runs.reader import open_run
from attnscope.sweep.plan import plan_sweep
from attnscope.sweep.run import run_sweep
from tests.sweep.small import members, table_of, tiny

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # Ray's own, of many kinds

STEPS = 2500  # seconds for each part: time to be in the middle of two of them
SWEEP = {
    "vary": {
        "attention": {"scale": ["inverse_sqrt", "none"]},
        "model": {"norm": ["none", "pre", "post"], "d_model": [16, 32]},
        "init": {"gain": [0.5, 1.0]},
    }
}


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    made.shutdown()


def test_a_node_that_is_killed_takes_no_part_with_it(cluster, tmp_path):
    import ray

    from attnscope.sweep.on_ray import RayWorkers

    second = cluster.add_node(num_cpus=1)
    config = tiny(sweep=SWEEP, train={"steps": STEPS})
    plan = plan_sweep(members(sweep=SWEEP, train={"steps": STEPS}), jobs=1, machines=2)
    assert len(plan.parts) >= 6
    workers = RayWorkers(cluster.address, cpus=1)
    assert workers.machines == 2
    workers.reserve(100 * 2**20)
    given, killed = [], []
    submit = workers.submit

    def counted(path, part):
        future = submit(path, part)
        if future is not None:
            given.append(part)
        return future

    workers.submit = counted

    def kill(standings):
        # Two parts in their first half: one on each node, which have a core each.
        training = [each for each in standings.values() if each.state == "training" and 5 < each.steps_done < STEPS / 2]
        if len(training) >= 2 and not killed:
            cluster.remove_node(second, allow_graceful=False)
            killed.append(time.monotonic())

    try:
        end = run_sweep(config, plan, tmp_path / "r", workers=workers, on_look=kill)
    finally:
        workers.close()
        ray.shutdown()
    assert killed, "the node was never killed"
    run = open_run(tmp_path / "r")
    reported = {name for failure in end.failures for name in failure.members}
    finished = {
        name for name, each in table_of(tmp_path / "r").items() if each[0] in ("trained", "stalled", "diverged")
    }
    assert finished | reported == {member.name for member in run.members}
    assert not finished & reported
    # A part is handed out once; one whose node died is divided (or, of one member, handed out once more).
    assert len(given) - len(set(given)) <= len(end.divided)
    assert end.divided, "the node trained nothing"
    for part, ended in run.ends.items():
        assert ended["status"] == "finished" or part in {failure.part for failure in end.failures}
    seen = run.steps.groupby("member", observed=True)["step"]
    assert (seen.count() == seen.nunique()).all(), "no step of a member twice"


def test_an_address_where_nobody_answers_is_one_line():
    from attnscope.errors import AttnscopeError
    from attnscope.sweep.on_ray import RayWorkers

    with pytest.raises(
        AttnscopeError,
        match=r"--ray-address 127\.0\.0\.1:1: .*Connection refused\. Start the cluster first",
    ):
        RayWorkers("127.0.0.1:1", cpus=1)
