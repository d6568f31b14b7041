"""Read a run directory, your own or somebody else's: pandas tables, no torch.

Run: attnscope train --no-scale && python examples/read_a_run.py runs/no-scale-001
"""

import sys

import attnscope

run = attnscope.open_run(sys.argv[1] if len(sys.argv) > 1 else "runs/no-scale-001")
print(run)

# Which parameter group's gradient was the largest, the step before each member broke?
for member in run.members:
    last = member.last_step if member.nonfinite_at is None else member.nonfinite_at - 1
    params = run.params[(run.params["member"] == member.name) & (run.params["step"] == last)]
    worst = params.loc[params["grad_norm"].idxmax()]
    print(
        f"{member.name}: at step {last} the largest gradient is that of layer {worst['layer']} "
        f"{worst['group']}, norm {worst['grad_norm']:.3g}"
    )

print(run.events[run.events["kind"] != "start"][["step", "member", "kind"]].to_string(index=False))
