"""tpuvid-core's own plugin: what it registers as any package would."""

from tpuvid.compute.step_caches import DeepCache
from tpuvid.contract.commands import CommandSpec
from tpuvid.contract.hookspecs import hookimpl
from tpuvid.contract.stepcache import StepCache


@hookimpl
def tpuvid_step_caches() -> list[type[StepCache]]:
    return [DeepCache]


@hookimpl
def tpuvid_commands() -> list[CommandSpec]:
    return [
        CommandSpec(
            name="compile", load_command="tpuvid.cli.plan:compile_command", help="Compile all that generate runs into a pack."
        ),
        CommandSpec(
            name="plan", load_command="tpuvid.cli.plan:plan_command", help="What a TPU would do: memory, layout, time."
        ),
        CommandSpec(name="tune", load_command="tpuvid.cli.plan:tune", help="Find tile sizes of kernels for a TPU without one."),
        CommandSpec(name="plugin", load_command="tpuvid.cli.plugin:plugin", help="Write a plugin, or check one."),
    ]
