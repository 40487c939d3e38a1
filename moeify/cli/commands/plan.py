"""`moeify plan`: which layout for which machine."""

from moeify.cli import options as option
from moeify.command_line import command_line
from moeify.options import MachineOptions, SplitOptions


def plan_command(model: option.Model, *, options: MachineOptions, output: option.Output) -> None:
    """Find the layout for a machine: memory, and a bound on its speed.

    Counts what a token reads from GPU memory and from RAM, dense and split. What is not named is measured here.

    Example:
        moeify plan builtin --vram 0 --ram-bandwidth 50
    """
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.plan import plan_tables
    from moeify.convert.machine_plan import plan_for_machine

    renderer = renderer_for(output)
    plan = plan_for_machine(model, options, track=renderer.track)
    step = command_line("inspect", model)
    if plan.choice is not None and plan.choice.layout is not None:
        layout = plan.choice.layout
        split = SplitOptions(layout.num_experts, layout.num_shared, layout.num_active, target=plan.target)
        step = command_line("split", model, split)
    renderer.result(plan, *plan_tables(plan), next_step=step)
