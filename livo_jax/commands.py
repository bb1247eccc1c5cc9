"""What the command lines have in common."""

import difflib
import errno
import functools
import os
import pathlib
import re
import signal
import sys
import traceback
from collections.abc import Callable

from absl import app, flags

# As ml_collections tells what happens in a config file, and beside a misspelt field all that there are.
IN_CONFIG_FILE, OTHER_FIELDS = "Error whilst parsing config file", r" Other fields present: .*?(?=\\nDid you|'?$)"

flags.disclaim_key_flags()  # --help lists what is defined here for the command that asks for it


def define_distributed() -> flags.FlagHolder:
    """Defines --distributed, which is for livo_jax.sharding.join."""
    return flags.DEFINE_string(
        "distributed", None, "One of several processes: 'auto' on a cluster, or HOST:PORT,PROCESSES,NUMBER."
    )


class PathParser(flags.ArgumentParser):
    def parse(self, argument: str) -> str:
        return os.path.expanduser(argument)


def define_path(name: str, help: str) -> flags.FlagHolder:
    """Defines a flag for a path. Shells do not expand the ~ of --name=~/x: here it is."""
    return flags.DEFINE(PathParser(), name, None, help)


def divide_cpu(devices: int):
    """Has a CPU count as so many devices, at most one a core, unless XLA_FLAGS or JAX_NUM_CPU_DEVICES tell how many."""
    import jax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    told = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    told = told or jax.config.jax_num_cpu_devices != -1
    if (devices := min(devices, cores)) > 1 and not told:
        jax.config.update("jax_num_cpu_devices", devices)


def find_config(file: str) -> str:
    """The FILE of --config, by the path of the installed one where the folder that one works in has none."""
    path = file.split(":")[0]
    if os.path.isdir(path):
        sys.exit(f"--config={file}: this is a folder, name a file in it, as configs/tiny.py")
    if os.path.exists(path):
        return file
    for folder in pathlib.Path(__file__).parents[:2]:  # installed, and in a checkout
        if path.startswith("configs/") and os.path.exists(folder / path):
            return str(folder / file)
    sys.exit(f"--config={file}: there is no such file")


def find_configs(argv: list[str]) -> list[str]:
    """The command line with what find_config says in --config=FILE, as which --config FILE is written too."""
    found, arguments = [], iter(argv)
    for argument in arguments:
        name, given, file = argument.partition("=")
        if name in ("--config", "-config") and (file := file if given else next(arguments, "")):
            argument = f"--config={find_config(file)}"
        found.append(argument)
    return found


def told_by_traceback(text: str) -> str:
    """The place in the config file, and the message, of a traceback's text; ml_collections gives all of it."""
    lines = text.rstrip().splitlines()
    place = max(i for i, line in enumerate(lines) if line.startswith("  File ") and "ml_collections" not in line)
    last = max(i for i, line in enumerate(lines) if line.startswith(" "))
    message = "\n".join(lines[last + 1 :])
    return f"{lines[place].strip()}\n{re.sub(OTHER_FIELDS, '', message)}".replace("\\n", " ")


def parse(argv):
    """absl's parser, which here answers misspelt overrides of --config with what can be overridden.

    What is compiled is kept for the next start, in JAX_COMPILATION_CACHE_DIR or ~/.cache/livo_jax. A CPU is divided as
    config.cpu_devices says. A config that livo_jax brings is found from any folder.
    """
    argv = find_configs(argv)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch, which nothing needs, is not there
    import jax  # here: imports of a command line's module stay quick

    if not jax.config.jax_compilation_cache_dir:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "livo_jax"))
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(told_by_traceback(str(error)) if IN_CONFIG_FILE in str(error) else f"{error}\n--help lists the flags")
    except (AttributeError, KeyError) as error:
        files = [arg.partition("=")[2].partition(":")[0] for arg in argv if arg.startswith("--config=")]
        if "'get_config'" in str(error):
            sys.exit(f"--config={files[-1]}: it has no function get_config() that returns a ConfigDict")
        if {*files} & {frame.filename for frame in traceback.extract_tb(error.__traceback__)}:
            sys.exit(told_by_traceback("".join(traceback.format_exception(error))))
        overrides = [arg for arg in argv if arg.lstrip("-").startswith("config.")]
        sys.argv[:] = [arg for arg in argv if arg not in overrides]  # where config_flags looks for overrides
        app.parse_flags_with_usage(sys.argv)
        sys.exit(misspelt([arg.lstrip("-").split("=")[0] for arg in overrides], flags.FLAGS.config))
    if "config" in flags.FLAGS and (config := flags.FLAGS.config):
        from livo_jax import seeds

        if problems := [text for own in config.get("methods", {"": config}).values() for text in seeds.problems(own)]:
            sys.exit("; ".join(dict.fromkeys(problems)))
        divide_cpu(config.get("cpu_devices", 1))
    return rest


def misspelt(given: list[str], config) -> str:
    """What is said of overrides, "config.train.step", of which some are no fields of the config."""
    from livo_jax.files.settings import flatten

    fields = [f"config.{name}" for name in flatten(config.to_dict())]
    lines = []
    for name in given:
        if name in fields:
            continue
        section = name.rpartition(".")[0]
        near = difflib.get_close_matches(name, fields, n=3, cutoff=0.8)
        of_section = [field for field in fields if section != "config" and field.startswith(f"{section}.")]
        sections = dict.fromkeys(".".join(field.split(".")[:2]) for field in fields)
        near = near or of_section or sections
        lines.append(f"the config has no {name}; there is {', '.join(near)}")
    return "\n".join(lines)


def drop_unread(stream):
    """Has a stream whose reader went away, as behind `| head` or of a terminal that was closed, write to nowhere.

    What nobody reads ends no work.
    """
    write, flush = stream.write, stream.flush

    def heard(call, *args):
        try:
            return call(*args)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    stream.write, stream.flush = functools.partial(heard, write), functools.partial(heard, flush)


def run(main: Callable, flags_parser: Callable = app.parse_flags_with_usage):
    """absl's app.run, but what livo_jax raises on purpose ends the command with its message alone.

    Such a message names the place and the remedy. So does the system's of a path that cannot be read or written. Any
    other error is a fault of the program: it keeps its traceback.
    """

    def told(argv):
        for stream in (sys.stdout, sys.stderr):
            if stream:  # None where it was closed
                drop_unread(stream)
        try:
            return main(argv)  # the status, of a command that has one
        except KeyboardInterrupt:
            print("\nended by Ctrl-C", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        except app.UsageError as error:
            sys.exit(f"{error}\n--help lists the flags")
        except Exception as error:
            from livo_jax.files.directories import FULL
            from livo_jax.processes import is_raised_here

            if isinstance(error, OSError) and error.errno in FULL:
                sys.exit(f"{error}. Free some space, and run the same command again")
            if not is_raised_here(error) and not (isinstance(error, OSError) and error.filename):
                raise
            sys.exit(str(error))

    app.run(told, flags_parser=flags_parser)
