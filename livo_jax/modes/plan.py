"""--mode=plan tells what training needs."""

from absl import flags

DEVICES = flags.DEFINE_integer("devices", None, "plan: how many. Default: those that are here.", lower_bound=1)


def show_plan(config, workdir: str):
    import jax

    from livo_jax.runs import plan

    print(plan.text(plan.plan(config, DEVICES.value or jax.device_count()), config))
