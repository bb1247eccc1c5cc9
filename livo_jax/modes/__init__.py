"""The modes of the command line: each has its flags, its checks, and what it calls, which it imports when it runs."""

from absl import flags

OUT = flags.DEFINE_string("out", None, "generate, export: the directory to write.")
