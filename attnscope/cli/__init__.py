"""The command line: parse, call one function, print. Results go to stdout, progress and errors to stderr.

Reading order: app (errors), lab, preflight, readers, scope, benches (the commands), live (progress while a run trains), tables (results).
"""

from attnscope.cli import lab, preflight, readers, scope, benches  # isort: skip  (they register commands, in the order of --help)
from attnscope.cli.app import app

__all__ = ["app", "benches", "lab", "preflight", "readers", "scope"]
